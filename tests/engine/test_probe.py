"""The linear probe of a tiny backbone, against features and statistics computed here."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import cv2
import pytest
import safetensors.torch
import torch
from mmengine.config import Config
from tiny import tiny  # noqa: F401
from tool_cases import read, tool_main

from replk_mm.backbones import RepLKNet
from replk_mm.engine import probe as module
from replk_mm.engine.probe import ProbeSettings, prepare_probe, probe
from replk_mm.errors import UserError
from replk_mm.heads.linear import LinearHead

# ruff: noqa: F811 (fixtures that come from another file)
DROP_PATH = {'model.backbone.drop_path_rate': 0.9}


def run(tiny, folder: Path, features: str = 'all', options: dict | None = None, **settings) -> SimpleNamespace:
    """A probe of two epochs; returns its record and weights."""
    cfg = tiny.cfg({**DROP_PATH, **(options or {})})
    notes = prepare_probe(cfg, tiny.options(folder, overwrite=True), features)
    settings = {'epochs': 2, 'batch_size': 4, 'learning_rates': [1e-2], 'cache': folder / 'cache', **settings}
    result = probe(cfg, notes, ProbeSettings(**settings))
    return SimpleNamespace(result=result, record=result.record, weights=read(result.checkpoint)['state_dict'])


@pytest.fixture(scope='module')
def done(tiny, tmp_path_factory) -> SimpleNamespace:
    return run(tiny, tmp_path_factory.mktemp('probe'), learning_rates=[1e-6, 1e-1, 1e-3], epochs=8)


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_the_cache_changes_nothing(tiny, done, tmp_path):
    rates = dict(learning_rates=[1e-6, 1e-1, 1e-3], epochs=8)
    plain = run(tiny, tmp_path, cache=None, **rates)
    assert same(plain.weights, done.weights) and not (tmp_path / 'cache').exists()
    assert plain.record['holdout_miou'] == done.record['holdout_miou']
    assert not same(run(tiny, tmp_path, seed=1, **rates).weights, done.weights)


def test_the_backbone_is_frozen_in_evaluation_mode(tiny, done):
    """Weights, statistics of norms, and features without drop path are those of the network before the probe."""
    torch.manual_seed(0)
    before = module.build_model(cfg := tiny.cfg(DROP_PATH))
    before.init_weights()
    own = {key: value for key, value in done.weights.items() if key.startswith('backbone.')}
    assert same(own, {key: value for key, value in before.state_dict().items() if key in own})
    backbone = RepLKNet(**{k: v for k, v in cfg.model.backbone.items() if k not in ('type', 'norm_cfg')}).eval()
    backbone.load_state_dict({key.removeprefix('backbone.'): value for key, value in own.items()})
    files = sorted((tiny.data / 'images/training').iterdir())
    preprocessor = cfg.model.data_preprocessor
    found = []
    for file in files:
        image = torch.from_numpy(cv2.cvtColor(cv2.imread(str(file)), cv2.COLOR_BGR2RGB)).permute(2, 0, 1).float()
        mean, std = (torch.tensor(preprocessor[key]).view(3, 1, 1) for key in ('mean', 'std'))
        with torch.no_grad():
            found.append(backbone(((image - mean) / std)[None])[-1].flatten(2)[0])
    cells = torch.cat(found, 1).double()
    # One batch an epoch: the statistics of BatchNorm are exactly those of all cells.
    torch.testing.assert_close(
        done.weights['decode_head.bn.running_mean'][-64:].double(), cells.mean(1), rtol=1e-4, atol=1e-5
    )
    torch.testing.assert_close(
        done.weights['decode_head.bn.running_var'][-64:].double(), cells.var(1), rtol=1e-3, atol=1e-6
    )


def test_the_learning_rate_is_chosen_on_training_images(done, tiny, tmp_path):
    scores = done.record['holdout_miou']
    assert list(scores) == ['1e-06', '0.1', '0.001'] and all(0 <= score <= 100 for score in scores.values())
    assert scores[f'{done.record["learning_rate"]:g}'] == max(scores.values())
    assert json.loads((done.result.config.parent / 'probe.json').read_text())['holdout_miou'] == scores
    # The images of the test are not read.
    shutil.copytree(tiny.data, tmp_path / 'data')
    cfg = tiny.cfg(DROP_PATH)
    notes = prepare_probe(cfg, tiny.options(tmp_path / 'x', data_root=str(tmp_path / 'data')))
    for folder in ('images', 'annotations'):
        shutil.rmtree(tmp_path / 'data' / folder / 'validation')
    settings = ProbeSettings((1e-6, 1e-1, 1e-3), 8, 4, cache=None)
    assert same(read(probe(cfg, notes, settings).checkpoint)['state_dict'], done.weights)


def test_the_choice_scores_images_that_the_tries_have_not_seen(tiny, tmp_path, monkeypatch):
    reads, make = [], module._cache_reader
    monkeypatch.setattr(
        module, '_cache_reader', lambda paths: lambda indices: reads.append(indices) or make(paths)(indices)
    )
    run(tiny, tmp_path, learning_rates=[1e-1, 1e-2])
    _, first, second, held, *final = map(sorted, reads)  # of labels; two epochs; the hold-out; two epochs
    assert first == second and sorted(first + held) == [0, 1, 2, 3] and len(held) == 1
    assert final == [[0, 1, 2, 3]] * 2
    with pytest.raises(UserError, match='too few'):
        run(tiny, tmp_path, learning_rates=[1e-1, 1e-2], options={'train_dataloader.dataset.indices': 1})
    reads.clear()
    repeated = dict(type='RepeatDataset', times=3, dataset=tiny.cfg().train_dataloader.dataset, _delete_=True)
    assert run(tiny, tmp_path, options={'train_dataloader.dataset': repeated}).record['images'] == 4
    assert sorted(reads[0]) == [0, 1, 2, 3]


def test_images_without_labels_choose_nothing(tiny, tmp_path):
    shutil.copytree(tiny.data, tmp_path / 'data')
    *_, last = sorted((tmp_path / 'data/annotations/training').iterdir())
    cv2.imwrite(str(last), 0 * cv2.imread(str(last), cv2.IMREAD_UNCHANGED))
    cfg = tiny.cfg({'train_dataloader.dataset.indices': [0, 3]})
    notes = prepare_probe(cfg, tiny.options(tmp_path / 'x', data_root=str(tmp_path / 'data')))
    with pytest.raises(UserError, match='too few'):
        probe(cfg, notes, ProbeSettings([1e-1, 1e-2], cache=None))


def test_a_fraction_has_the_images_that_fine_tuning_has(tiny, tmp_path):
    chosen = []
    for seed in range(3):
        given = dict(fraction=25, seed=seed)
        prepare_probe(cfg := tiny.cfg(), tiny.options(tmp_path / 'probe', **given))
        other, _ = tiny.prepare(tmp_path / 'train', **given)
        chosen.append(cfg.train_dataloader.dataset.indices)
        assert chosen[-1] == other.train_dataloader.dataset.indices
        assert len(chosen[-1]) == cfg.training_images.datasets[0].images < 4
    assert len({*map(tuple, chosen)}) > 1  # the seed decides


def test_an_interrupted_run_continues_with_the_features_in_the_cache(tiny, done, tmp_path, monkeypatch):
    write, written = module.write_atomic, []

    def interrupted(path, data):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(path)
        write(path, data)

    monkeypatch.setattr(module, 'write_atomic', interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(tiny, tmp_path)
    monkeypatch.setattr(module, 'write_atomic', lambda path, data: written.append(path) or write(path, data))
    first = run(tiny, tmp_path)
    assert len(written) == len(set(written)) == len([*(tmp_path / 'cache').iterdir()]) == 4
    monkeypatch.setattr(module.psutil, 'virtual_memory', lambda: SimpleNamespace(available=0))  # mapped files
    again = run(tiny, tmp_path)
    assert len(written) == 4 and same(first.weights, again.weights)
    assert first.record['seconds_per_image'] > 0 and again.record['seconds_per_image'] is None


def test_names_of_features_have_all_that_they_depend_on(tiny, tmp_path, monkeypatch):
    cfg = tiny.cfg(DROP_PATH)
    data = Path(shutil.copytree(tiny.data, tmp_path / 'data'))
    prepare_probe(cfg, tiny.options(tmp_path / 'x', data_root=str(data)))
    model, dataset = module.build_model(cfg), module._training_images(cfg)

    def names() -> list[str]:
        return [path.name for path in module._cache_paths(cfg, model, dataset, tmp_path)]

    first = names()
    found = [first]
    for change in (
        lambda: next(model.backbone.parameters()).data.add_(1),
        lambda: cfg.model.data_preprocessor.update(mean=[0.0] * 3),
        lambda: cfg.model.decode_head.update(in_index=[3]),
        lambda: cfg.train_dataloader.dataset.pipeline.insert(0, dict(type='Resize')),
        lambda: shutil.copy(*sorted((data / 'annotations/training').iterdir())[:2]),
    ):
        change()
        found.append(names())
    assert found[-1][0] == found[-2][0]
    info = dataset.get_data_info
    for changed in (dict(label_map={0: 1}), dict(reduce_zero_label=False)):
        monkeypatch.setattr(dataset, 'get_data_info', lambda i, changed=changed: {**info(i), **changed})
        found.append(names())
    assert len({row[1] for row in found}) == 8


def test_clearing_the_cache_and_damaged_files(tiny, done, tmp_path):
    folder = tmp_path / 'cache'
    folder.mkdir()
    old, mine = f'{0:032}.safetensors', 'backbone.safetensors'
    for name in (old, mine):
        (folder / name).write_text('x')
    run(tiny, tmp_path, clear_cache=True)
    (folder / mine).unlink()  # other files stay
    assert len([*folder.iterdir()]) == 4 and not (folder / old).exists()
    next(folder.iterdir()).write_bytes(b'x')
    with pytest.raises(UserError, match=r'not readable.*\n.*--clear-cache'):
        run(tiny, tmp_path)


@pytest.mark.parametrize('limit', ['max_cache', 'disk'])
@pytest.mark.parametrize('lacking', [0, 1])
def test_a_cache_is_bounded_and_its_size_known_before_it_is_written(limit, lacking, tmp_path, monkeypatch):
    cells = torch.rand(8, 16), torch.ones(16, 3, dtype=torch.int32)
    size = len(safetensors.torch.save(dict(zip(('features', 'labels'), cells, strict=True))))
    (tmp_path / f'{0:032}.safetensors').write_bytes(bytes(100))  # of another backbone
    free, most = 2**30 + 3 * size - lacking, 100 + 3 * size - lacking
    settings = ProbeSettings(cache=tmp_path, max_cache=(most if limit == 'max_cache' else 2**40) / 2**30)
    usage = SimpleNamespace(free=free if limit == 'disk' else 2**50)
    steps: list[str] = []
    monkeypatch.setattr(module.shutil, 'disk_usage', lambda path: usage)
    monkeypatch.setattr(module, 'announce', steps.append)
    monkeypatch.setattr(module, 'write_atomic', lambda path, data: steps.append(path.name))
    paths = [tmp_path / f'{i:032}.safetensors' for i in (1, 2, 3)]
    if lacking:
        with pytest.raises(UserError, match=r'GiB for 3 images.*\n.*--max-cache'):
            module._fill_cache(paths, lambda indices: iter([cells] * len(indices)), settings)
        assert not steps
    else:
        module._fill_cache(paths, lambda indices: iter([cells] * len(indices)), settings)
        assert 'GiB for 3 images' in steps[0] and steps[1:4] == [path.name for path in paths]


def test_features_are_in_memory_if_they_take_less_than_half_of_what_is_free(tmp_path, monkeypatch):
    paths = [tmp_path / str(i) for i in range(3)]
    for i, path in enumerate(paths):
        safetensors.torch.save_file(dict(features=torch.full((2, 4), float(i)), labels=torch.ones(4, 3)), path)
    size, loads, load = sum(path.stat().st_size for path in paths), [], module._load
    monkeypatch.setattr(module, '_load', lambda path: loads.append(path) or load(path))
    for available, count in ((2 * size, 3), (2 * size - 1, 4)):
        monkeypatch.setattr(module.psutil, 'virtual_memory', lambda: SimpleNamespace(available=available))  # noqa: B023
        loads.clear()
        read = module._cache_reader(paths)
        assert [features.mean() for indices in ([2, 0], [1, 1]) for features, _ in read(indices)] == [2, 0, 1, 1]
        assert len(loads) == count


def test_labels_of_padded_images_stay_at_their_pixels(tiny, tmp_path):
    """Images of 64 pixels, padded to 96 below and at the right: cells there have no labels."""
    cfg = tiny.cfg({'model.data_preprocessor.test_cfg': dict(size_divisor=96)})
    prepare_probe(cfg, tiny.options(tmp_path), 'last')
    model = module.build_model(cfg)
    [(features, counts)] = module._extract(model, module._training_images(cfg), 0, [0])
    assert features.shape == (64, 9) and counts.shape == (9, 8)
    assert (counts.sum(1) > 0).tolist() == [True, True, False] * 2 + [False] * 3


@pytest.mark.extras('timm')
def test_no_new_layer_is_between_a_vision_transformer_and_the_probe(tiny):
    vit = dict(type='replk_mm.TimmBackbone', model_name='vit_tiny_patch16_224', img_size=64, _delete_=True)
    module.use_linear_head(cfg := tiny.cfg({'model.backbone': vit}))
    assert not [*module.build_model(cfg, 'meta').backbone.neck.parameters()]
    assert cfg.model.decode_head.in_channels == [192] * 4


def random_cells(*cells: int, classes: int = 4) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Features of three channels, and pixels of all classes but the last."""
    counts = [torch.randint(0, 5, (n, classes)) * (torch.arange(classes) < classes - 1) for n in cells]
    return [(torch.randn(3, n), count.int()) for n, count in zip(cells, counts, strict=True)]


def test_miou_of_the_hold_out_by_a_count_of_pixels():
    layers, cells = module._Layers(LinearHead([3], 4, [0]), 2).eval(), random_cells(6, 30)
    for conv in layers.convs:
        torch.nn.init.normal_(conv.weight)
    for conv, found in zip(layers.convs, module._mean_iou(layers, cells, 'cpu'), strict=True):
        pairs = [
            (truth, int((conv.weight[:, :, 0, 0] @ features[:, i] / (1 + 1e-5) ** 0.5 + conv.bias).argmax()))
            for features, counts in cells
            for i in range(len(counts))
            for truth in range(4)
            for _ in range(counts[i, truth])
        ]
        iou = [pairs.count((k, k)) / sum(k in pair for pair in pairs) for k in range(3)]
        assert found == pytest.approx(100 * sum(iou) / 3)


def test_the_rate_falls_along_a_cosine():
    """With one gradient, a step of Adam moves a weight by the rate; that of the second of two is half the first."""
    head, [cell] = LinearHead([3], 4, [0]), random_cells(50)
    layers, _ = module._fit(head, lambda images: iter([cell]), ProbeSettings(epochs=2), 'cpu', [0], [1e-4, 1e-5])
    for conv, rate in zip(layers.convs, (1e-4, 1e-5), strict=True):
        assert (conv.weight - head.conv_seg.weight).abs().max().item() == pytest.approx(1.5 * rate, rel=0.02)


@pytest.mark.slow
def test_command(tiny, tmp_path, monkeypatch, capfd):
    args = [tiny.config, '--data-root', tiny.data, '--work-dir', tmp_path / 'a', '--cache', tmp_path / 'cache']
    assert tool_main('probe', *args, '--learning-rates', 0.01, 0.1, '--epochs', 20, monkeypatch=monkeypatch) == 0
    shown = capfd.readouterr().out
    assert f'linear.py {tmp_path}/a/linear.pth' in shown
    assert 'optim_wrapper' not in Config.fromfile(tmp_path / 'a/linear.py')
    assert tool_main('test', tmp_path / 'a/linear.py', tmp_path / 'a/linear.pth', monkeypatch=monkeypatch) == 0
    assert 'mIoU' in capfd.readouterr().out
    assert tool_main('probe', *args, monkeypatch=monkeypatch) == 0  # replaces its own files
    for name in ('linear.pth', 'probe.json'):
        (tmp_path / 'a' / name).unlink()
    (tmp_path / 'a/linear.py').write_text('mine')
    assert tool_main('probe', *args, monkeypatch=monkeypatch) == 2
