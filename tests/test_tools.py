"""From training to a merged network and its pictures, through the functions behind the commands, then the commands."""
import dataclasses
import json
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from tiny import ROOT, run_tool, tiny, tool_environment, trained  # noqa: F401

from replk_mm import checkpoints
from replk_mm.engine import merge, results, runner
from replk_mm.engine.evaluate import evaluate
from replk_mm.engine.merge import reparameterize_checkpoint
from replk_mm.engine.predict import label_map, load_trained, predict
from replk_mm.engine.prepare import prepare_training
from replk_mm.engine.train import train
from replk_mm.equivalence import Difference
from replk_mm.errors import UserError

# ruff: noqa: F811 (fixtures that come from another file)
TOOLS = ['train', 'test', 'predict', 'reparameterize', 'convert_checkpoint', 'compare', 'erf', 'shape_bias', 'suite', 'report']


@pytest.fixture(scope='module')
def merged(tiny, trained, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp('merged') / 'merged.pth'
    changes, differences = reparameterize_checkpoint(tiny.cfg(), str(trained), out)
    assert len(changes.merged) == 4
    assert all(d.ok for d in differences)
    return out


@pytest.fixture(scope='module')
def plain(tiny, trained, tmp_path_factory):
    """The trained checkpoint's test, with label maps."""
    out = tmp_path_factory.mktemp('plain')
    cfg = tiny.cfg()
    return cfg, evaluate(cfg, str(trained), tiny.options(out), predictions=out / 'predictions'), out / 'predictions'


def read(path) -> dict:
    return torch.load(path, map_location='cpu', weights_only=False)


# -- train, merge, test -----------------------------------------------------------------------------------------------
def test_tiny_network_has_learned_something(plain):
    assert plain[1].metrics['mIoU'] > 5
    assert max(c['IoU'] for c in plain[1].per_class.values()) > 30
    assert plain[1].images == 2


def test_metric_equals_a_count_over_the_written_label_maps(tiny, plain):
    """The PNG files hold ids of the data set's own numbering: equal to its label files where the network is right."""
    _, result, folder = plain
    files = sorted(folder.iterdir())
    assert [f.name for f in files] == ['demo_val_000000.png', 'demo_val_000001.png']
    labels = [np.asarray(Image.open(tiny.data / 'annotations/validation' / f.name)) for f in files]
    found = [np.asarray(Image.open(f)) for f in files]
    label, found = (np.concatenate([m.ravel() for m in maps]) for maps in (labels, found))
    assert set(np.unique(found)) <= set(range(1, 9))
    keep = label > 0
    label, found = label[keep], found[keep]
    iou = [100 * np.sum((label == c) & (found == c)) / np.sum((label == c) | (found == c))
           for c in range(1, 9) if np.any((label == c) | (found == c))]
    assert result.metrics['mIoU'] == pytest.approx(np.mean(iou), abs=0.01)
    assert result.metrics['aAcc'] == pytest.approx(100 * np.mean(label == found), abs=0.01)


def test_merged_checkpoint_tests_the_same(tiny, plain, merged, tmp_path):
    again = evaluate(tiny.cfg(), str(merged), tiny.options(tmp_path))
    assert again.metrics['mIoU'] == pytest.approx(plain[1].metrics['mIoU'], abs=0.01)
    assert again.per_class.keys() == plain[1].per_class.keys()
    for name, figures in plain[1].per_class.items():
        assert again.per_class[name]['IoU'] == pytest.approx(figures['IoU'], abs=0.05)
    assert again.changes is None


def test_merging_on_the_fly_tests_the_same(tiny, trained, plain, tmp_path):
    again = evaluate(tiny.cfg(), str(trained), tiny.options(tmp_path), reparam=True)
    assert again.metrics['mIoU'] == pytest.approx(plain[1].metrics['mIoU'], abs=0.01)
    assert len(again.changes.merged) == 4
    assert len(again.changes.folded) > 20


def test_merged_file_is_small_and_says_what_it_is(trained, merged):
    before, after = read(trained), read(merged)
    assert 'optimizer' in before
    assert set(after) == {'meta', 'state_dict'}
    assert merged.stat().st_size < 0.5 * trained.stat().st_size
    record = after['meta']['replk_mm']['reparameterized']
    assert record['merge'] is True
    assert record['fold'] is True
    assert record['source_sha256'] == checkpoints.sha256(trained)
    assert {d['dtype'] for d in record['differences']} == {'torch.float32', 'torch.float64'}
    assert any('.lkb_reparam.' in key for key in after['state_dict'])
    assert not any('lkb_origin' in key or 'running_mean' in key for key in after['state_dict'])
    torch.load(merged, weights_only=True)


def test_merging_twice_changes_nothing(tiny, merged, tmp_path):
    out = tmp_path / 'again.pth'
    changes, _ = reparameterize_checkpoint(tiny.cfg(), str(merged), out)
    assert not changes.merged
    once, twice = read(merged)['state_dict'], read(out)['state_dict']
    assert once.keys() == twice.keys()
    assert all(torch.equal(once[key], twice[key]) for key in once)
    assert read(out)['meta']['replk_mm']['reparameterized']['merge'] is True


def test_merging_onto_the_input_is_refused(tiny, trained):
    before = trained.read_bytes()
    with pytest.raises(UserError, match='the input itself'):
        reparameterize_checkpoint(tiny.cfg(), str(trained), trained.parent / '..' / trained.parent.name / trained.name)
    assert trained.read_bytes() == before


def test_failing_proof_writes_nothing(tiny, trained, tmp_path, monkeypatch):
    bad = [Difference(torch.float32, 1., 1., 1e-4)]
    monkeypatch.setattr(merge, 'compare', lambda *args: bad)
    with pytest.raises(UserError, match='nothing was written') as info:
        reparameterize_checkpoint(tiny.cfg(), str(trained), tmp_path / 'x' / 'out.pth')
    assert str(trained) in str(info.value).splitlines()[0]
    assert 'DIFFERENT' in str(info.value)
    assert list(tmp_path.iterdir()) == []


def test_proof_that_is_no_number_fails():
    assert not Difference(torch.float32, float('nan'), float('nan'), 1e-4).ok


def test_test_time_augmentation_runs_and_changes_the_result(tiny, trained, plain, tmp_path):
    cfg = tiny.cfg()
    found = evaluate(cfg, str(trained), tiny.options(tmp_path), tta=True)
    assert found.metrics['mIoU'] > 5
    assert found.metrics != plain[1].metrics
    protocol = results.protocol(cfg, True)
    assert protocol['tta'] is True
    assert protocol['pipeline'] == tiny.cfg().tta_pipeline, 'without the checks around its loading steps'


def test_augmentation_that_the_config_does_not_have(tiny, trained, tmp_path):
    cfg = tiny.cfg()
    cfg.pop('tta_model')
    with pytest.raises(UserError, match='--tta'):
        evaluate(cfg, str(trained), tiny.options(tmp_path), tta=True)


def test_record_is_strict_json_with_all_that_figures_depend_on(tiny, trained, plain, tmp_path):
    cfg, result, _ = plain
    result = dataclasses.replace(result, metrics={**result.metrics, 'nothing': float('nan'), 'one': np.float32(1)})
    results.write(results.record(cfg, str(trained), result, False), tmp_path / 'deep' / 'metrics.json')

    def refuse(constant):
        raise AssertionError(f'{constant} is no JSON')

    found = json.loads((tmp_path / 'deep' / 'metrics.json').read_text(), parse_constant=refuse)
    assert found['metrics']['nothing'] is None
    assert found['metrics']['one'] == 1
    assert found['metrics']['mIoU'] == pytest.approx(result.metrics['mIoU'])
    assert found['checkpoint']['sha256'] == checkpoints.sha256(trained)
    assert found['checkpoint']['iteration'] == 30
    assert found['protocol']['mode'] == 'whole'
    assert found['protocol']['tta'] is False
    steps = [step['type'] for step in found['protocol']['pipeline']]
    assert steps == ['LoadImageFromFile', 'LoadAnnotations', 'PackSegInputs']
    assert found['data'] == dict(root=str(tiny.data), images=2)
    assert found['reparameterized'] is None
    assert found['environment']['torch'] == torch.__version__
    assert found['per_class'].keys() == result.per_class.keys()


def test_record_that_cannot_be_written(tmp_path):
    (tmp_path / 'file').write_text('')
    with pytest.raises(UserError, match='cannot be written'):
        results.write({}, tmp_path / 'file' / 'metrics.json')


def test_bfloat16_trains(tiny, tmp_path):
    cfg, notes = tiny.prepare(tmp_path, 2, amp='bf16')
    assert any('bfloat16' in n for n in notes)
    autocast = []
    from mmseg.models import EncoderDecoder
    forward = EncoderDecoder.extract_feat

    def watch(self, x):
        autocast.append((torch.is_autocast_enabled('cpu'), torch.get_autocast_dtype('cpu')))
        return forward(self, x)

    EncoderDecoder.extract_feat = watch
    try:
        last = train(cfg, notes)
    finally:
        EncoderDecoder.extract_feat = forward
    assert autocast[:2] == [(True, torch.bfloat16)] * 2
    losses = re.findall(r' loss: (\S+)', next(tmp_path.rglob('*.log')).read_text())
    assert len(losses) == 2
    assert all(np.isfinite(float(loss)) for loss in losses)
    assert all(v.isfinite().all() for v in read(last)['state_dict'].values())


# -- resuming ---------------------------------------------------------------------------------------------------------
def watched(tiny, work_dir, monkeypatch, **changes):
    """Train up to the end of a schedule of 6; the images and the rate of every step, and the last checkpoint."""
    from mmengine.hooks import Hook
    steps = []

    class Watch(Hook):
        def before_train_iter(self, runner, batch_idx, data_batch=None):
            rate = runner.optim_wrapper.get_lr()['lr'][0]
            steps.append((runner.iter, [Path(s.img_path).name for s in data_batch['data_samples']], rate))

    stop = changes.pop('stop', None)
    cfg, notes = tiny.prepare(work_dir, 6, **changes)
    cfg.default_hooks.checkpoint.interval = 3
    cfg.train_cfg.val_interval = 6

    class Stop(Hook):
        def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
            if runner.iter + 1 == stop:
                runner.train_loop.stop_training = True

    build = runner.Runner.from_cfg

    def with_hooks(cfg):
        made = build(cfg)
        made.register_hook(Watch(), 'LOW')
        made.register_hook(Stop(), 'LOWEST')
        return made

    monkeypatch.setattr(runner.Runner, 'from_cfg', with_hooks)
    last = train(cfg, notes)
    monkeypatch.undo()
    return steps, last, notes


def test_resumed_run_goes_on_as_if_it_had_not_stopped(tiny, tmp_path, monkeypatch):
    straight, last, _ = watched(tiny, tmp_path / 'straight', monkeypatch, seed=3)
    first, middle, _ = watched(tiny, tmp_path / 'halves', monkeypatch, seed=3, stop=3)
    assert [s[0] for s in first] == [0, 1, 2]
    assert middle.name == 'iter_3.pth'
    second, end, notes = watched(tiny, tmp_path / 'halves', monkeypatch, resume='auto')
    assert any('iter_3.pth' in n and 'iteration 3' in n for n in notes)
    assert [s[0] for s in second] == [3, 4, 5]
    assert len({name for s in straight for name in s[1]}) > 2
    for a, b in zip(straight, first + second, strict=True):
        assert a[1] == b[1]
        assert a[2] == pytest.approx(b[2], rel=1e-9)
    assert (last.name, end.name) == ('iter_6.pth', 'iter_6.pth')
    one, other = read(last), read(end)
    assert one['meta']['iter'] == other['meta']['iter'] == 6
    assert one['meta']['seed'] == other['meta']['seed'] == 3
    for a, b in zip(one['optimizer']['state'].values(), other['optimizer']['state'].values(), strict=True):
        assert a['step'] == b['step'] == 6
    assert [s['last_step'] for s in one['param_schedulers']] == [s['last_step'] for s in other['param_schedulers']]


def test_resume_with_nothing_there_starts_anew_and_says_so(tiny, tmp_path):
    _, notes = tiny.prepare(tmp_path / 'new', 2, resume='auto')
    assert any('starting anew' in n and str(tmp_path / 'new') in n for n in notes)


def test_resume_of_a_merged_checkpoint_is_refused(tiny, merged, tmp_path):
    with pytest.raises(UserError, match='for inference') as info:
        tiny.prepare(tmp_path, 2, resume=str(merged))
    assert str(merged) in str(info.value).splitlines()[0]


def test_resume_from_a_missing_checkpoint_is_refused(tiny, tmp_path):
    with pytest.raises(UserError, match='gone.pth: no such checkpoint'):
        tiny.prepare(tmp_path, 2, resume=str(tmp_path / 'gone.pth'))


# -- pictures ---------------------------------------------------------------------------------------------------------
@pytest.fixture(scope='module')
def segmentor(tiny, trained):
    return load_trained(tiny.cfg(), str(trained), 'cpu')


def test_prediction_of_an_image_equals_the_test_run(tiny, segmentor, plain):
    path = tiny.data / 'images/validation/demo_val_000000.jpg'
    ((found_path, image, prediction),) = predict(segmentor, [str(path)])
    labels = label_map(prediction)
    assert found_path == path
    assert np.array_equal(image, cv2.imread(str(path)))
    assert labels.shape == image.shape[:2] == (64, 64)
    written = np.asarray(Image.open(plain[2] / 'demo_val_000000.png')).astype(int)
    assert np.mean(labels == written - 1) > 0.999, 'the files of the test hold ids from 1'


def test_merged_network_predicts_the_same(tiny, trained, merged, segmentor):
    path = str(tiny.data / 'images/training/demo_train_000001.jpg')
    ((_, _, found),) = predict(segmentor, [path])
    for checkpoint, reparam in ((merged, False), (trained, True)):
        other = load_trained(tiny.cfg(), str(checkpoint), 'cpu', reparam)
        ((_, _, again),) = predict(other, [path])
        assert np.mean(label_map(found) == label_map(again)) > 0.999


@pytest.mark.parametrize('size', [(50, 90), (131, 64)])
def test_prediction_has_the_size_of_the_image(segmentor, tmp_path, size):
    noise = np.random.default_rng(0).integers(0, 255, (*size, 3), np.uint8)
    cv2.imwrite(str(tmp_path / 'x.png'), noise)
    ((_, image, found),) = predict(segmentor, [str(tmp_path / 'x.png')])
    assert image.shape == (*size, 3)
    assert label_map(found).shape == size


def test_classes_and_colours_come_with_the_segmentor(segmentor):
    assert list(segmentor.dataset_meta['classes'])[:2] == ['sky', 'ground']
    assert len(segmentor.dataset_meta['palette']) == 8


def test_classes_without_names_get_some(tiny, trained, tmp_path):
    bare = read(trained)
    torch.save(dict(state_dict=bare['state_dict']), tmp_path / 'bare.pth')
    cfg = tiny.cfg()
    cfg.test_dataloader.dataset.pop('metainfo')
    meta = load_trained(cfg, str(tmp_path / 'bare.pth'), 'cpu').dataset_meta
    assert len(meta['classes']) == len(meta['palette']) == 8


@pytest.mark.parametrize(('content', 'said'), [(None, 'no such image'), (b'', 'empty'), (b'text', 'unknown format')])
def test_bad_images_are_named(segmentor, tmp_path, content, said):
    path = tmp_path / 'x.jpg'
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=said) as info:
        list(predict(segmentor, [str(path)]))
    assert str(info.value).startswith(str(path))
    with pytest.raises(UserError, match='folder'):
        list(predict(segmentor, [str(tmp_path)]))


# -- commands ---------------------------------------------------------------------------------------------------------
def tool_main(name: str, *args, monkeypatch) -> int:
    """Run a command in this process."""
    import importlib.util
    spec = importlib.util.spec_from_file_location(f'tool_{name}', ROOT / 'tools' / f'{name}.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(sys, 'argv', [f'{name}.py', *map(str, args)])
    return module.main()


@pytest.mark.parametrize('name', TOOLS)
def test_help_shows_an_example(name, monkeypatch, capsys):
    with pytest.raises(SystemExit) as info:
        tool_main(name, '--help', monkeypatch=monkeypatch)
    assert info.value.code == 0
    text = capsys.readouterr().out
    assert f'example:\n  python tools/{name}.py ' in text


@pytest.mark.parametrize('name', TOOLS)
def test_missing_arguments_exit_with_2(name, monkeypatch, capsys):
    with pytest.raises(SystemExit) as info:
        tool_main(name, monkeypatch=monkeypatch)
    assert info.value.code == 2


MISTAKES = {
    'train': [['{cfg}', '--data-root', '{tmp}/gone'], ['{tmp}/no.py'], ['{cfg}', '--device', 'tpu'],
              ['{cfg}', '--data-root', '{data}', '--work-dir', '{tmp}/w', '--resume', '{tmp}/gone.pth'],
              ['{cfg}', '--data-root', '{data}', '--work-dir', '{file}/w'], ['{cfg}', '--amp', 'fp16', '--device', 'cpu'],
              ['{cfg}', '--data-root', '{data}', '--work-dir', '{tmp}/w', '--pretrained', '{tmp}/gone.pth'],
              ['{cfg}', '--cfg-options', 'model.backbone.with_pc=1']],
    'test': [['{cfg}', '{tmp}/gone.pth'], ['{cfg}', '{file}'], ['{cfg}', '{ckpt}', '--data-root', '{tmp}/gone'],
             ['{cfg}', '{ckpt}', '--out', '{file}/out']],
    'predict': [['{cfg}', '{tmp}/gone.pth', '{tmp}/x.jpg', '--out', '{tmp}/out'],
                ['{cfg}', '{ckpt}', '{tmp}/x.jpg', '--out', '{tmp}/out'],
                ['{cfg}', '{ckpt}', '{tmp}/x.jpg', '--out', '{file}/out']],
    'reparameterize': [['{cfg}', '{tmp}/gone.pth', '{tmp}/out.pth'], ['{cfg}', '{ckpt}', '{ckpt}'],
                       ['{cfg}', '{ckpt}', '{file}/out.pth']],
    'convert_checkpoint': [['{tmp}/gone.pth', '{tmp}/out.pth'], ['{file}', '{tmp}/out.pth'], ['{ckpt}', '{file}/out.pth']],
}


@pytest.mark.parametrize(('name', 'args'), [(name, args) for name, cases in MISTAKES.items() for args in cases])
def test_mistakes_exit_with_2_and_one_message(name, args, tiny, trained, tmp_path, monkeypatch, capfd):
    (tmp_path / 'file').write_text('not a checkpoint')
    known = dict(cfg=tiny.config, data=tiny.data, tmp=tmp_path, file=tmp_path / 'file', ckpt=trained)
    code = tool_main(name, *(a.format(**known) for a in args), monkeypatch=monkeypatch)
    error = capfd.readouterr().err
    assert code == 2
    assert 'error: ' in error
    assert 'Traceback' not in error


@pytest.mark.parametrize('args', [['--max-iters', '0'], ['--max-iters', 'x'], ['--seed', '-1'], ['--seed', '99999999999'],
                                  ['--amp', 'int8'], ['--cfg-options', 'model.backbone.arch']])
def test_values_out_of_range_are_refused_by_name(args, tiny, monkeypatch, capsys):
    with pytest.raises(SystemExit) as info:
        tool_main('train', tiny.config, *args, monkeypatch=monkeypatch)
    assert info.value.code == 2
    assert args[0] in capsys.readouterr().err


@pytest.mark.parametrize('shape', [['0', '64'], ['64', '-1'], ['a', 'b']])
def test_shape_of_the_proof_must_have_pixels(shape, monkeypatch, capsys):
    with pytest.raises(SystemExit) as info:
        tool_main('reparameterize', 'a.py', 'b.pth', 'c.pth', '--shape', *shape, monkeypatch=monkeypatch)
    assert info.value.code == 2
    assert '--shape' in capsys.readouterr().err


def test_pictures_of_one_name_do_not_overwrite_each_other(tiny, trained, tmp_path, monkeypatch):
    sources = []
    for i, name in enumerate(['a/x.png', 'b/x.png', 'c/x_2.png']):
        path = tmp_path / name
        path.parent.mkdir()
        cv2.imwrite(str(path), np.full((40 + i, 64, 3), 50, np.uint8))
        sources.append(path)
    out = tmp_path / 'out'
    assert tool_main('predict', tiny.config, trained, *sources, '--out', out, '--device', 'cpu', monkeypatch=monkeypatch) == 0
    labels, overlays = sorted(out.glob('*_labels.png')), sorted(out.glob('*_overlay.png'))
    assert sorted(Image.open(f).size for f in labels) == [(64, 40), (64, 41), (64, 42)]
    assert sorted(Image.open(f).size for f in overlays) == [(64 + 210, 40), (64 + 210, 41), (64 + 210, 42)]


def test_picture_that_cannot_be_written_is_an_error(tiny, trained, tmp_path, monkeypatch, capfd):
    (tmp_path / 'out' / 'demo_val_000000_overlay.png').mkdir(parents=True)
    image = tiny.data / 'images/validation/demo_val_000000.jpg'
    code = tool_main('predict', tiny.config, trained, image, '--out', tmp_path / 'out', '--device', 'cpu',
                     monkeypatch=monkeypatch)
    assert code == 2
    assert 'demo_val_000000_overlay.png' in capfd.readouterr().err


def test_converting_onto_the_input_is_refused(trained, monkeypatch, capsys):
    before = trained.stat().st_mtime_ns
    assert tool_main('convert_checkpoint', trained, trained, monkeypatch=monkeypatch) == 2
    assert 'is the input itself' in capsys.readouterr().err and trained.stat().st_mtime_ns == before


def test_converted_file_is_still_known_as_merged(tiny, merged, plain, tmp_path, monkeypatch):
    out = tmp_path / 'converted.pth'
    assert tool_main('convert_checkpoint', merged, out, monkeypatch=monkeypatch) == 0
    again = evaluate(tiny.cfg(), str(out), tiny.options(tmp_path))
    assert again.metrics['mIoU'] == pytest.approx(plain[1].metrics['mIoU'], abs=0.01)


def test_converting_to_the_authors_names_and_back(trained, tmp_path, monkeypatch, capsys):
    there, back = tmp_path / 'official.pth', tmp_path / 'back.pth'
    assert tool_main('convert_checkpoint', trained, there, '--to', 'official', monkeypatch=monkeypatch) == 0
    assert tool_main('convert_checkpoint', there, back, monkeypatch=monkeypatch) == 0
    assert 'RepLKNet' in capsys.readouterr().out
    first, last = read(trained)['state_dict'], read(back)['state_dict']
    assert first.keys() == last.keys()
    assert all(torch.equal(first[key], last[key]) for key in first)


@pytest.mark.slow
def test_commands_from_training_to_a_merged_test(tiny, tmp_path):
    work, merged = tmp_path / 'work', tmp_path / 'merged.pth'
    place = ['--data-root', tiny.data, '--work-dir', work]
    found = run_tool('train', tiny.config, *place, '--max-iters', 4, '--seed', 1)
    assert found.returncode == 0, found.stderr
    last = work / 'iter_4.pth'
    assert f'trained: {last}' in found.stdout
    found = run_tool('reparameterize', tiny.config, last, merged)
    assert found.returncode == 0, found.stderr
    assert '4 parallel kernels merged' in found.stdout
    assert 'equal' in found.stdout
    found = run_tool('test', tiny.config, merged, *place, '--out', tmp_path / 'out')
    assert found.returncode == 0, found.stderr
    assert 'mIoU' in found.stdout.splitlines()[-2]
    assert json.loads((tmp_path / 'out' / 'metrics.json').read_text())['reparameterized'] == 'in the checkpoint'
    assert len(list((tmp_path / 'out' / 'predictions').iterdir())) == 2
    found = run_tool('train', tmp_path / 'no.py')
    assert found.returncode == 2
    assert 'Traceback' not in found.stderr


def start_training(tiny, work: Path, *args) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, str(ROOT / 'tools/train.py'), str(tiny.config), '--data-root', str(tiny.data),
         '--work-dir', str(work), '--cfg-options', 'default_hooks.checkpoint.interval=5',
         'default_hooks.checkpoint.max_keep_ckpts=2',
         'train_cfg.val_interval=2000', *args],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=tool_environment())


def wait_for(path: Path, process: subprocess.Popen, seconds: float = 90) -> None:
    end = time.monotonic() + seconds
    while not path.exists():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < end, f'{path} did not appear'
        time.sleep(0.05)


@pytest.mark.slow
def test_killed_training_goes_on_from_its_last_checkpoint(tiny, tmp_path):
    process = start_training(tiny, tmp_path)
    wait_for(tmp_path / 'iter_10.pth', process)
    process.kill()
    process.communicate()
    cfg = tiny.cfg({'train_cfg.max_iters': 40, 'default_hooks.checkpoint.interval': 40})
    notes = prepare_training(cfg, tiny.options(tmp_path, resume='auto'))
    resumed = next(n for n in notes if n.startswith('resume: '))
    iteration = int(resumed.split('iteration ')[1].split(',')[0])
    assert iteration >= 5
    assert f'iter_{iteration}.pth' in resumed
    assert train(cfg, notes) == tmp_path / 'iter_40.pth'
    assert next(iter(read(tmp_path / 'iter_40.pth')['optimizer']['state'].values()))['step'] == 40


@pytest.mark.slow
def test_interrupted_training_says_how_to_go_on(tiny, tmp_path):
    process = start_training(tiny, tmp_path)
    wait_for(tmp_path / 'last_checkpoint', process)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130, error
    assert 'Traceback' not in error
    assert '--resume' in error
    assert 'stopped at iteration' in error
    assert (tmp_path / 'last_checkpoint').read_text().strip() in error


DISTRIBUTED_CONFIG = """
_base_ = {base!r}
custom_imports = dict(imports=['tiny_record'], allow_failed_imports=False)
custom_hooks = [dict(type='RecordHook', out={out!r})]
"""
RECORD_HOOK = """
import json, pathlib
from mmengine.dist import get_rank
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
@HOOKS.register_module()
class RecordHook(Hook):
    def __init__(self, out):
        self.out, self.images = out, []
    def before_train_iter(self, runner, batch_idx, data_batch=None):
        self.images += [pathlib.Path(s.img_path).name for s in data_batch['data_samples']]
    def after_train(self, runner):
        weights = [float(p.double().sum()) for p in runner.model.parameters()]
        rate = runner.optim_wrapper.get_lr()['lr']
        text = json.dumps(dict(images=self.images, weights=weights, rate=rate))
        pathlib.Path(self.out, f'rank{get_rank()}.json').write_text(text)
"""


@pytest.mark.slow
def test_two_processes_train_one_network(tiny, tmp_path):
    (tmp_path / 'tiny_record.py').write_text(RECORD_HOOK)
    (tmp_path / 'two.py').write_text(DISTRIBUTED_CONFIG.format(base=str(tiny.config), out=str(tmp_path)))
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]

    def launch(tool, *args):
        return subprocess.run(
            [sys.executable, '-m', 'torch.distributed.run', '--nproc-per-node', '2', '--master-port', str(port),
             str(ROOT / 'tools' / f'{tool}.py'), str(tmp_path / 'two.py'), *map(str, args), '--data-root', str(tiny.data),
             '--work-dir', str(tmp_path / 'work'), '--device', 'cpu', '--launcher', 'pytorch'],
            capture_output=True, text=True, timeout=170, check=False,
            env=tool_environment(PYTHONPATH=f'{ROOT}:{tmp_path}'))

    found = launch('train', '--max-iters', 2)
    assert found.returncode == 0, found.stderr[-3000:]
    ranks = [json.loads((tmp_path / f'rank{r}.json').read_text()) for r in range(2)]
    assert ranks[0]['weights'] == ranks[1]['weights']
    assert ranks[0]['rate'] == ranks[1]['rate']
    assert len(ranks[0]['images']) == len(ranks[1]['images']) == 4
    assert set(ranks[0]['images'][:2]).isdisjoint(ranks[1]['images'][:2]), 'the first four images are one pass'
    found = launch('test', tmp_path / 'work' / 'iter_2.pth')
    assert found.returncode == 0, found.stderr[-3000:]
    assert found.stdout.count('2 images in') == 1
    assert 'mIoU' in found.stdout
