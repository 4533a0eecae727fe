"""Merging and folding backbones: exact, against values by hand and float64."""

from functools import partial
from pathlib import Path

import pytest
import torch
from mmcv.cnn import ConvModule
from mmengine.model import Sequential
from norms import randomize_norms
from process_group import fully_shard, single_process_group
from reparam_cases import BN, TINY, UNIREPLKNET, backbone, largest_gap, norms, randomized, unireplknet
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.utils import parametrize

from replk_mm.backbones import ConvNeXt, RepLKNet, UniRepLKNet
from replk_mm.backbones.replknet import ConvFFN, ConvNorm, ReparamLargeKernelConv, RepLKBlock
from replk_mm.deploy.equivalence import compare_networks
from replk_mm.deploy.reparameterize import reparameterize
from replk_mm.errors import UserError
from replk_mm.ops import DepthwiseConv2d


def test_merge_by_hand():
    """Two channels, a 3x3 kernel beside a 1x1 kernel, every number worked out on paper."""
    block = ReparamLargeKernelConv(2, 3, 1, 1, False, BN).double().eval()
    with torch.no_grad():
        large, small = block.lkb_origin, block.small_conv
        large.conv.weight.copy_(torch.arange(18.0).view(2, 1, 3, 3))
        small.conv.weight.copy_(torch.tensor([10.0, 20.0]).view(2, 1, 1, 1))
        for branch, mean, var, weight, bias in (
            (large, (1, 2), (4, 9), (2, 6), (5, 7)),
            (small, (3, -1), (1, 0.25), (1, 2), (-1, 0)),
        ):
            branch.bn.eps = 0.0
            for tensor, value in (
                (branch.bn.running_mean, mean),
                (branch.bn.running_var, var),
                (branch.bn.weight, weight),
                (branch.bn.bias, bias),
            ):
                tensor.copy_(torch.tensor(value))
    merged, changes = reparameterize(block, fold=False)
    # Scales: large 2/2 = 1 and 6/3 = 2; small 1/1 = 1 and 2/.5 = 4.
    expected = torch.tensor([[0, 1, 2, 3, 4 + 10, 5, 6, 7, 8], [18, 20, 22, 24, 26 + 80, 28, 30, 32, 34]]).double()
    assert merged.lkb_reparam.weight.equal(expected.view(2, 1, 3, 3))
    # Biases: large 5 - 1 * 1 = 4 and 7 - 2 * 2 = 3; small -1 - 3 * 1 = -4 and 0 + 1 * 4 = 4.
    assert merged.lkb_reparam.bias.tolist() == [0, 7]
    assert changes.merged == [''] and changes.left == []


def test_fold_by_hand():
    """A norm behind a convolution and one in front of it."""
    ffn = ConvFFN(2, 0.5, 0.0, BN).double().eval()
    with torch.no_grad():
        ffn.pw1.conv.weight.copy_(torch.tensor([[[[3.0]], [[5.0]]]]))
        for bn, mean, var, weight, bias in (
            (ffn.preffn_bn, (1, 2), (4, 1), (2, 3), (0, 1)),
            (ffn.pw1.bn, (6,), (16,), (2,), (9,)),
        ):
            bn.eps = 0.0
            for tensor, value in ((bn.running_mean, mean), (bn.running_var, var), (bn.weight, weight), (bn.bias, bias)):
                tensor.copy_(torch.tensor(value))
    folded, changes = reparameterize(ffn)
    # In front: scales 1 and 3, shifts -1 and 1 - 6 = -5. The convolution becomes (3, 15), its bias -3 - 25 = -28.
    # Behind: scale 2/4 = .5, shift 9 - 3 = 6. Together (1.5, 7.5) and -14 + 6 = -8.
    assert folded.pw1.conv.weight.flatten().tolist() == [1.5, 7.5]
    assert folded.pw1.conv.bias.tolist() == [-8]
    assert sorted(changes.folded) == ['preffn_bn', 'pw1.bn', 'pw2.bn'] and norms(folded) == []


@pytest.mark.parametrize(
    'kwargs',
    [
        {},
        dict(arch=dict(TINY, small_kernel=None, dw_ratio=1.5)),
        dict(arch=dict(TINY, small_kernel=None, dilation=2, shortcut=False)),
        dict(act_cfg=dict(type='SiLU')),
        dict(norm_cfg=dict(type='BN', eps=1e-2)),
        dict(norm_cfg=dict(type='SyncBN')),
    ],
    ids=str,
)
def test_backbone_in_float64(kwargs):
    model = randomize_norms(RepLKNet(**{'arch': TINY, **kwargs})).double().eval()
    x = torch.randn(2, 3, 64, 48, dtype=torch.float64)
    expected = model(x)
    for merge, fold in ((True, False), (False, True), (True, True)):
        after, changes = reparameterize(model, merge, fold)
        assert largest_gap(expected, after(x)) <= 1e-10
        assert len(changes.merged) == (5 if merge else 0)
        before = len(norms(model))
        branches = sum('.large_kernel.' in n for n in norms(model))
        assert len(changes.folded) == (0 if not fold else before - branches if merge else before)
        assert norms(after) == changes.left
        assert (norms(after) == []) == fold


def test_norms_of_features_stay():
    model = backbone(norm_intermediate_features=True)
    after, changes = reparameterize(model)
    assert norms(after) == changes.left == [f'stages.{i}.norm' for i in range(4)]
    assert all(d.ok for d in compare_networks(model, after))
    assert '4 kept, whose folding is not known to be exact (stages.0.norm' in str(changes)


def test_float32_agrees():
    model = backbone()
    after, _ = reparameterize(model)
    found = compare_networks(model, after)
    assert [d.dtype for d in found] == [torch.float64, torch.float32] and all(d.ok for d in found)
    assert 0 < found[0].relative <= 1e-6 and found[1].relative <= 1e-5
    assert all('equal' in str(d) for d in found)


def test_keys_of_the_authors():
    """The merged network has exactly the keys and shapes of the authors' merged files."""
    with torch.device('meta'):
        after, _ = reparameterize(RepLKNet('31B'), fold=False)
        built = RepLKNet('31B', small_kernel_merged=True)
    lines = (Path(__file__).parents[1] / 'data/facts/keys_replknet31b_official_merged.txt').read_text().splitlines()
    for model in (after, built):
        assert [f'{k}\t{tuple(v.shape)}' for k, v in sorted(model.state_dict().items())] == sorted(lines)


def test_structure_equals_that_of_small_kernel_merged():
    after, _ = reparameterize(backbone(), fold=False)
    built = RepLKNet(TINY, small_kernel_merged=True).eval()
    built.load_state_dict(after.state_dict(), strict=True)
    assert all(d.relative == 0 for d in compare_networks(after, built))


@pytest.mark.parametrize('kwargs', [{}, dict(layer_scale_init_value=0.0), dict(norm_cfg=dict(type='SyncBN'))], ids=str)
def test_unireplknet_in_float64(kwargs):
    model = unireplknet(**kwargs).double()
    x = torch.randn(2, 3, 96, 80, dtype=torch.float64)
    after, changes = reparameterize(model, fold=False)
    assert largest_gap(model(x), after(x)) <= 1e-10
    assert len(changes.merged) == 8 and changes.left == norms(after) == []
    built = UniRepLKNet(UNIREPLKNET, deploy=True).double()
    assert list(built.state_dict()) == list(after.state_dict())
    built.load_state_dict(after.state_dict())
    assert largest_gap(after(x), built(x)) <= 1e-12
    assert reparameterize(after)[1].merged == []
    folded, changes = reparameterize(model, merge=False)
    assert largest_gap(model(x), folded(x)) <= 1e-10
    behind_sums = [f'stages.{i}.{j}.norm' for i in (1, 2, 3) for j in (0, 1)]
    assert changes.left == [n for n in norms(model) if n.endswith('pwconv2.2') or n in behind_sums]


def test_unireplknet_keeps_what_it_cannot_merge():
    """A norm of another kind, a forward hook, a convolution that a second block uses: in these blocks only."""
    model = unireplknet()
    seen = []
    model.stages[0][1].norm.register_forward_hook(lambda *_: seen.append(1))
    model.stages[1][0].norm = nn.GroupNorm(2, 8)
    model.stages[2][1].pwconv2[0] = model.stages[2][0].pwconv2[0]
    after, changes = reparameterize(model)
    assert changes.merged == ['stages.0.0', 'stages.1.1', 'stages.3.0', 'stages.3.1']
    assert all(d.ok for d in compare_networks(model, after)) and seen
    frozen = unireplknet(frozen_stages=1)
    trainable = {n for n, p in reparameterize(frozen)[0].named_parameters() if p.requires_grad}
    assert {n.split('.')[1] for n in trainable if n.startswith('stages')} == {'1', '2', '3'}


def test_copy_and_in_place():
    model = backbone().train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    after, _ = reparameterize(model)
    assert after is not model and model.training and not any(m.training for m in after.modules())
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    theirs = {p.data_ptr() for p in model.parameters()}
    assert not [n for n, p in after.named_parameters() if p.data_ptr() in theirs]
    same, _ = reparameterize(model, inplace=True)
    assert same is model and norms(model) == [] and not any(m.training for m in model.modules())
    assert model.state_dict().keys() == after.state_dict().keys()


def test_twice_changes_nothing():
    once, _ = reparameterize(backbone())
    twice, changes = reparameterize(once)
    assert changes.merged == changes.folded == changes.left == []
    assert once.state_dict().keys() == twice.state_dict().keys()
    assert all(torch.equal(v, twice.state_dict()[k]) for k, v in once.state_dict().items())


def test_frozen_weights_stay_frozen():
    model = backbone()
    model.stages[0].requires_grad_(False)
    after, _ = reparameterize(model)
    for name, p in after.named_parameters():
        assert p.requires_grad == (not name.startswith('stages.0.')), name


def test_merged_network_trains():
    after, _ = reparameterize(backbone())
    sum(o.square().mean() for o in after.train()(torch.randn(2, 3, 64, 64))).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in after.parameters())


# what folding must leave alone, and what it must not


class WeightFlip(nn.Conv2d):
    """A convolution that computes something else with its weight."""

    def forward(self, x):
        return self._conv_forward(x, self.weight.flip(-1), self.bias)


class DoubledNorm(nn.BatchNorm2d):
    def forward(self, x):
        return 2 * super().forward(x)


class Double(nn.Module):
    def forward(self, weight):
        return 2 * weight


def conv(**kwargs):
    return nn.Conv2d(4, 4, 3, padding=1, **kwargs)


def parametrized():
    module = conv()
    parametrize.register_parametrization(module, 'weight', Double())
    return module


LEFT = {
    'another convolution class': lambda: nn.Sequential(WeightFlip(4, 4, 3, padding=1), nn.BatchNorm2d(4)),
    'weight standardization': lambda: ConvModule(4, 4, 3, padding=1, conv_cfg=dict(type='ConvAWS'), norm_cfg=BN),
    'parametrized weight': lambda: nn.Sequential(parametrized(), nn.BatchNorm2d(4)),
    'spectral norm': lambda: ConvModule(4, 4, 3, padding=1, norm_cfg=BN, with_spectral_norm=True),
    'forward hook': lambda: nn.Sequential(doubled(conv()), nn.BatchNorm2d(4)),
    'forward hook of the norm': lambda: nn.Sequential(conv(), doubled(nn.BatchNorm2d(4))),
    'backward hook of the norm': lambda: nn.Sequential(conv(), with_backward_hook(nn.BatchNorm2d(4))),
    'transposed convolution': lambda: nn.Sequential(nn.ConvTranspose2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)),
    'activation between': lambda: nn.Sequential(conv(), nn.ReLU(), nn.BatchNorm2d(4)),
    'norm in front of padding': lambda: nn.Sequential(nn.BatchNorm2d(4), conv()),
    'norm first': lambda: ConvModule(4, 4, 3, padding=1, norm_cfg=BN, order=('norm', 'conv', 'act')),
    'activation before norm': lambda: ConvModule(4, 4, 3, padding=1, norm_cfg=BN, order=('conv', 'act', 'norm')),
    'batch statistics': lambda: nn.Sequential(conv(), nn.BatchNorm2d(4, track_running_stats=False)),
    'another norm class': lambda: nn.Sequential(conv(), DoubledNorm(4)),
    'the norm of something else': lambda: nn.Sequential(nn.Conv2d(4, 4, 1), nn.PixelShuffle(2), nn.BatchNorm2d(1)),
}


@pytest.mark.parametrize('case', LEFT)
def test_left_alone(case):
    model = randomized(LEFT[case]())
    after, changes = reparameterize(model)
    assert changes.folded == [] and changes.left == norms(model) and len(changes.left) == 1
    x = torch.randn(1, 4, 6, 6)
    assert torch.equal(after(x), model.eval()(x))


FOLDED = {
    'Sequential': lambda: nn.Sequential(conv(), nn.BatchNorm2d(4), nn.ReLU()),
    'no affine': lambda: nn.Sequential(conv(bias=False), nn.BatchNorm2d(4, affine=False)),
    'groups': lambda: nn.Sequential(conv(groups=2), nn.BatchNorm2d(4)),
    'reflected padding': lambda: nn.Sequential(conv(padding_mode='reflect'), nn.BatchNorm2d(4)),
    'stride and dilation': lambda: nn.Sequential(nn.Conv2d(4, 6, 3, 2, dilation=2), nn.BatchNorm2d(6)),
    'ConvModule': lambda: ConvModule(4, 6, 3, padding=1, norm_cfg=BN),
    'ConvModule folded at run time': lambda: ConvModule(4, 6, 3, padding=1, norm_cfg=BN, efficient_conv_bn_eval=True),
    'ConvModule with circular padding': lambda: ConvModule(4, 6, 3, padding=1, padding_mode='reflect', norm_cfg=BN),
    'SyncBN': lambda: ConvModule(4, 6, 3, padding=1, norm_cfg=dict(type='SyncBN')),
    'depthwise': lambda: nn.Sequential(DepthwiseConv2d(4, 9, bias=False), nn.BatchNorm2d(4)),
    '1d': lambda: nn.Sequential(nn.Flatten(2), nn.Conv1d(4, 4, 3), nn.BatchNorm1d(4)),
}


@pytest.mark.parametrize('case', FOLDED)
def test_folded(case):
    model = randomize_norms(FOLDED[case]()).double().eval()
    after, changes = reparameterize(model)
    assert len(changes.folded) == 1 and changes.left == norms(after) == []
    x = torch.randn(2, 4, 8, 8, dtype=torch.float64)
    assert (after(x) - model(x)).abs().max() <= 1e-12 * model(x).abs().max()


# what calls the convolution and the norm


class Owner(nn.Module):
    """Has a convolution with a norm, and runs a function of itself and the input."""

    def __init__(self, run, proj=None) -> None:
        super().__init__()
        self.proj = nn.Sequential(conv(), nn.BatchNorm2d(4)) if proj is None else proj
        self.other, self.run = conv(), run

    def forward(self, x):
        return self.run(self, x)


class Pair(nn.Module):
    """A convolution and a norm as attributes."""

    def __init__(self, run=lambda m, x: m.norm(m.conv(x)), inner=None) -> None:
        super().__init__()
        self.conv, self.norm, self.inner, self.run = conv(), nn.BatchNorm2d(4), inner, run

    def forward(self, x):
        return self.run(self, x)


class Reuses(nn.Sequential):
    def forward(self, x):
        return self[0](x) + super().forward(x)


class NoNorm(ConvModule):
    def forward(self, x):
        return self.conv(x)


def doubled(module):
    module.register_forward_hook(lambda *args: args[-1] * 2)
    return module


def with_backward_hook(module):
    module.register_full_backward_hook(lambda *_: None)
    return module


def replaced(module):
    module.forward = module[0].forward
    return module


def block_with_hook(path, kind):
    def build():
        model = RepLKBlock(4, 5, 3, 1, 1, True, 0.0, False, BN, dict(type='ReLU'))
        hook = (lambda m, args: args[0] * 2) if 'pre' in kind else (lambda m, args, out: out * 2)
        getattr(model.get_submodule(path), kind)(hook)
        return model

    return build


def module_list():
    return nn.ModuleList([nn.Sequential(nn.Sequential(conv(), nn.BatchNorm2d(4)))])


def conv_module():
    return ConvModule(4, 4, 3, padding=1, norm_cfg=BN)


EXPOSED = {
    'called by index': lambda: Owner(lambda m, x: m.proj[0](x) + m.proj(x)),
    'called by its parent': lambda: Owner(lambda m, x: m.proj.proj[0](x) + m.proj(x), Owner(lambda m, x: m.proj(x))),
    'weight read': lambda: Owner(lambda m, x: nn.functional.conv2d(x, m.proj[0].weight, padding=1) + m.proj(x)),
    'norm of two convolutions': lambda: Owner(lambda m, x: m.proj[1](m.other(x)) + m.proj(x)),
    'sliced': lambda: Owner(lambda m, x: m.proj[:1](x) + m.proj(x)),
    'nested, by index': lambda: Owner(lambda m, x: m.proj[0][0][0](x) + m.proj[0](x), module_list()),
    'owner that cannot be traced': lambda: Owner(lambda m, x: m.proj(x) if x.sum() > 1e9 else m.proj[0](x)),
    'subclass of Sequential in an owner that cannot be traced': lambda: Owner(
        lambda m, x: m.proj(x) if x.sum() > 1e9 else m.proj[0](x), Sequential(conv(), nn.BatchNorm2d(4))
    ),
    'nested, in an owner that cannot be traced': lambda: Owner(
        lambda m, x: m.proj(x) if x.sum() > 1e9 else m.proj[0][0](x),
        nn.Sequential(nn.Sequential(conv(), nn.BatchNorm2d(4)), nn.ReLU()),
    ),
    'owner with its own forward': lambda: Owner(
        lambda m, x: m.proj(x), replaced(nn.Sequential(conv(), nn.BatchNorm2d(4)))
    ),
    'map before the norm read': lambda: Pair(lambda m, x: m.norm(y := m.conv(x)) + y),
    'norm of a sum': lambda: Pair(lambda m, x: m.norm(m.conv(x) + x)),
    'norm also of the input': lambda: Pair(lambda m, x: m.norm(m.conv(x)) + m.norm(x)),
    'norm that its caller reads': lambda: Owner(lambda m, x: m.proj(x) * m.proj.norm.weight.sum(), Pair()),
    'convolution that its caller uses': lambda: Owner(lambda m, x: m.proj(x) + m.proj.conv(x), Pair()),
    'norm that only some inputs need': lambda: Pair(
        lambda m, x: m.norm(y) if (y := m.conv(x)).sum() > 1e9 else m.norm(y) + y
    ),
    'norm that only some inputs of a part need': lambda: Owner(
        lambda m, x: m.proj.norm(m.proj(x)), Pair(lambda m, x: m.conv(x) if x.sum() > 1e9 else m.conv(x) + x)
    ),
    'hooked pair whose convolution its caller uses': lambda: Owner(
        lambda m, x: m.proj(x) + m.proj.conv(x), doubled(Pair())
    ),
    'subclass of Sequential': lambda: Reuses(conv(), nn.BatchNorm2d(4)),
    'subclass of ConvModule': lambda: NoNorm(4, 4, 3, padding=1, norm_cfg=BN),
    'convolution of ConvModule': lambda: Owner(lambda m, x: m.proj.conv(x) + m.proj(x), conv_module()),
    'ConvModule without its norm': lambda: Owner(lambda m, x: m.proj(x, norm=False) + m.proj(x), conv_module()),
}


@pytest.mark.parametrize('case', EXPOSED)
def test_convolutions_with_another_user_are_left_alone(case):
    model = randomize_norms(EXPOSED[case]()).eval()
    after, changes = reparameterize(model)
    assert changes.folded == [] and changes.left == norms(model)
    x = torch.randn(1, 4, 6, 6)
    assert torch.equal(after(x), model(x))


WHOLE = {
    'owner': lambda: Owner(lambda m, x: m.proj(x) + m.other(x)),
    'attributes': Pair,
    'called twice': lambda: Owner(lambda m, x: m.proj(m.proj(x)), Pair()),
    'attributes with a hook': lambda: Owner(lambda m, x: m.proj(x), doubled(Pair())),
    'attributes in an owner that cannot be traced': lambda: Owner(
        lambda m, x: m.proj(x) if x.sum() > 1e9 else m.proj(2 * x), Pair()
    ),
    'norm in front of a convolution of another module': lambda: Pair(
        lambda m, x: m.inner(m.norm(x)), inner=Owner(lambda m, x: m.proj(x).relu(), nn.Sequential(nn.Conv2d(4, 4, 1)))
    ),
    'hook of the pair': lambda: Owner(lambda m, x: m.proj(x), doubled(nn.Sequential(conv(), nn.BatchNorm2d(4)))),
    'subclass of Sequential': lambda: Owner(lambda m, x: m.proj(x), Sequential(conv(), nn.BatchNorm2d(4))),
    'nested in lists': lambda: Owner(lambda m, x: sum(each(x) for each in m.proj), module_list()),
    'nested, by its parent': lambda: Owner(lambda m, x: m.proj[0][0](x), module_list()),
    'list of features': lambda: Owner(lambda m, x: m.proj([x])[0], Owner(lambda m, x: replace_item(x, m.proj))),
    'owner that cannot be traced': lambda: Owner(lambda m, x: m.proj(x) if x.sum() > 1e9 else m.proj(x), conv_module()),
}


def replace_item(features, module):
    features[0] = module(features[0])
    return features


@pytest.mark.parametrize('case', WHOLE)
def test_pairs_that_are_called_as_a_whole_are_folded(case):
    model = randomize_norms(WHOLE[case]()).double().eval()
    after, changes = reparameterize(model)
    assert len(changes.folded) == 1 and norms(after) == changes.left == []
    x = torch.randn(1, 4, 6, 6, dtype=torch.float64)
    assert (after(x) - model(x)).abs().max() <= 1e-12 * model(x).abs().max()


@pytest.mark.parametrize(
    'path, kind, merged, left',
    [
        ('pw1', 'register_forward_pre_hook', 1, ['prelkb_bn']),
        ('large_kernel.lkb_origin', 'register_forward_hook', 0, []),
        ('large_kernel.small_conv.bn', 'register_forward_hook', 0, ['large_kernel.small_conv.bn']),
        ('large_kernel', 'register_forward_hook', 1, []),
        ('pw2', 'register_forward_hook', 1, []),
    ],
)
def test_hooks_keep_their_place(path, kind, merged, left):
    model = randomize_norms(block_with_hook(path, kind)()).double().eval()
    after, changes = reparameterize(model)
    assert len(changes.merged) == merged and changes.left == left
    x = torch.randn(1, 4, 8, 8, dtype=torch.float64)
    assert (after(x) - model(x)).abs().max() <= 1e-12 * model(x).abs().max()


def test_a_branch_with_another_user_is_not_merged():
    model = randomize_norms(RepLKBlock(4, 5, 3, 1, 1, True, 0.0, False, BN, dict(type='ReLU'))).eval()
    model.borrowed = model.large_kernel.small_conv
    after, changes = reparameterize(model)
    assert changes.merged == [] and hasattr(after.large_kernel, 'small_conv')


class DoubledBranch(ConvNorm):
    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize('name', ['lkb_origin', 'small_conv'])
def test_a_branch_with_its_own_forward_is_not_merged(name):
    block = randomize_norms(ReparamLargeKernelConv(4, 5, 3, 1, False, BN)).eval()
    getattr(block, name).__class__ = DoubledBranch
    x = torch.randn(1, 4, 6, 6)
    expected = block(x)
    after, changes = reparameterize(block)
    assert changes.merged == []
    torch.testing.assert_close(after(x), expected)


def test_merged_weights_are_rounded_once():
    block = randomize_norms(ReparamLargeKernelConv(64, 5, 3, 1, False, BN)).eval()
    weight, bias = 0, 0
    for branch, ring in ((block.lkb_origin, 0), (block.small_conv, 1)):
        scale = branch.bn.weight.double() / (branch.bn.running_var.double() + branch.bn.eps).sqrt()
        weight = weight + nn.functional.pad(branch.conv.weight.double() * scale.view(-1, 1, 1, 1), (ring,) * 4)
        bias = bias + branch.bn.bias.double() - branch.bn.running_mean.double() * scale
    merged = reparameterize(block)[0].lkb_reparam
    for found, exact in ((merged.weight, weight), (merged.bias, bias)):
        # The nearest float32; of two values as near as this, either.
        assert ((found.double() - exact).abs() <= (exact.float().double() - exact).abs() * (1 + 1e-6)).all()


# wrappers and modes


class Net(nn.Module):
    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, x):
        return self.backbone(x)


compiled = partial(torch.compile, backend='eager')
ddp = nn.parallel.DistributedDataParallel


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('inplace', [False, True])
@pytest.mark.parametrize(
    'wrap',
    [
        ddp,
        compiled,
        nn.DataParallel,
        checkpoint_wrapper,
        lambda model: compiled(ddp(model)),
        lambda model: Net(ddp(model)),
        lambda model: Net(compiled(model)),
    ],
)
def test_wrapped_models(wrap, inplace):
    model, x = backbone().eval(), torch.randn(1, 3, 64, 64)
    expected = model(x)
    with single_process_group():
        wrapped = wrap(model)
        after, changes = reparameterize(wrapped, inplace=inplace)
        assert len(changes.merged) == 5 and norms(after) == changes.left == []
        assert not [name for name in after.state_dict() if '_orig_mod' in name or 'module' in name]
        assert largest_gap(expected, after(x)) <= 1e-5
        assert inplace or norms(wrapped)


@pytest.mark.parametrize('build', [fully_shard, partial(FullyShardedDataParallel, device_id=torch.device('cpu'))])
def test_sharded_models_are_rejected(build):
    with single_process_group(), pytest.raises(UserError, match='FSDP.*\n.*full state dict'):
        reparameterize(Net(build(backbone())))


@pytest.mark.parametrize('built_inside', [False, True])
@pytest.mark.parametrize('inplace', [False, True])
def test_inference_mode_gives_a_network_that_trains(built_inside, inplace):
    with torch.inference_mode(built_inside):
        model = backbone()
    with torch.inference_mode():
        after, _ = reparameterize(model, inplace=inplace)
    changed = [p for name, p in after.named_parameters() if 'lkb_reparam' in name or 'pw1' in name]
    assert changed and not any(t.is_inference() for t in [*changed, *after.buffers()])
    assert inplace or not any(p.is_inference() for p in after.parameters())
    if not built_inside or not inplace:
        sum(o.square().mean() for o in after.train()(torch.randn(2, 3, 64, 64))).backward()
        assert all(p.grad is not None for p in after.parameters())


def test_group_norm_stays():
    model = RepLKNet(TINY, norm_cfg=dict(type='GN', num_groups=2)).eval()
    after, changes = reparameterize(model)
    assert changes.merged == changes.folded == changes.left == []
    assert after.state_dict().keys() == model.state_dict().keys()


def test_norm_in_front_of_a_padded_convolution():
    """Behind the norm the border is zero; folded, it would be something else."""
    ffn = ConvFFN(4, 1, 0.0, BN)
    ffn.pw1.conv = conv(bias=False)
    randomize_norms(ffn).double().eval()
    after, changes = reparameterize(ffn)
    assert sorted(changes.folded) == ['pw1.bn', 'pw2.bn'] and changes.left == ['preffn_bn']
    x = torch.randn(1, 4, 6, 6, dtype=torch.float64)
    assert torch.allclose(after(x), ffn(x), rtol=0, atol=1e-12)


@pytest.mark.parametrize('bias', [False, True])
def test_norm_in_front_of_a_grouped_convolution(bias):
    ffn = ConvFFN(4, 2, 0.0, BN)
    ffn.pw1.conv = nn.Conv2d(4, 8, 1, groups=2, bias=bias)
    randomize_norms(ffn).double().eval()
    after, changes = reparameterize(ffn)
    assert changes.left == []
    x = torch.randn(1, 4, 6, 6, dtype=torch.float64)
    assert torch.allclose(after(x), ffn(x), rtol=0, atol=1e-12)


def test_shared_norm_is_left_alone():
    norm = nn.BatchNorm2d(4)
    pairs = nn.ModuleList([nn.Sequential(conv(), norm) for _ in range(2)])
    model = randomize_norms(Owner(lambda m, x: m.proj[0](x) + m.proj[1](2 * x), pairs)).eval()
    after, changes = reparameterize(model)
    assert changes.folded == [] and changes.left == norms(model)
    x = torch.randn(1, 4, 6, 6)
    assert torch.equal(after(x), model(x))


def test_shared_convolution_serves_all_its_norms():
    """As in heads that share convolutions between pyramid levels and keep a norm for each."""
    shared = conv()
    model = randomize_norms(nn.ModuleList([nn.Sequential(shared, nn.BatchNorm2d(4)) for _ in range(2)]))
    for i, branch in enumerate(model):
        randomize_norms(branch[1], seed=i)
    after, changes = reparameterize(model)
    assert changes.folded == [] and len(changes.left) == 2
    x = torch.randn(1, 4, 6, 6)
    assert all(torch.equal(a(x), b.eval()(x)) for a, b in zip(after, model, strict=True))


def test_convnext_has_nothing_to_fold():
    model = ConvNeXt(dict(depths=[1, 1, 1, 1], channels=[8, 8, 8, 8]))
    after, changes = reparameterize(model)
    assert changes.merged == changes.folded == changes.left == []
    assert all(d.relative == 0 for d in compare_networks(model, after))
