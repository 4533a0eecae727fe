"""What would fail after hours fails before the first iteration, and a rehearsal that succeeds leaves no trace."""
import errno

import pytest
import torch
from mmengine.evaluator import BaseMetric
from mmengine.fileio import LocalBackend
from mmengine.registry import METRICS, TRANSFORMS
from resume_cases import config_with_signals, differences
from test_exact_resume import EMA, RANDOM
from tiny import run_tool, tiny  # noqa: F401
from tiny_detector import detector  # noqa: F401

from replk_mm.engine.config import load_config
from replk_mm.engine.prepare import prepare_training
from replk_mm.engine.train import train
from replk_mm.errors import USER_ERROR_STATUS, UserError

# ruff: noqa: F811 (fixtures that come from another file)


def run(tiny, work, options=None, preflight=True, hook=None, metric=None):
    cfg = tiny.cfg(options)
    notes = prepare_training(cfg, tiny.options(work, max_iters=2, seed=1))
    cfg.val_evaluator = metric or cfg.val_evaluator
    if hook:
        cfg.custom_hooks = [hook]
    return train(cfg, notes, preflight)


def refused(tiny, work, options=None, **changes) -> str:
    """The message of a training that must end before its first iteration."""
    with pytest.raises(UserError) as info:
        run(tiny, work, options, **changes)
    assert not list(work.glob('*.pth')), 'nothing is left of the rehearsed checkpoint, and nothing was trained'
    return str(info.value)


def test_it_leaves_no_trace(tiny, tmp_path):
    config = config_with_signals(tmp_path, tiny.config, EMA, RANDOM)
    last = []
    for preflight in (True, False):
        cfg = load_config(str(config))
        cfg.experiment_name = f'trace{preflight}'
        notes = prepare_training(cfg, tiny.options(tmp_path / str(preflight), max_iters=3, seed=1))
        last.append(train(cfg, notes, preflight))
    assert differences(*last) == []
    assert [p.name for p in last[0].parent.glob('preflight*')] == []
    log = next((tmp_path / 'True').glob('*/*.log')).read_text()
    assert 'preflight: loss' in log
    assert log.count('classes are in the labels') == 1, 'the metrics of one batch are not to be read as a result'


def test_a_metric_that_nobody_reports(tiny, tmp_path):
    text = refused(tiny, tmp_path, {'default_hooks.checkpoint.save_best': 'miou'})
    assert text.startswith("CheckpointHook.save_best='miou': the validation reports no such metric, but aAcc, mIoU")
    text = refused(tiny, tmp_path, hook=dict(type='EarlyStoppingHook', monitor='accuracy'))
    assert text.startswith("EarlyStoppingHook.monitor='accuracy'")


@METRICS.register_module()
class BrokenMetric(BaseMetric):
    def process(self, data_batch, data_samples):
        self.results.append(0)

    def compute_metrics(self, results):
        raise KeyError('classes')


def test_a_metric_that_fails(tiny, tmp_path):
    text = refused(tiny, tmp_path, metric=dict(type='mmengine.BrokenMetric'))
    assert text.startswith("before the first iteration, validation: prediction and metrics of one batch: KeyError: 'classes'")


def test_a_validation_pipeline_that_fails(tiny, tmp_path):
    cfg = tiny.cfg()
    notes = prepare_training(cfg, tiny.options(tmp_path, max_iters=2))
    cfg.val_dataloader.dataset.pipeline[-1] = dict(type='PackSegInputs', meta_keys=('img_path',))
    with pytest.raises(UserError, match='before the first iteration, validation') as info:
        train(cfg, notes)
    assert "KeyError: 'img_shape'" in str(info.value)


def test_a_loss_that_is_no_number(tiny, tmp_path):
    text = refused(tiny, tmp_path, {'model.data_preprocessor.std': [0.0, 1.0, 1.0]})
    assert text.startswith('before the first iteration, training: loss and backward of one batch: the loss is nan')


def test_a_loss_that_crashes(tiny, tmp_path):
    text = refused(tiny, tmp_path, {'model.decode_head.loss_decode.class_weight': [1.0, 2.0]})
    assert text.startswith('before the first iteration, training: loss and backward of one batch: RuntimeError: ')
    assert 'weight tensor' in text


@TRANSFORMS.register_module()
class NeedsAFile:
    def __call__(self, results):
        raise FileNotFoundError(errno.ENOENT, 'No such file or directory', 'depth/1.png')


def test_a_file_that_a_step_of_the_pipeline_needs(tiny, tmp_path):
    cfg, notes = tiny.prepare(tmp_path, 2)
    cfg.train_dataloader.dataset.pipeline.insert(2, dict(type='mmengine.NeedsAFile'))
    with pytest.raises(UserError, match=r'before the first iteration, training: .*: FileNotFoundError: .*1.png') as info:
        train(cfg, notes)


def test_a_disk_that_is_full(tiny, tmp_path, monkeypatch):
    def put(self, content, path):
        raise OSError(errno.ENOSPC, 'No space left on device', str(path))

    monkeypatch.setattr(LocalBackend, 'put', put)
    text = refused(tiny, tmp_path)
    assert 'preflight.pth' in text and 'No space left on device' in text


def test_without_it_the_same_fails_later(tiny, tmp_path):
    with pytest.raises(Exception, match='miou'):  # mmengine's own KeyError
        run(tiny, tmp_path, {'default_hooks.checkpoint.save_best': 'miou'}, preflight=False)
    assert (tmp_path / 'iter_2.pth').is_file()


def test_gradients_and_statistics_are_as_before(tiny, tmp_path, monkeypatch):
    from mmengine.runner import Runner

    from replk_mm.engine import preflight
    seen = {}
    rehearse = preflight.PreflightHook.before_train

    def before_train(self, runner: Runner):
        before = {key: value.clone() for key, value in runner.model.state_dict().items()}
        rehearse(self, runner)
        seen.update(same=all(torch.equal(before[key], value) for key, value in runner.model.state_dict().items()),
                    gradients=[p.grad for p in runner.model.parameters() if p.grad is not None],
                    state=list(runner.optim_wrapper.optimizer.state), training=runner.model.training)

    monkeypatch.setattr(preflight.PreflightHook, 'before_train', before_train)
    run(tiny, tmp_path)
    assert seen['same'] and not seen['gradients'] and not seen['state'] and seen['training']


@pytest.mark.slow
def test_the_command_says_it_without_a_traceback(tiny, tmp_path):
    args = [tiny.config, '--data-root', tiny.data, '--work-dir', tmp_path, '--device', 'cpu', '--max-iters', 1]
    found = run_tool('train', *args, '--cfg-options', 'default_hooks.checkpoint.save_best=miou')
    assert found.returncode == USER_ERROR_STATUS
    assert found.stderr.strip().splitlines()[-2].startswith("error: CheckpointHook.save_best='miou'")
    assert 'Traceback' not in found.stderr
    assert run_tool('train', *args, '--no-preflight').returncode == 0


def test_a_detector_is_rehearsed(detector, tmp_path):
    cfg = detector.cfg()
    notes = prepare_training(cfg, detector.options(tmp_path, max_iters=1, seed=1))
    last = train(cfg, notes)
    log = next(tmp_path.glob('*/*.log')).read_text()
    assert last.name == 'iter_1.pth'
    assert 'preflight: loss' in log
    assert 'coco/bbox_mAP' in log
