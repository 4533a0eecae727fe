"""Classifiers through mmpretrain: data checks, training, exact resume, test, reparameterization, benchmark."""

import copy
import json
import sys

import numpy as np
import pytest
import torch
from mmengine.config import Config
from PIL import Image
from tiny import ROOT

from replk_mm.commands import benchmark
from replk_mm.data.scenes.kinds import SCENES
from replk_mm.data.scenes.writer import write_demo_data
from replk_mm.data.subsets import class_presence
from replk_mm.engine.config import load_config, shorten_schedule
from replk_mm.engine.evaluate import evaluate
from replk_mm.engine.inference import build_for_inference, reparameterize_checkpoint
from replk_mm.engine.prepare import prepare_data, prepare_training
from replk_mm.engine.process import RunOptions
from replk_mm.engine.record import evaluation_record
from replk_mm.engine.train import train
from replk_mm.errors import UserError

pytestmark = pytest.mark.extras('mmpretrain')
TINY = {
    'replk-nano': dict(
        layers=[1, 1, 1, 1], channels=[8, 16, 24, 32], large_kernel_sizes=[7, 7, 7, 5], small_kernel=3, dw_ratio=1
    ),
    'convnext-atto': dict(depths=[1, 1, 1, 1], channels=[8, 16, 24, 32]),
}
LOADER = {
    f'{split}_dataloader.{key}': value
    for split in ('train', 'val', 'test')
    for key, value in (('num_workers', 0), ('persistent_workers', False))
}


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp('shapes') / 'data'
    write_demo_data(root, 'imagenet', train=64, val=32, size=(64, 64), kind=SCENES['shapes'])
    return root


def config(network: str, **more) -> Config:
    options = {
        'model.backbone.arch': dict(TINY[network], _delete_=True),
        'model.head.in_channels': 32,
        **LOADER,
        **more,
    }
    return load_config(str(ROOT / 'configs' / f'{network}_shapes.py'), options)


@pytest.mark.slow
@pytest.mark.parametrize('network', TINY)
def test_trained_and_merged_classifiers_have_the_accuracy_of_a_count(network, data, tmp_path):
    options = RunOptions(data_root=str(data), work_dir=str(tmp_path / 'w'), seed=0, device='cpu')
    cfg = config(network, **{'train_cfg.max_epochs': 1, 'optim_wrapper.optimizer.lr': 1e-2})
    notes = prepare_training(cfg, options)
    assert any('3 of 3 classes occur, 64 images' in note for note in notes)
    last = train(cfg, notes)
    assert last.name == 'epoch_1.pth'
    found = evaluate(config(network), str(last), RunOptions(str(data), work_dir=str(tmp_path / 't'), device='cpu'))
    # The network on the files, without mmpretrain's pipeline and metric.
    model = build_for_inference(config(network), last).model
    files = sorted((data / 'val').rglob('*.jpg'))
    names = sorted(path.name for path in (data / 'val').iterdir())
    pixels = torch.stack([torch.from_numpy(np.array(Image.open(file))) for file in files]).permute(0, 3, 1, 2)
    mean, std = torch.tensor([123.675, 116.28, 103.53]), torch.tensor([58.395, 57.12, 57.375])
    with torch.no_grad():
        features = model.backbone((pixels - mean[:, None, None]) / std[:, None, None])[-1]
        features = features.mean((2, 3)) if features.dim() == 4 else features
        guess = (features @ model.head.fc.weight.T + model.head.fc.bias).argmax(1).tolist()
    right = [names[g] == file.parent.name for g, file in zip(guess, files, strict=True)]
    assert found.metrics['accuracy/top1'] == pytest.approx(100 * np.mean(right))
    assert found.images == 32 and {of['instances'] for of in found.per_class.values()} == {10, 11}
    scores = found.statistics['accuracy/top1']
    assert scores.score()[0] == pytest.approx(100 * np.mean(right))
    merged = tmp_path / 'merged.pth'
    changes, _ = reparameterize_checkpoint(config(network), str(last), merged)
    assert bool(changes.merged) == (network == 'replk-nano')
    again = evaluate(config(network), str(merged), RunOptions(str(data), work_dir=str(tmp_path / 'm'), device='cpu'))
    assert again.metrics == found.metrics and again.per_class == found.per_class
    record = evaluation_record(config(network), str(merged), again, False)
    assert record['protocol']['pipeline'][-1] == {'type': 'PackInputs'} and json.dumps(record)


@pytest.mark.slow
def test_resumed_training_is_bit_identical(data, tmp_path):
    weights = []
    for name, parts in (('whole', (8,)), ('parts', (5, 8))):
        for i, iterations in enumerate(parts):
            cfg = config('replk-nano', **{'model.train_cfg.augments': [dict(type='Mixup', alpha=0.8)]})
            work_dir, resume = str(tmp_path / name), 'auto' if i else None
            shorten_schedule(cfg, 8)  # both parts have the schedule of the whole
            cfg.train_cfg.max_iters = iterations
            cfg.default_hooks.checkpoint.interval = iterations
            last = train(cfg, prepare_training(cfg, RunOptions(str(data), work_dir=work_dir, seed=3, resume=resume)))
        weights.append(torch.load(last, weights_only=True)['state_dict'])
    assert all(torch.equal(value, weights[1][key]) for key, value in weights[0].items())


def test_classes_of_the_folders(data):
    names = sorted(path.name for path in (data / 'val').iterdir())
    cfg = load_config(str(ROOT / 'configs' / 'replk31b_imagenet.py'))
    notes = prepare_data(cfg, RunOptions(str(data), classes='auto'), ('train', 'val'))
    assert list(cfg.train_dataloader.dataset.metainfo.classes) == names
    assert cfg.model.head.num_classes == cfg.model.data_preprocessor.num_classes == 3
    assert any('64 images, ' in note and '3 of 3 classes occur' in note for note in notes)
    presence, paths = class_presence(cfg.train_dataloader.dataset, 'mmpretrain')
    assert presence.sum(1).tolist() == [1] * 64 and presence.sum(0).tolist() == [
        len(list((data / 'train' / name).iterdir())) for name in names
    ]
    assert all(path.split('/')[1] == names[row.argmax()] for path, row in zip(paths, presence, strict=True))


@pytest.mark.parametrize(
    ('classes', 'message'), [(None, '1000'), ('a,b', r'specified classes \(2\)'), ('reversed', 'alphabetical order')]
)
def test_other_classes_than_the_folders_are_rejected(data, classes, message):
    cfg = load_config(str(ROOT / 'configs' / 'replk31b_imagenet.py'))
    if classes == 'reversed':
        classes = ','.join(sorted((path.name for path in (data / 'val').iterdir()), reverse=True))
    with pytest.raises(UserError, match=message):
        prepare_data(cfg, RunOptions(str(data), classes=classes), ('train', 'val'))


def test_labels_beyond_the_classes(data, tmp_path):
    """As in lists that number the classes from 1."""
    files = sorted((data / 'train').rglob('*.jpg'))
    (tmp_path / 'train.txt').write_text(
        ''.join(f'{file.relative_to(data)} {1 + i % 3}\n' for i, file in enumerate(files))
    )
    cfg = config('replk-nano')
    for loader in (cfg.train_dataloader, cfg.val_dataloader):
        loader.dataset.update(ann_file=str(tmp_path / 'train.txt'), data_prefix=dict(img_path=''))
    with pytest.raises(UserError, match=r'labels 3: the 3 names are for 0 to 2'):
        prepare_data(cfg, RunOptions(str(data)), ('train', 'val'))


def test_commands_for_other_tasks_reject_classifiers(data, tmp_path):
    from replk_mm.analysis.corruptions import RobustnessSettings
    from replk_mm.analysis.robustness import measure_robustness
    from replk_mm.bench.compare.results import read_result

    with pytest.raises(UserError, match='a classifier'):
        measure_robustness(config('replk-nano'), 'x.pth', RunOptions(str(data)), RobustnessSettings(), tmp_path)
    record = dict(metrics={'accuracy/top1': 50.0}, per_class=dict(disc={'accuracy/top1': 50.0, 'instances': 2}))
    others = dict(config='x.py', checkpoint={}, protocol={}, data={}, environment={})
    (tmp_path / 'metrics.json').write_text(json.dumps(record | others))
    with pytest.raises(UserError, match='result of a classifier'):
        read_result(str(tmp_path), 'A')


def test_missing_split(data, tmp_path):
    with pytest.raises(UserError, match='no such folder'):
        prepare_data(config('replk-nano'), RunOptions(str(data / 'train')), ('train',))


@pytest.mark.slow
def test_benchmark_of_a_merged_classifier(tmp_path, monkeypatch, capsys):
    """Training with Mixup too: the networks of a benchmark get equal batches."""
    path = tmp_path / 'tiny.py'
    cfg = copy.deepcopy(config('replk-nano', **{'model.train_cfg.augments': [dict(type='Mixup', alpha=0.8)]}))
    cfg.dump(path)
    out = ['--out', str(tmp_path / 'out'), '--repeats', '3', '--warmup', '0', '--no-memory', '--seconds', '1']
    monkeypatch.setattr(sys, 'argv', ['x.py', 'model', str(path), '--batch', '2', *out])
    assert benchmark.main() == 0
    assert 'images/s' in capsys.readouterr().out
    points = json.loads((tmp_path / 'out' / 'benchmark.json').read_text())['points']
    assert [point['mode'] for point in points] == ['inference', 'train']
    assert not any(row['equal'] is False for point in points for row in point['rows'])
