"""Training stops at the first loss or gradient that is not finite, and names the layer."""

import math
import re
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.model import BaseDataPreprocessor, BaseModel
from mmengine.optim import OptimWrapper
from mmengine.runner import Runner
from mmengine.structures import InstanceData, PixelData
from nonfinite_cases import PoisonImage  # noqa: F401 (registers the cases)
from tiny import run_tool, tiny  # noqa: F401
from tiny_detector import detector  # noqa: F401
from torch import nn

from replk_mm.data.sampler import seed_iteration
from replk_mm.engine.nonfinite import all_finite, first_non_finite, plain
from replk_mm.engine.prepare import prepare_training
from replk_mm.engine.train import train
from replk_mm.errors import UserError

# ruff: noqa: F811 (fixtures that come from another file)
pytestmark = pytest.mark.slow
POISONED = dict(type='PoisonImage', name='demo_train_000002.jpg')
EVERY = {'default_hooks.checkpoint.interval': 1, 'train_cfg.val_interval': 100}


def stopped(
    case,
    work: Path,
    transform: dict | None = None,
    options: dict | None = None,
    spoil: dict | None = None,
    iterations: int = 4,
) -> str:
    """The message of a training of ``case``, a tiny segmentor or detector, that stops."""
    cfg = case.cfg(options)
    cfg.custom_hooks = [dict(type='SpoilHook', **spoil)] if spoil else []
    if transform:
        cfg.train_dataloader.dataset.pipeline.insert(-1, transform)
    notes = prepare_training(cfg, case.options(work, max_iters=iterations, seed=1))
    with pytest.raises(UserError) as caught:
        train(cfg, notes, preflight=False)
    return str(caught.value)


def saved(work: Path) -> dict:
    [file] = work.glob('nonfinite_*.pth')
    return torch.load(file, weights_only=True)


def test_image_is_named_and_the_batch_is_saved(tiny, tmp_path):
    message = stopped(tiny, tmp_path, POISONED, EVERY)
    head, images, file, last, *_ = message.splitlines()
    found = re.fullmatch(
        r'iteration 2: the loss is not finite \(loss, decode.loss_ce, aux.loss_ce\); first: '
        r"batch\['inputs'\]\[(\d)\], [36] of 12288 values",
        head,
    )
    assert found and images.count('.jpg') == 2
    assert file == f'batch saved: {tmp_path / "nonfinite_iter_2.pth"}' and str(tmp_path / 'iter_1.pth') in last
    assert [p.name for p in tmp_path.glob('iter_*')] == ['iter_1.pth']
    kept = saved(tmp_path)
    assert images == f'images: {", ".join(kept["images"])}'
    assert kept['images'][int(found[1])] == str(tiny.data / 'images/training/demo_train_000002.jpg')
    assert kept['batch']['inputs'][int(found[1])].isnan().any()
    assert kept['batch']['data_samples'][0]['gt_sem_seg']['data'].shape == (1, 64, 64)
    assert kept['iteration'] == 2 and math.isnan(kept['losses']['loss'])


def test_gradient_alone_is_found_before_the_step(tiny, tmp_path):
    message = stopped(tiny, tmp_path, options={'model.neck': dict(type='RootNeck')})
    assert re.match(
        r'iteration 1: the gradients are not finite; first: gradient of the output of backbone\.\S+ \(.*, '
        r'computed from a finite gradient of the output of neck \(RootNeck\)\n',
        message,
    )


def test_std_of_zero_is_found_in_the_normalization(tiny, tmp_path):
    message = stopped(tiny, tmp_path, options={'model.data_preprocessor.std': [58.0, 0.0, 57.0]})
    assert 'first: output of data_preprocessor (SegDataPreProcessor), ' in message


def test_step_too_large_stops_in_the_next_iteration_at_the_layer_that_overflows(tiny, tmp_path):
    message = stopped(
        tiny,
        tmp_path,
        options={
            'optim_wrapper.optimizer': dict(_delete_=True, type='SGD', lr=1e30),
            'optim_wrapper.paramwise_cfg': None,
            'optim_wrapper.constructor': 'DefaultOptimWrapperConstructor',
            'param_scheduler': [],
        },
    )
    assert re.match(r'iteration 2: the loss is not finite \(.*\); first: (output|input) of backbone\.\S+ \(', message)


def test_weight_of_a_detector_is_named(detector, tmp_path):
    message = stopped(detector, tmp_path, spoil=dict(weight='rpn_head.rpn_reg.weight', before=2))
    assert re.match(
        r'iteration 2: the loss is not finite \(.*loss_rpn_bbox.*\); first: weight '
        r'rpn_head.rpn_reg.weight, 1 of \d+ values\n',
        message,
    )
    instances = saved(tmp_path)['batch']['data_samples'][0]['gt_instances']
    assert instances['bboxes'].shape == (2, 4) and instances['masks'].shape[0] == 2


# -- any model, any optimizer -----------------------------------------------------------------------------------------
class Toy(BaseModel):
    """Two linear layers; a sample is ``(inputs (4,), fault)``."""

    def __init__(self) -> None:
        super().__init__(BaseDataPreprocessor())
        self.first, self.norm, self.second = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)

    def forward(self, inputs, fault, mode='tensor'):
        hidden = self.norm(self.first(inputs)) + 10
        if 'gradient' in fault:
            hidden = hidden + torch.sqrt(hidden * 0)
        if 'between' in fault:
            hidden = torch.exp(hidden * 1e9)
        out = self.second(hidden)
        return dict(loss=(out * (math.nan if 'loss' in fault else 1)).mean(), other=out.sum() * math.nan)


class HalfRange(OptimWrapper):
    """Scales losses as mmengine's AmpOptimWrapper does; that one refuses CPUs."""

    def __init__(self, scaler: dict, fixed: float | None = None, **kwargs) -> None:
        super().__init__(**kwargs)
        self.loss_scaler = torch.amp.GradScaler('cpu', **scaler)
        self._scale_update_param = fixed

    def backward(self, loss, **kwargs):
        self.loss_scaler.scale(loss).backward(**kwargs)
        self._inner_count += 1

    def step(self, **kwargs):
        self.loss_scaler.step(self.optimizer, **kwargs)
        self.loss_scaler.update(self._scale_update_param)


def run_toy(work: Path, faults: dict[int, str], wrapper=OptimWrapper, **optimizer) -> tuple[str, Runner]:
    """Train the toy for 6 iterations; ``faults`` by iteration, counted from 1. Returns the message."""
    samples = [dict(inputs=torch.randn(4), fault=faults.get(i // 2 + 1, '')) for i in range(12)]
    model = Toy()
    optimizer = optimizer or dict(lr=1e-2)
    made = torch.optim.Adam(model.parameters(), **optimizer)
    loader = dict(
        batch_size=2,
        sampler=dict(type='DefaultSampler', shuffle=False),
        dataset=samples,
        collate_fn=dict(type='default_collate'),
    )
    runner = Runner(
        model,
        str(work),
        loader,
        train_cfg=dict(by_epoch=True, max_epochs=1),
        optim_wrapper=wrapper(optimizer=made),
        experiment_name=f'toy{work}',
        default_scope='mmengine',
    )
    runner.register_hook(dict(type='replk_mm.StopAtNonFinite'))
    with pytest.raises(UserError) if faults else torch.enable_grad() as caught:
        runner.train()
    return str(caught.value) if faults else '', runner


def test_other_numbers_than_losses_may_be_nan(tmp_path):
    assert run_toy(tmp_path, {})[1].iter == 6


@pytest.mark.parametrize(
    ('kind', 'first'),
    [
        ('loss', 'the loss is not finite (loss); first: output of the model (Toy), 1 of 1 values'),
        ('between', 'the loss is not finite (loss); first: input of second (Linear), 8 of 8 values'),
        # The sum makes the gradient of `norm`'s output, between the two layers.
        (
            'gradient',
            'the gradients are not finite; first: gradient of the output of norm (BatchNorm1d), 8 of 8 values, '
            'computed from a finite gradient of the output of second (Linear)',
        ),
    ],
)
def test_first_place_is_named_and_nothing_is_changed(tmp_path, kind, first):
    message, runner = run_toy(tmp_path, {3: kind})
    assert message.splitlines()[0] == f'iteration 3: {first}'
    assert all(p.isfinite().all() for p in runner.model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in runner.model.modules())


@pytest.mark.parametrize('kind', ['loss', 'gradient'])
def test_accumulated_gradients_are_checked_after_every_batch(tmp_path, kind):
    message, _ = run_toy(tmp_path, {3: kind}, partial(OptimWrapper, accumulative_counts=4))
    assert message.startswith('iteration 3: the ' + ('loss is not' if kind == 'loss' else 'gradients are not'))


@pytest.mark.parametrize('optimizer', [{}, dict(lr=1e-2, fused=True)])
def test_overflow_of_scaled_gradients_is_no_error(tmp_path, optimizer):
    """The scaler lowers its scale until nothing overflows, and skips the steps until then."""
    scaler = dict(init_scale=2.0**127, backoff_factor=2.0**-60)
    message, runner = run_toy(tmp_path, {6: 'loss'}, partial(HalfRange, scaler), **optimizer)
    assert message.startswith('iteration 6: the loss is not finite (loss)')
    assert 0 < runner.optim_wrapper.loss_scaler.get_scale() < 2.0**127, 'no gradient overflowed'


@pytest.mark.parametrize(
    ('fixed', 'stop'),
    [
        (None, '4: the gradients are not finite at a loss scale of 8e-06'),
        (1.0, '2: the gradients are not finite at a loss scale of 1'),
    ],
)
def test_loss_scale_that_cannot_help_stops(tmp_path, fixed, stop):
    scaler = dict(init_scale=1.0, backoff_factor=0.02)
    message, _ = run_toy(tmp_path, dict.fromkeys(range(2, 7), 'gradient'), partial(HalfRange, scaler, fixed))
    assert message.startswith(f'iteration {stop}; first: gradient of')


@pytest.mark.parametrize('failure', ['disk', 'second pass', 'no fault'])
def test_later_failures_keep_the_first_message(tmp_path, monkeypatch, failure):
    def fails(*args, **kwargs):
        raise (
            OSError(28, 'No space left on device')
            if failure == 'disk'
            else torch.OutOfMemoryError('CUDA out of memory')
            if failure == 'second pass'
            else ValueError
        )

    name = 'torch.save' if failure == 'disk' else 'replk_mm.engine.nonfinite.first_non_finite'
    monkeypatch.setattr(Runner, 'save_checkpoint', lambda *args, **kwargs: None)
    monkeypatch.setattr(name, fails if failure != 'no fault' else lambda *args: (None, {}))
    message, _ = run_toy(tmp_path, {3: 'gradient'})
    expected = {
        'disk': 'could not be saved: [Errno 28] No space left',
        'no fault': 'first: not found when repeated',
        'second pass': 'first: not found, the pass that looks for it fails: OutOfMemoryError: CUDA out',
    }
    assert message.startswith('iteration 3: the gradients are not finite') and expected[failure] in message


def test_values_that_are_infinite_on_purpose_are_not_blamed():
    class Masked(Toy):
        def forward(self, inputs, fault, mode='tensor'):
            self.first(torch.full((1, 4), math.inf))
            return super().forward(inputs, fault, mode)

    batch = dict(inputs=torch.randn(2, 4), fault=['gradient', ''])
    first, losses = first_non_finite(Masked().train(), batch, (0, 0, 0), torch.enable_grad)
    assert math.isfinite(losses['loss']) and first.startswith('gradient of the output of norm')


def test_the_repetition_draws_the_random_numbers_of_the_iteration():
    class Draws(Toy):
        def forward(self, inputs, fault, mode='tensor'):
            return dict(loss=self.second.bias * 0 + torch.rand(()))

    seed = 3, 7, 0
    seed_iteration(*seed)
    expected = torch.rand(()).item()
    batch = dict(inputs=torch.randn(2, 4), fault=['', ''])
    assert first_non_finite(Draws().train(), batch, seed, torch.enable_grad) == (None, {'loss': expected})


@pytest.mark.parametrize('value', [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_one_value_among_many_is_seen(value, dtype):
    tensors = [torch.full((1000,), torch.finfo(dtype).max / 2, dtype=dtype), torch.zeros(0), torch.tensor(1.0)]
    assert all_finite(tensors) and all_finite([])
    tensors[0][777] = value
    assert not all_finite(tensors)


def test_batches_become_plain_data(tmp_path):
    from mmdet.structures.bbox import HorizontalBoxes
    from mmdet.structures.mask import BitmapMasks

    metainfo = dict(img_path='a.png', size=torch.Size([2, 3]), scale=np.float32(0.5), names=np.array(['a']))
    sample = InstanceData(
        metainfo=metainfo,
        bboxes=HorizontalBoxes(torch.ones(1, 4)),
        masks=BitmapMasks(np.ones((1, 2, 3), np.uint8), 2, 3),
    )
    batch = {0: (sample, PixelData(data=torch.zeros(1, 2, 3))), 'array': np.arange(6)[::2], 'object': Path('x')}
    torch.save(plain(batch), tmp_path / 'batch.pth')
    found = torch.load(tmp_path / 'batch.pth', weights_only=True)
    instance, pixels = found['0']
    assert torch.equal(instance.pop('bboxes'), torch.ones(1, 4)) and instance.pop('masks').shape == (1, 2, 3)
    assert instance == dict(img_path='a.png', size=[2, 3], scale=0.5, names=['a'])
    assert pixels['data'].shape == (1, 2, 3) and found['array'].tolist() == [0, 2, 4]
    assert found['object'] == 'x'


TWO = """
_base_ = {base!r}
custom_imports = dict(imports=['nonfinite_cases'], allow_failed_imports=False)
train_dataloader = dict(dataset=dict(pipeline={pipeline!r}))
"""


def test_of_two_processes_the_one_at_fault_names_the_layer(tiny, tmp_path):
    pipeline = [dict(step) for step in tiny.cfg().train_dataloader.dataset.pipeline]
    pipeline.insert(-1, POISONED)
    (tmp_path / 'two.py').write_text(TWO.format(base=str(tiny.config), pipeline=pipeline))
    place = ['--data-root', tiny.data, '--work-dir', tmp_path / 'work']
    options = [*place, '--max-iters', 4, '--seed', 1, '--no-preflight']
    found = run_tool('train', tmp_path / 'two.py', *options, processes=2)
    rank = re.search(r"error: iteration 1, rank (\d): the loss is not finite .*; first: batch\['inputs", found.stderr)
    assert rank, found.stderr[-3000:]
    assert f'error: iteration 1, rank {1 - int(rank[1])}: stopped, because' in found.stderr
    # torchrun's summary shows what its processes raised.
    assert 'NonFiniteError: iteration 1, rank' in found.stderr.partition('Root Cause')[2]
