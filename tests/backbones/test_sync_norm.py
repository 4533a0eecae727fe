"""BatchNorm over several processes against torch's BatchNorm2d on their batches in one."""

import pytest
import torch
import torch.nn as nn
from mmcv.cnn import build_norm_layer
from mmengine.config import Config
from rank_cases import in_new_python

from replk_mm.backbones.sync_norm import SyncBatchNorm, find_pooled_batch_norm
from replk_mm.engine.config import fit_to_machine

SCRIPT = """
import json, pathlib, sys
import torch
import torch.distributed as dist
import torch.nn as nn
from torch.nn.parallel import DistributedDataParallel
from replk_mm.backbones.layers import run_checkpointed
from replk_mm.backbones.sync_norm import SyncBatchNorm
from rank_cases import together

folder = pathlib.Path(sys.argv[1])


def far(a, b):
    b = b.detach()
    return float((a.detach().double() - b).abs().max() / b.abs().max().clamp_min(1)) if a.numel() else 0.


def layer(sizes, dtype=torch.float64, layout=torch.contiguous_format, shape=(6, 7), checkpointed=False, mean=100.,
          **options):
    '''Errors of output, input gradient, weights' and statistics' over three steps; the last is in evaluation mode.'''
    def work(rank):
        torch.set_num_threads(1)
        torch.manual_seed(0)
        theirs = {2: nn.BatchNorm2d, 1: nn.BatchNorm1d, 0: nn.BatchNorm1d}[len(shape)](5, **options).double()
        if theirs.affine:
            with torch.no_grad():
                theirs.weight.uniform_(.5, 2)
                theirs.bias.normal_()
        ours = SyncBatchNorm(5, **options).double()
        ours.load_state_dict(theirs.state_dict())
        ours.to(dtype if dtype != torch.bfloat16 else torch.float32)
        begin = sum(sizes[:rank])
        own = slice(begin, begin + sizes[rank])
        errors = {}
        for step in range(3):
            if step == 2:
                theirs.eval(), ours.eval()
            x = (3 * torch.randn(sum(sizes), 5, *shape, dtype=torch.float64) + mean).to(dtype).double()
            grad = torch.randn_like(x).to(dtype).double()
            a, b = x.clone().requires_grad_(), x[own].to(dtype).contiguous(memory_format=layout).requires_grad_()
            theirs.zero_grad(), ours.zero_grad()
            expected = theirs(a)
            expected.backward(grad)
            if step == 2 and (not sizes[rank] or theirs.running_mean is None):
                continue  # of an evaluation every process has its own
            found = run_checkpointed(ours, b, enabled=checkpointed)
            found.backward(grad[own].to(dtype))
            errors[f'output {step}'] = far(found, expected[own])
            errors[f'input {step}'] = far(b.grad, a.grad[own])
            for (name, p), q in zip(ours.named_parameters(), theirs.parameters()):
                if step < 2:
                    dist.all_reduce(p.grad)
                    errors[f'{name} {step}'] = far(p.grad, q.grad)
            for (name, p), q in zip(ours.named_buffers(), theirs.buffers()):
                errors[f'{name} {step}'] = far(p, q)
            assert found.is_contiguous(memory_format=layout) and found.dtype == dtype
        return errors
    return work


class Net(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 4, 3), norm(4), nn.ReLU(), nn.Conv2d(4, 4, 3), norm(4), nn.Flatten())

    def forward(self, x):
        return self.layers(x).square().mean()


def network(rank):
    '''Five steps of a network in distributed training, 2 images a process, against one with all of them.'''
    torch.set_num_threads(1)
    nets = []
    for norm in (SyncBatchNorm, nn.BatchNorm2d):
        torch.manual_seed(0)
        nets.append(Net(norm).double())
    ours, theirs = DistributedDataParallel(nets[0]), nets[1]
    optimizers = [torch.optim.SGD(net.parameters(), lr=.05, momentum=.9) for net in (ours, theirs)]
    losses = []
    for step in range(5):
        x = torch.randn(2 * dist.get_world_size(), 3, 9, 9, dtype=torch.float64)
        of_step = []
        for net, optimizer, images in zip((ours, theirs), optimizers, (x[2 * rank:2 * rank + 2], x)):
            optimizer.zero_grad()
            loss = net(images)
            loss.backward()
            optimizer.step()
            of_step.append(loss.detach().clone())
        dist.all_reduce(of_step[0])
        losses.append(far(of_step[0] / dist.get_world_size(), of_step[1]))
    state = theirs.state_dict()
    return dict(losses=max(losses), keys=list(nets[0].state_dict()) == list(state),
                state=max(far(value, state[key]) for key, value in nets[0].state_dict().items()))


def one_value(rank):
    try:
        SyncBatchNorm(3)(torch.zeros(1 - rank, 3, 1, 1))
    except ValueError as error:
        return str(error)


last, wide = torch.channels_last, torch.float32
found = dict(
    even=together(2, layer((2, 2)), folder / 'even'),
    uneven=together(3, layer((3, 1, 2), layout=last), folder / 'uneven'),
    empty=together(2, layer((0, 3)), folder / 'empty'),
    vectors=together(2, layer((3, 2), shape=()), folder / 'vectors'),
    lines=together(2, layer((3, 2), shape=(7,)), folder / 'lines'),
    average=together(2, layer((2, 1), momentum=None, eps=.1), folder / 'average'),
    plain=together(2, layer((2, 1), affine=False), folder / 'plain'),
    batch_only=together(2, layer((2, 1), track_running_stats=False), folder / 'batch_only'),
    checkpointed=together(2, layer((2, 1), checkpointed=True), folder / 'checkpointed'),
    float32=together(2, layer((2, 2), wide, last), folder / 'float32'),
    bfloat16=together(2, layer((2, 2), torch.bfloat16, last, mean=0.), folder / 'bfloat16'),
    network=together(3, network, folder / 'network'),
    one_value=together(2, one_value, folder / 'one_value'),
)
print(json.dumps(found))
"""


@pytest.fixture(scope='module')
def found(tmp_path_factory) -> dict:
    return in_new_python(SCRIPT, tmp_path_factory.mktemp('norm'))


@pytest.mark.slow
@pytest.mark.parametrize(
    ('case', 'most'),
    [
        ('even', 1e-12),
        ('uneven', 1e-12),
        ('empty', 1e-12),
        ('vectors', 1e-12),
        ('lines', 1e-12),
        ('average', 1e-12),
        ('plain', 1e-12),
        ('checkpointed', 1e-12),
        ('batch_only', 1e-12),
        ('float32', 2e-5),
        ('bfloat16', 2e-2),
    ],
)
def test_layer_is_that_of_the_whole_batch(found, case, most):
    for rank in found[case]:
        statistics = {'running_mean 1', 'running_var 1', 'num_batches_tracked 1'} if case != 'batch_only' else set()
        assert {'output 0', 'input 1'} | statistics <= set(rank)
        assert max(rank.values()) <= most, rank


@pytest.mark.slow
def test_distributed_training_is_that_of_the_whole_batch(found):
    for rank in found['network']:
        assert rank['keys'] and rank['losses'] < 1e-12 and rank['state'] < 1e-12, rank


@pytest.mark.slow
def test_one_value_in_all_processes_is_rejected(found):
    assert all('more than one value per channel' in message for message in found['one_value'])


def test_alone_it_is_batch_norm():
    torch.manual_seed(0)
    ours, theirs = build_norm_layer(dict(type='replk_mm.SyncBN'), 4)[1], nn.BatchNorm2d(4)
    assert (
        isinstance(ours, SyncBatchNorm)
        and ours.eps == theirs.eps
        and list(ours.state_dict()) == list(theirs.state_dict())
    )
    for _ in range(2):
        x = torch.randn(3, 4, 5, 5)
        assert torch.equal(ours(x), theirs(x))
    assert torch.equal(ours.eval()(x), theirs.eval()(x))
    with pytest.raises(ValueError, match='dimensions'):
        ours(torch.zeros(3))


def test_one_image_a_process_can_train_on_a_map_pooled_to_one_pixel():
    def pool(norm):
        return nn.Sequential(nn.Sequential(nn.AdaptiveAvgPool2d(1), norm(3)))

    assert find_pooled_batch_norm(pool(nn.BatchNorm2d)) and not find_pooled_batch_norm(pool(SyncBatchNorm))


@pytest.mark.parametrize('before', ['SyncBN', 'MMSyncBN', 'replk_mm.SyncBN'])
@pytest.mark.parametrize(
    ('device', 'launcher', 'after'),
    [
        ('cpu', 'none', 'BN'),
        ('cuda', 'none', 'BN'),
        ('cpu', 'pytorch', 'replk_mm.SyncBN'),
        ('cuda', 'pytorch', 'SyncBN'),
    ],
)
def test_configs_get_the_norm_that_the_machine_can_run(before, device, launcher, after):
    cfg = Config(dict(model=dict(norm_cfg=dict(type=before), head=dict(norm_cfg=dict(type='GN'))), launcher=launcher))
    notes = [note for note in fit_to_machine(cfg, None, device, 1) if note.startswith('norm: ')]
    after = 'MMSyncBN' if (before, after) == ('MMSyncBN', 'SyncBN') else after
    assert cfg.model.norm_cfg.type == after and cfg.model.head.norm_cfg.type == 'GN'
    assert len(notes) == (before != after)
    if notes:
        assert f'{after} instead' in notes[0] and '1 places' in notes[0]
        assert ('statistics of all processes' in notes[0]) == (launcher != 'none')
