"""What would fail after hours fails in the dry run, and one that succeeds leaves no trace."""

import errno
import re
from types import SimpleNamespace

import pytest
import torch
from mmengine.evaluator import BaseMetric
from mmengine.fileio import LocalBackend
from mmengine.model import BaseModule
from mmengine.registry import METRICS, MODELS, TRANSFORMS
from resume_cases import EMA, RANDOM, config_with_signals, differences
from tiny import run_tool, tiny  # noqa: F401
from tiny_detector import detector  # noqa: F401

from replk_mm.engine.config import load_config
from replk_mm.engine.preflight import _estimate
from replk_mm.engine.prepare import prepare_training
from replk_mm.engine.train import train
from replk_mm.errors import UserError

# ruff: noqa: F811 (fixtures that come from another file)
pytestmark = pytest.mark.slow
MEAN_STD = ('mean', 'std')
LOSS = 'dry run, loss and backward of one batch: '


def run(tiny, work, options=None, preflight=True, hook=None, metric=None):
    cfg = tiny.cfg(options)
    notes = prepare_training(cfg, tiny.options(work, max_iters=2, seed=1))
    cfg.val_evaluator = metric or cfg.val_evaluator
    cfg.custom_hooks = [hook] if hook else []
    return train(cfg, notes, preflight)


@METRICS.register_module()
class BrokenMetric(BaseMetric):
    def process(self, data_batch, data_samples):
        self.results.append(0)

    def compute_metrics(self, results):
        raise KeyError('classes')


@TRANSFORMS.register_module()
class NeedsAFile:
    def __init__(self, **kwargs):
        pass

    def __call__(self, results):
        raise FileNotFoundError(errno.ENOENT, 'No such file or directory', 'depth/1.png')


def test_it_leaves_no_trace(tiny, tmp_path):
    config = config_with_signals(tmp_path, tiny.config, EMA, RANDOM)
    last = []
    for preflight in (True, False):
        cfg = load_config(str(config))
        cfg.experiment_name = f'trace{preflight}'
        notes = prepare_training(cfg, tiny.options(tmp_path / str(preflight), max_iters=3, seed=1))
        last.append(train(cfg, notes, preflight))
    assert differences(*last) == []
    assert not list(last[0].parent.glob('preflight*'))
    log = next((tmp_path / 'True').glob('*/*.log')).read_text()
    found = re.search(r'dry run: loss [\d.]+; peak memory of the process ([\d.]+) GiB, .*; validation: aAcc, mIoU', log)
    assert found and 0.1 < float(found[1]) < 100
    assert log.count('classes are in the labels') == 1, 'the metrics of one batch are not to be read as a result'


def test_a_detector(detector, tmp_path):
    cfg = detector.cfg()
    notes = prepare_training(cfg, detector.options(tmp_path, max_iters=1, seed=1))
    assert train(cfg, notes).name == 'iter_1.pth'
    log = next(tmp_path.glob('*/*.log')).read_text()
    assert 'dry run: loss' in log and 'coco/bbox_mAP' in log


@pytest.mark.parametrize(
    ('said', 'changes'),
    [
        (
            r"dry run, validation of one batch: CheckpointHook.save_best='miou': the validation reports aAcc, mIoU",
            dict(options={'default_hooks.checkpoint.save_best': 'miou'}),
        ),
        (
            r"dry run, validation of one batch: EarlyStoppingHook.monitor='accuracy'",
            dict(hook=dict(type='EarlyStoppingHook', monitor='accuracy')),
        ),
        (r"dry run, validation of one batch: KeyError: 'classes'", dict(metric=dict(type='mmengine.BrokenMetric'))),
        (
            rf'{LOSS}RuntimeError: weight tensor',
            dict(options={'model.decode_head.loss_decode.class_weight': [1.0, 2.0]}),
        ),
        (
            rf'{LOSS}.*FileNotFoundError: .*1.png',
            dict(options={'train_dataloader.dataset.pipeline.2': dict(type='mmengine.NeedsAFile')}),
        ),
        (
            rf'{LOSS}AssertionError at losses/.*.py:[0-9]+: assert ',  # OHEM with Dice
            dict(
                options={
                    'model.decode_head.loss_decode': dict(type='DiceLoss', _delete_=True),
                    'model.decode_head.sampler': dict(type='OHEMPixelSampler', thresh=0.7),
                }
            ),
        ),
        (
            rf'{LOSS}the images have 3 channels, and the model takes 4\nSet color_type',
            dict(
                options={'model.backbone.in_channels': 4, **{f'model.data_preprocessor.{k}': [1] * 4 for k in MEAN_STD}}
            ),
        ),
        (
            rf'{LOSS}the loss is .*, and the gradients of all weights are zero',
            dict(
                options={
                    'model.decode_head.loss_decode.loss_weight': 0.0,
                    'model.auxiliary_head.loss_decode.loss_weight': 0.0,
                }
            ),
        ),
        (
            rf'{LOSS}ValueError: Expected more than 1 value per channel',
            dict(options={'train_dataloader.batch_size': 1}),
        ),
    ],
)
def test_preflight_names_the_failing_part(tiny, tmp_path, said, changes):
    with pytest.raises(UserError, match=f'^{said}'):
        run(tiny, tmp_path, **changes)
    assert not list(tmp_path.glob('*.pth')), 'nothing was trained, and nothing is left of the checkpoint'


@pytest.mark.parametrize(
    ('options', 'told'),
    [
        ({'log_processor.window_size': 'ten'}, 'AssertionError: The type of window size'),
        ({'visualizer': None, 'default_hooks.logger.interval': 'two'}, 'TypeError: '),
        ({'log_processor.custom_cfg': [dict(data_src='loss', method_name='media', window_size=2)]}, 'media'),
    ],
)
def test_setting_that_a_hook_cannot_use_is_a_user_error(tiny, tmp_path, options, told):
    with pytest.raises(UserError, match=told) as info:
        tiny.train(tmp_path, 2, options)
    assert str(tiny.config) in str(info.value).splitlines()[0]


def test_a_disk_that_is_full(tiny, tmp_path, monkeypatch):
    def put(self, content, path):
        raise OSError(errno.ENOSPC, 'No space left on device', str(path))

    monkeypatch.setattr(LocalBackend, 'put', put)
    with pytest.raises(UserError, match='preflight.pth.*No space left on device'):
        run(tiny, tmp_path)


@MODELS.register_module()
class LooksAtValues(BaseModule):
    """A backbone whose path depends on its input, on a statistic that forward replaces, and on a counter."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 8, 3, padding=1)
        self.register_buffer('mean', torch.zeros(()))
        self.register_buffer('history', torch.zeros(1))
        self.calls = int(torch.zeros(1).item())

    def forward(self, x):
        self.calls += 1
        self.mean = 0.9 * self.mean + 0.1 * x.mean().detach()
        self.history = torch.cat([self.history, self.mean[None]])
        x = x + self.mean * self.calls + len(self.history)
        y = self.conv(x[:, :, ::4, ::4] if x.mean() > -1e9 else x)
        return [y, *(y[:, :, ::step, ::step].repeat(1, step, 1, 1) for step in (2, 4, 8))]


def test_a_backbone_that_looks_at_values_trains(tiny, tmp_path):
    options = {
        'model.backbone': dict(_delete_=True, type='mmengine.LooksAtValues'),
        'optim_wrapper.constructor': 'DefaultOptimWrapperConstructor',
    }
    last = [run(tiny, tmp_path / str(preflight), options, preflight) for preflight in (True, False)]
    assert last[0].name == 'iter_2.pth' and differences(*last) == []


def test_the_estimate_counts_every_validation():
    loop = SimpleNamespace(epoch=0, max_epochs=1)  # mmengine's iteration-based loops have one epoch
    runner = SimpleNamespace(
        train_loop=loop, iter=0, max_iters=6, val_loop=loop, val_interval=2, val_dataloader=[None, None]
    )
    assert _estimate(runner, 1.0, 0.5) == 'about 9 s: 6 iterations of 1 s, 3 validations of 1 s'
