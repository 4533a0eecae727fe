"""Training stops at the first loss or gradient that is not finite, and says where it comes from."""
import math
import re
import socket
import subprocess
import sys

import pytest
import torch
from mmengine.model import BaseDataPreprocessor, BaseModel
from mmengine.optim import OptimWrapper
from mmengine.runner import Runner
from nonfinite_cases import Switch, prepared, read, replay_file, stopped, switch_off  # noqa: F401
from tiny import ROOT, tiny, tool_environment  # noqa: F401
from tiny_detector import detector  # noqa: F401
from torch import nn

from replk_mm.engine.diagnosis import Finding, Values, examine
from replk_mm.engine.divergence import StopAtNonFinite, _finite
from replk_mm.engine.train import train
from replk_mm.errors import UserError

# ruff: noqa: F811 (fixtures that come from another file)
POISONED = dict(type='PoisonImage', name='demo_train_000002.jpg')
EVERY = {'default_hooks.checkpoint.interval': 1, 'train_cfg.val_interval': 100}


def first_line(message: str) -> str:
    return message.splitlines()[0]


def parameters(path) -> dict:
    state = torch.load(path, weights_only=False)['state_dict']
    return {key: value for key, value in state.items() if not key.endswith(('running_mean', 'running_var', 'tracked'))}


# -- segmentation -----------------------------------------------------------------------------------------------------
def test_image_with_nan_is_named_and_no_weight_changes(tiny, tmp_path):
    message = stopped(tiny, tmp_path, transform=POISONED, options=EVERY)
    head = first_line(message)
    iteration = int(re.match(r'iteration (\d+): the loss is nan \(decode.loss_ce, aux.loss_ce\); first non-finite: ', head)[1])
    image = str(tiny.data / 'images/training/demo_train_000002.jpg')
    assert f'image of {image}, 6 of ' in head or f'image of {image}, 3 of ' in head  # the crop is the image, or flips it
    assert any(line.startswith('images: ') and image in line and line.count('.jpg') == 2 for line in message.splitlines())
    assert 'Mend the image' in message and f'--replay {replay_file(tmp_path)}' in message
    assert replay_file(tmp_path).name == f'nonfinite_iter_{iteration}.pth'
    assert 1 < iteration <= 2, 'with this seed the third image is in the second batch'
    assert sorted(p.name for p in tmp_path.glob('iter_*')) == [f'iter_{i}.pth' for i in range(1, iteration)]
    assert f'Last checkpoint: {tmp_path / f"iter_{iteration - 1}.pth"}' in message
    before, after = parameters(tmp_path / f'iter_{iteration - 1}.pth'), parameters(replay_file(tmp_path))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.slow
def test_after_the_fault_is_mended_training_goes_on(tiny, tmp_path):
    stopped(tiny, tmp_path, transform=POISONED, options=EVERY)
    cfg, notes = prepared(tiny, tmp_path, options=EVERY, resume='auto', seed=None)
    assert any('iter_1.pth' in note for note in notes)
    assert train(cfg, notes, preflight=False).name == 'iter_4.pth'


@pytest.mark.parametrize('value', [math.inf, pytest.param(math.nan, marks=pytest.mark.slow)])
def test_weight_that_is_not_finite_is_named(tiny, tmp_path, value):
    message = stopped(tiny, tmp_path, spoil=dict(weight='decode_head.lateral_convs.1.conv.weight', before=3, value=value))
    kind = 'nan' if math.isnan(value) else 'infinite'
    assert re.fullmatch(r'iteration 3: the loss is nan \(decode.loss_ce\); first non-finite: weight '
                        rf'decode_head.lateral_convs.1.conv.weight \(Conv2d\), 1 of 128 values {kind}(; first nan: .*)?',
                        first_line(message))
    assert 'since the last update' in message


@pytest.mark.slow
def test_std_of_zero_is_found_in_the_normalization(tiny, tmp_path):
    message = stopped(tiny, tmp_path, options={'model.data_preprocessor.std': [58., 0., 57.]})
    assert 'iteration 1: the loss is nan' in message
    assert 'first non-finite: output of data_preprocessor (SegDataPreProcessor), ' in first_line(message)
    assert 'a std of 0' in message


@pytest.mark.slow
def test_step_too_large_stops_in_the_next_iteration_at_the_layer_that_overflows(tiny, tmp_path):
    options = {'optim_wrapper.optimizer': dict(_delete_=True, type='SGD', lr=1e30), 'optim_wrapper.paramwise_cfg': None,
               'optim_wrapper.constructor': 'DefaultOptimWrapperConstructor', 'param_scheduler': [],
               'default_hooks.checkpoint.interval': 100}
    message = stopped(tiny, tmp_path, options=options)
    assert first_line(message).startswith('iteration 2: the loss is nan')
    named = re.search(r'first non-finite: (?:output|input) of (\S+) \((\w+)\)', first_line(message))
    # The truth, by hooks of torch alone on the file's weights: all layers that ended before it are finite.
    stored = read(replay_file(tmp_path))
    from replk_mm.engine.batches import unpack
    from replk_mm.engine.config import build_model
    model = build_model(tiny.cfg({'model.backbone.norm_cfg.type': 'BN', 'norm_cfg.type': 'BN'}))
    order = []
    for name, module in model.named_modules():
        module.register_forward_hook(lambda m, args, out, name=name: order.append((name, all(
            t.isfinite().all() for t in (out if isinstance(out, (list, tuple)) else [out]) if isinstance(t, torch.Tensor)))))
    model.load_state_dict(stored['state_dict'])
    model.train()
    model(**model.data_preprocessor(unpack(stored['batch']), True), mode='loss')
    assert next(name for name, finite in order if not finite) == named[1]
    assert 'learning rate: 1e+30' in message and 'clip_grad' in message


def test_gradient_alone_is_found_behind_the_layer_that_makes_it(tiny, tmp_path):
    Switch.at = 3
    message = stopped(tiny, tmp_path, options={'model.neck': dict(type='RootNeck'), **EVERY})
    assert re.match(r'iteration 3: the gradients are not finite; first non-finite: gradient of the output of backbone\.\S+ '
                    r'\(\w+\), which neck \(RootNeck\) passes back, \d+ of \d+ values nan', message)
    before, after = parameters(tmp_path / 'iter_2.pth'), parameters(replay_file(tmp_path))
    assert all(torch.equal(before[key], after[key]) for key in before)
    losses = re.search(r'loss until here: (.*)', message)[1].split(', ')
    assert len(losses) == 2 and all(0 < float(loss) < 10 for loss in losses)


# -- detection --------------------------------------------------------------------------------------------------------
@pytest.mark.slow
def test_detector_names_layer_and_terms(detector, tmp_path):
    message = stopped(detector, tmp_path, 2, spoil=dict(weight='rpn_head.rpn_reg.weight', before=2))
    assert re.match(r'iteration 2: the loss is (nan|inf) \(loss_rpn_bbox.*\); first non-finite: weight '
                    r'rpn_head.rpn_reg.weight \(Conv2d\), 1 of \d+ values infinite', message)
    assert message.count('.png') == 2


@pytest.mark.slow
def test_box_that_is_nan_is_named_with_its_image(detector, tmp_path):
    message = stopped(detector, tmp_path, 4, transform=dict(type='PoisonBoxes', name='001.png'))
    box = f'gt_instances.bboxes of {detector.data / "train2017/001.png"}, 1 of 8 values nan'
    # mmcv's RoIAlign refuses such boxes before there is a loss.
    assert re.match(r'iteration \d: RuntimeError: roi_width >= 0 .*; first non-finite: ' + re.escape(box), message)
    assert replay_file(tmp_path)


@pytest.mark.slow
def test_error_that_has_nothing_to_do_with_it_stays(tiny, tmp_path, monkeypatch):
    from mmseg.models import EncoderDecoder

    def fail(*args, **kwargs):
        raise RuntimeError('a mistake in the program')

    monkeypatch.setattr(EncoderDecoder, 'loss', fail)
    with pytest.raises(RuntimeError, match='a mistake in the program'):
        tiny.train(tmp_path)


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
        if 'together' in fault and not self.first._forward_hooks:
            hidden = hidden * math.nan
        out = self.second(hidden)
        if 'overflow' in fault:  # finite, and not when it is scaled up
            out = out * 1e36
        return dict(loss=(out * (math.nan if 'loss' in fault else 1)).mean(), other=out.sum() * math.nan)


class HalfRange(OptimWrapper):
    """Scales losses as mmengine's AmpOptimWrapper does; that one refuses CPUs."""

    def __init__(self, scaler: dict, **kwargs) -> None:
        super().__init__(**kwargs)
        self.loss_scaler = torch.amp.GradScaler('cpu', **scaler)

    def backward(self, loss, **kwargs):
        self.loss_scaler.scale(loss).backward(**kwargs)
        self._inner_count += 1

    def step(self, **kwargs):
        self.loss_scaler.step(self.optimizer, **kwargs)
        self.loss_scaler.update()


def run_toy(work, faults: dict[int, str], wrapper=None, spoil: dict | None = None, **optimizer) -> Toy:
    """Train the toy for 6 iterations; ``faults`` by iteration, counted from 1; ``spoil`` goes to the hook of faults."""
    torch.manual_seed(0)
    samples = [dict(inputs=torch.randn(4), fault=faults.get(i // 2 + 1, '')) for i in range(12)]
    model = Toy()
    made = torch.optim.SGD(model.parameters(), lr=0.01) if not optimizer else torch.optim.Adam(model.parameters(), **optimizer)
    runner = Runner(model, str(work), dict(batch_size=2, sampler=dict(type='DefaultSampler', shuffle=False), dataset=samples,
                                           collate_fn=dict(type='default_collate')),
                    train_cfg=dict(by_epoch=True, max_epochs=1), optim_wrapper=(wrapper or OptimWrapper)(optimizer=made),
                    default_hooks=dict(checkpoint=dict(type='CheckpointHook', interval=1, by_epoch=False)),
                    experiment_name=f'toy{work}', default_scope='mmengine')
    for hook in (dict(type='replk_mm.StopAtNonFinite'), dict(type='FaultHook', **(spoil or {}))):
        runner.register_hook(hook)
    with pytest.raises(UserError) if faults or spoil else torch.enable_grad() as caught:
        runner.train()
    model.message, model.runner = str(caught.value) if faults or spoil else '', runner
    return model


def test_other_numbers_than_losses_may_be_nan(tmp_path):
    assert run_toy(tmp_path, {}).runner.iter == 6


def test_weights_that_overflowed_are_not_saved(tmp_path):
    message = run_toy(tmp_path, {}, spoil=dict(weight='second.bias', after=2)).message
    assert first_line(message) == ('iteration 2: 1 weights or statistics are not finite after it, second.bias first; no '
                                   'checkpoint of them was written')
    assert [p.name for p in tmp_path.glob('iter_*')] == ['iter_1.pth']
    assert str(tmp_path / 'iter_1.pth') in message


def test_fault_that_does_not_repeat_itself_is_called_so(tmp_path, monkeypatch):
    def without_fault(model, batch, *args):
        return examine(model, {**batch, 'fault': ['', '']}, *args)

    monkeypatch.setattr('replk_mm.engine.divergence.examine', without_fault)
    message = run_toy(tmp_path, {2: 'gradient'}).message
    assert first_line(message) == ('iteration 2: the gradients are not finite; first non-finite: none in a second pass with '
                                   'the same seeds, so an operation or a machine does not repeat itself')


def test_disk_without_room_for_the_batch_leaves_the_message(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr('replk_mm.checkpoints.torch.save', full)
    monkeypatch.setattr(Runner, 'save_checkpoint', lambda *args, **kwargs: None)
    message = run_toy(tmp_path, {3: 'gradient'}).message
    assert 'first non-finite: gradient of the output of norm' in first_line(message)
    line = next(line for line in message.splitlines() if 'could not be saved' in line)
    assert 'No space left' in line and '--replay' not in message
    assert not list(tmp_path.glob('nonfinite*'))


def test_settings_that_cannot_be_stored_leave_the_message(tmp_path, monkeypatch):
    def fails(*args):
        raise ValueError("invalid literal for int() with base 10: 'random'")

    monkeypatch.setattr('replk_mm.engine.divergence.file_of', fails)
    message = run_toy(tmp_path, {3: 'loss'}).message
    assert first_line(message).startswith('iteration 3: the loss is nan')
    assert "The batch could not be saved for replay: invalid literal for int() with base 10: 'random'" in message


def test_memory_too_small_for_a_second_pass_leaves_the_message(tmp_path, monkeypatch):
    def no_memory(*args):
        raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2 GiB')

    monkeypatch.setattr('replk_mm.engine.diagnosis._run', no_memory)
    message = run_toy(tmp_path, {3: 'loss'}).message
    assert first_line(message) == ('iteration 3: the loss is nan (loss); first non-finite: not found, for the pass that looks '
                                   'for it ended with OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB')
    assert replay_file(tmp_path).name == 'nonfinite_iter_3.pth'


@pytest.mark.parametrize('kind', ['loss', 'gradient'])
def test_accumulated_gradients_are_checked_after_every_batch(tmp_path, kind):
    model = run_toy(tmp_path, {3: kind}, lambda optimizer: OptimWrapper(optimizer, accumulative_counts=4))
    assert model.message.startswith('iteration 3: the ' + ('loss is nan (loss)' if kind == 'loss' else 'gradients are'))


def half(**scaler):
    return lambda optimizer: HalfRange(scaler, optimizer=optimizer)


@pytest.mark.parametrize('optimizer', [{}, dict(lr=1e-2, fused=True)])
def test_overflow_of_scaled_gradients_is_the_scalers_business(tmp_path, optimizer):
    """The scaler halves its scale until nothing overflows; steps that it passes over change nothing."""
    torch.manual_seed(0)
    model = run_toy(tmp_path, {6: 'loss'}, half(init_scale=2. ** 127, backoff_factor=2. ** -60), **optimizer)
    assert model.message.startswith('iteration 6: the loss is nan (loss)')
    assert 0 < model.runner.optim_wrapper.loss_scaler.get_scale() < 2. ** 127, 'no gradient overflowed'


def test_loss_scale_that_falls_for_ever_stops(tmp_path):
    model = run_toy(tmp_path, dict.fromkeys(range(2, 7), 'gradient'), half(init_scale=1., backoff_factor=0.02))
    assert model.message.startswith('iteration 4: the gradients are not finite, though the loss is scaled by 8e-06')


def test_passes_that_look_for_the_layer_change_nothing():
    torch.manual_seed(0)
    model = Toy().train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    batch = dict(inputs=torch.randn(2, 4), fault=['gradient', ''])
    found = examine(model, batch, (0, 0, 0), torch.enable_grad)
    assert not found.finite and math.isfinite(found.losses['loss'])
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    # The sum makes the gradient of `norm`'s output, between the two layers: neither is to blame.
    assert found.first.place == 'gradient of the output of norm (BatchNorm1d)'


@pytest.mark.parametrize(('kind', 'where'), [
    ('between', 'input of second (Linear), 8 of 8 values infinite; first nan: output of second (Linear)'),
    ('loss', 'loss loss, 1 of 1 values nan'),
    ('together', 'none where layers are watched, which switches off what computes several of them at once')])
def test_what_no_layer_gives_is_named_by_what_is_beside_it(kind, where):
    torch.manual_seed(0)
    found = examine(Toy().train(), dict(inputs=torch.randn(2, 4), fault=[kind, '']), (0, 0, 0), torch.enable_grad)
    assert found.describe() == where


def test_image_of_a_batch_and_what_is_infinite_on_purpose():
    features = torch.zeros(2, 3, 4, 4)
    features[1, 0, 2, 2] = math.nan
    mask = Values.of('input of attention', 'output', torch.tensor([-math.inf, 0.]))
    gradient = Values.of('gradient of w', 'gradient', torch.tensor([math.nan]))
    found = Finding(['a.jpg', 'b.jpg'], [Values.of('output of conv', 'output', features)], dict(loss=math.nan))
    assert found.describe() == 'output of conv, 1 of 96 values nan, of b.jpg only'
    assert Finding([], [mask, gradient], dict(loss=1.), ['w']).describe() == 'gradient of w, 1 of 1 values nan'
    assert Finding([], [mask, gradient], dict(loss=math.nan)).first is mask
    assert Finding([], [mask], dict(loss=1.)).describe().startswith('none in a second pass')


@pytest.mark.parametrize('value', [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_one_value_among_many_is_seen(value, dtype):
    tensors = [torch.full((1000,), torch.finfo(dtype).max, dtype=dtype), torch.zeros(0), torch.tensor(1.)]
    assert _finite(tensors if dtype != torch.float64 else tensors[1:] + [torch.ones(9, dtype=dtype)])
    assert _finite([])
    tensors[0][777] = value
    assert not _finite(tensors)


@pytest.mark.slow
def test_hook_is_part_of_every_training(tiny, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(StopAtNonFinite, 'after_train', lambda self, runner: seen.append(runner.iter))
    tiny.train(tmp_path, 1)
    assert seen == [1]


# -- several processes ------------------------------------------------------------------------------------------------
TWO = """
_base_ = {base!r}
custom_imports = dict(imports=['nonfinite_cases'], allow_failed_imports=False)
train_dataloader = dict(dataset=dict(pipeline={pipeline!r}))
"""


@pytest.mark.slow
def test_of_two_processes_the_one_at_fault_says_why(tiny, tmp_path):
    cfg = tiny.cfg()
    pipeline = [dict(step) for step in cfg.train_dataloader.dataset.pipeline]
    (tmp_path / 'two.py').write_text(TWO.format(base=str(tiny.config), pipeline=[*pipeline[:-1], POISONED, pipeline[-1]]))
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    found = subprocess.run(
        [sys.executable, '-m', 'torch.distributed.run', '--nproc-per-node', '2', '--master-port', str(port),
         str(ROOT / 'tools/train.py'), str(tmp_path / 'two.py'), '--data-root', str(tiny.data), '--work-dir',
         str(tmp_path / 'work'), '--device', 'cpu', '--launcher', 'pytorch', '--max-iters', '4', '--seed', '1',
         '--no-preflight'],
        capture_output=True, text=True, timeout=170, check=False,
        env=tool_environment(PYTHONPATH=f'{ROOT}:{ROOT / "tests"}'))
    messages = [line.removeprefix('error: ') for line in found.stderr.splitlines() if 'iteration 1, rank' in line]
    assert len(messages) == 2, found.stderr[-3000:]
    guilty = next(m for m in messages if 'image of' in m)
    rank = int(re.match(r'iteration 1, rank (\d): the loss is nan', guilty)[1])
    assert f'iteration 1, rank {1 - rank}: stopped with rank {rank}: ' in '\n'.join(messages)
    assert [p.name for p in (tmp_path / 'work').glob('nonfinite*')] == [f'nonfinite_iter_1_rank_{rank}.pth']
