"""Learning rates by depth: against mmdet's and mmseg's constructors, mmengine's multipliers, and tables by hand."""

import copy
import json
from functools import cache, partial

import pytest
import torch
from mmengine.config import Config
from mmengine.model import MMDistributedDataParallel
from mmengine.optim import DefaultOptimWrapperConstructor, OptimWrapperDict, build_optim_wrapper
from mmengine.registry import MODELS, DefaultScope
from process_group import fully_shard, single_process_group
from tiny import ROOT, tiny  # noqa: F401 (a fixture)
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import FullyShardedDataParallel

from replk_mm.backbones import ConvNeXt, RepLKNet
from replk_mm.deploy import reparameterize as reparam
from replk_mm.engine.hooks import parameter_groups, write_parameter_groups
from replk_mm.engine.optim import LayerDecayOptimizerConstructor
from replk_mm.errors import UserError

SMALL = {
    'ConvNeXt': dict(arch=dict(depths=[1, 1, 4, 1], channels=[4, 8, 8, 8]), out_indices=(0, 1, 2, 3)),
    'RepLKNet': dict(
        arch=dict(
            large_kernel_sizes=[5, 5, 5, 3], small_kernel=3, layers=[1, 1, 4, 1], channels=[4, 4, 4, 4], dw_ratio=1
        )
    ),
}


class Net(nn.Module):
    """A backbone and something after it."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.Sequential(nn.Conv2d(8, 4, 3, groups=2), nn.BatchNorm2d(4))  # in groups, not depthwise


def small(family: str = 'ConvNeXt', **kwargs) -> Net:
    return Net({'ConvNeXt': ConvNeXt, 'RepLKNet': RepLKNet}[family](**{**SMALL[family], **kwargs}))


def wrapper_cfg(lr: float = 1e-3, weight_decay: float = 0.05) -> dict:
    return dict(type='OptimWrapper', optimizer=dict(type='AdamW', lr=lr, weight_decay=weight_decay))


def build(model: nn.Module, cls=LayerDecayOptimizerConstructor, **paramwise):
    if cls is LayerDecayOptimizerConstructor:
        paramwise.setdefault('decay_rate', 0.5)
    return cls(wrapper_cfg(), paramwise)(model)


def settings(model: nn.Module, wrapper) -> dict[str, tuple[float, float]]:
    """Parameter name to learning rate and weight decay."""
    of = {id(p): (g['lr'], g['weight_decay']) for g in wrapper.optimizer.param_groups for p in g['params']}
    return {n: of[id(p)] for n, p in model.named_parameters() if id(p) in of}


# ---- ConvNeXt, as mmdet and mmseg do it


@cache
def published(kind: str, arch: str) -> nn.Module:
    pytest.importorskip('mmseg')
    pytest.importorskip('mmdet')
    if kind == 'upernet':
        model = Config.fromfile(ROOT / 'configs' / f'upernet_convnext-{arch}_ade20k.py').model
        scope = 'mmseg'
    else:
        import mmdet

        model = Config.fromfile(f'{mmdet.__path__[0]}/.mim/configs/_base_/models/cascade-mask-rcnn_r50_fpn.py').model
        model.backbone = dict(
            type='replk_mm.ConvNeXt', arch=arch, out_indices=(0, 1, 2, 3), gap_before_final_norm=False
        )
        model.neck.in_channels = [w * {'tiny': 96, 'base': 128}[arch] for w in (1, 2, 4, 8)]
        scope = 'mmdet'
    with MODELS.switch_scope_and_registry(scope) as registry, torch.device('meta'):
        return registry.build(copy.deepcopy(model))


@pytest.mark.parametrize(
    'arch, decay_type, num_layers',
    [
        ('tiny', 'layer_wise', 6),
        ('tiny', 'layer_wise', 12),
        ('base', 'layer_wise', 12),
        ('tiny', 'stage_wise', 6),
        ('tiny', 'stage_wise', 12),
        ('base', 'stage_wise', 6),
        ('base', 'stage_wise', 12),
    ],
)
@pytest.mark.parametrize('kind', ['upernet', 'cascade'])
def test_groups_are_those_of_mmdet_and_mmseg(kind, arch, decay_type, num_layers):
    """All of it: the parameters of each group, their order and that of the groups, rates and weight decays."""
    model = published(kind, arch)
    from mmdet.engine.optimizers import LearningRateDecayOptimizerConstructor as Mmdet
    from mmseg.engine.optimizers import LearningRateDecayOptimizerConstructor as Mmseg

    paramwise = dict(decay_rate=0.7, decay_type=decay_type, num_layers=num_layers)
    own, *references = (
        [{**group, 'params': [id(p) for p in group['params']]} for group in groups]
        for groups in (
            build(model, cls, **paramwise).optimizer.param_groups
            for cls in (LayerDecayOptimizerConstructor, Mmdet, Mmseg)
        )
    )
    assert 10 < len(own) < 30 and own == references[0] == references[1]


@pytest.mark.parametrize('arch, layers', [('tiny', 6), ('base', 12)])
def test_num_layers_is_the_networks_own(arch, layers):
    model = published('upernet', arch)
    left_out = settings(model, build(model, decay_rate=0.7))
    assert left_out == settings(model, build(model, decay_rate=0.7, num_layers=layers))
    with pytest.raises(UserError, match=rf'num_layers=5.*ConvNeXt has {layers} layers\n.*set it to {layers} or more'):
        build(model, decay_rate=0.7, num_layers=5)
    stages = settings(model, build(model, decay_rate=0.7, decay_type='stage_wise'))
    assert stages['backbone.stages.3.0.gamma'][0] == pytest.approx(0.7e-3)
    assert stages['backbone.downsample_layers.3.0.weight'][0] == pytest.approx(0.7e-3 * 0.7**4)
    with pytest.raises(UserError, match='num_layers=3.*has 4 stages\n.*set it to 4 or more'):
        build(model, decay_type='stage_wise', num_layers=3)


# ---- RepLKNet, by hand: three pairs of blocks a layer in the third stage

# Steps below the full rate, as exponents of the decay.
LAYERS_31B = {
    'stem': 10,
    'stages.0': 9,
    'transitions.0': 8,
    'stages.1': 8,
    'transitions.1': 7,
    'transitions.2': 1,
    'stages.3': 1,
    **{f'stages.2.blocks.{i}': [7, 6, 5, 4, 3, 2][i // 6] for i in range(36)},
}
LAYERS_NANO = {
    'stem': 6,
    'stages.0': 5,
    'transitions.0': 4,
    'stages.1': 4,
    'transitions.1': 3,
    'transitions.2': 1,
    'stages.3': 1,
    **{f'stages.2.blocks.{i}': 3 if i < 6 else 2 for i in range(8)},
}
STAGES = {'stem': 5, 'transitions': 5, 'stages.0': 4, 'stages.1': 3, 'stages.2': 2, 'stages.3': 1}


def assert_steps(model: nn.Module, steps: dict[str, int], found: dict[str, tuple[float, float]]) -> None:
    assert found.keys() == dict(model.named_parameters()).keys()
    for name, (lr, weight_decay) in found.items():
        own = name.removeprefix('backbone.')
        expected = [n for part, n in steps.items() if f'{own}.'.startswith(f'{part}.')] if own != name else [0]
        if own.split('.')[2:3] == ['norm']:
            expected = [0]
        assert len(expected) == 1, name
        assert lr == pytest.approx(1e-3 * 0.5 ** expected[0], rel=1e-12), name
        param = model.get_parameter(name)
        assert weight_decay == (0.0 if param.ndim == 1 or name.endswith('.bias') else 0.05), name


@pytest.mark.parametrize('arch, layers', [('31B', LAYERS_31B), ('XL', LAYERS_31B), ('nano', LAYERS_NANO)])
@pytest.mark.parametrize('merged', [False, True])
def test_replknet_by_hand(arch, layers, merged):
    with torch.device('meta'):
        model = Net(RepLKNet(arch, small_kernel_merged=merged, norm_intermediate_features=arch == 'XL'))
    assert_steps(model, layers, settings(model, build(model)))
    assert_steps(model, STAGES, settings(model, build(model, decay_type='stage_wise')))


@pytest.mark.parametrize(
    'depths, layers',
    [
        ([4, 7, 7, 5], [[1] * 4, [2] * 7, [3, 3, 3, 4, 4, 4, 5], [6] * 5]),
        ([4, 4, 7], [[1] * 4, [2] * 4, [3] * 7]),
        ([1, 1, 7, 1, 4], [[1], [2], [3] * 7, [4], [5] * 4]),
    ],
)
def test_only_the_third_stage_of_four_has_several_layers(depths, layers):
    with torch.device('meta'):
        model = ConvNeXt(dict(depths=depths, channels=[4] * len(depths)))
    count = max(map(max, layers)) + 2
    for stage, expected in enumerate(layers):
        found = [model.get_layer_depth(f'stages.{stage}.{block}.gamma') for block in range(depths[stage])]
        assert found == [(layer, count) for layer in expected]


def test_folded_networks_keep_their_depths():
    model = small('RepLKNet')
    before = len(list(model.named_parameters()))
    folded, changes = reparam.reparameterize(model)
    assert changes.merged and changes.folded
    assert len(list(folded.named_parameters())) < before
    assert_steps(folded, {**LAYERS_NANO}, settings(folded, build(folded)))
    assert_steps(folded, STAGES, settings(folded, build(folded, decay_type='stage_wise')))


# ---- the backbone tells


class Vit(nn.Module):
    """Another project's backbone, with mmpretrain's interface."""

    def __init__(self) -> None:
        super().__init__()
        self.pos_embed = nn.Parameter(torch.zeros(1, 4, 8))
        self.patch_embed = nn.Conv2d(3, 8, 4)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.last = nn.LayerNorm(8)

    def get_layer_depth(self, param_name: str, prefix: str = ''):
        if not param_name.startswith(prefix):
            return 4, 5
        part, *rest = param_name[len(prefix) :].split('.')
        return (int(rest[0]) + 1 if part == 'layers' else 4 if part == 'last' else 0), 5


def test_any_backbone_with_layer_depths_works():
    model = Net(Vit())
    model.table = nn.Module()
    model.table.bias = nn.Parameter(torch.zeros(2, 2))
    found = settings(model, build(model))
    assert found['table.bias'] == (1e-3, 0)
    steps = {
        'pos_embed': 4,
        'patch_embed.weight': 4,
        'layers.0.weight': 3,
        'layers.1.bias': 2,
        'layers.2.weight': 1,
        'last.weight': 0,
    }
    assert {n: found[f'backbone.{n}'][0] for n in steps} == {n: 1e-3 * 0.5**s for n, s in steps.items()}
    assert found['backbone.pos_embed'][1] == 0 and found['backbone.patch_embed.weight'][1] == 0.05
    with pytest.raises(UserError, match=r"'Vit'.*get_stage_depth\(name, prefix\)"):
        build(model, decay_type='stage_wise')


def test_backbone_without_layer_depths_is_rejected():
    with pytest.raises(UserError, match="model.backbone.type='Conv2d'.*get_layer_depth"):
        build(Net(nn.Conv2d(3, 8, 3)))
    with pytest.raises(UserError, match='Linear has no backbone'):
        build(nn.Linear(2, 2))


@pytest.mark.parametrize('family', SMALL)
@pytest.mark.parametrize('where', ['', 'stages.2'])
def test_a_parameter_without_depth_is_rejected(family, where):
    model = small(family)
    model.backbone.get_submodule(where).add_module('adapter', nn.Linear(2, 2))
    name = f'backbone.{where}.adapter.weight'.replace('..', '.')
    for decay_type, method in (('layer_wise', 'get_layer_depth'), ('stage_wise', 'get_stage_depth')):
        with pytest.raises(UserError, match=f'^{name}: {family}.{method} gives no depth.*\n.*Freeze'):
            build(model, decay_type=decay_type)
    model.backbone.get_submodule(where).adapter.requires_grad_(False)
    assert name not in settings(model, build(model))


def compile_parts(model: Net) -> Net:
    """Compile some stages, and recompute another in the backward pass."""
    for i in (0, 2):
        model.backbone.stages[i] = torch.compile(model.backbone.stages[i], backend='eager')
    model.backbone.stages[1] = checkpoint_wrapper(model.backbone.stages[1])
    return model


def wrap_backbone(wrap) -> Net:
    model = small()
    model.backbone = wrap(model.backbone)
    return model


WRAPPED = {
    'compiled': lambda: torch.compile(small(), backend='eager'),
    'compiled backbone': lambda: wrap_backbone(partial(torch.compile, backend='eager')),
    'compiled and checkpointed stages': lambda: compile_parts(small()),
    'data parallel': lambda: nn.DataParallel(small()),
    'DDP': lambda: nn.parallel.DistributedDataParallel(small()),
    'DDP of the backbone': lambda: wrap_backbone(MMDistributedDataParallel),
    'compiled DDP of a compiled backbone': lambda: torch.compile(
        nn.parallel.DistributedDataParallel(wrap_backbone(partial(torch.compile, backend='eager'))), backend='eager'
    ),
    'fully_shard': lambda: fully_shard(wrap_backbone(fully_shard)),
    'FSDP with the original parameters': lambda: FullyShardedDataParallel(
        wrap_backbone(partial(FullyShardedDataParallel, use_orig_params=True, device_id=torch.device('cpu'))),
        use_orig_params=True,
        device_id=torch.device('cpu'),
    ),
}


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('kind', WRAPPED)
@pytest.mark.parametrize('paramwise', [{}, dict(decay_type='stage_wise', custom_keys={'backbone.stages.2.0': {}})])
def test_wrappers_do_not_change_the_groups(kind, paramwise):
    def groups(model):
        wrapper = build(model, **paramwise)
        found = [{k: v for k, v in group.items() if k != 'params'} for group in wrapper.optimizer.param_groups]
        return found, parameter_groups(wrapper, model)

    with single_process_group():
        assert groups(WRAPPED[kind]()) == groups(small())


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('whole', [False, True])
def test_flattened_parameters_are_rejected(whole):
    """FSDP's first version hides the names and shapes, and with them layers and weight decay."""
    flatten = partial(FullyShardedDataParallel, device_id=torch.device('cpu'))
    with single_process_group():
        model = flatten(small()) if whole else wrap_backbone(flatten)
        with pytest.raises(UserError, match='_flat_param: .* hides .*\nUse .*fully_shard'):
            build(model)
    model = small()
    weight = model.backbone.stages[0][0].pointwise_conv1
    weight.weight = nn.Parameter(weight.weight.detach().flatten())  # what a process of several has
    with pytest.raises(UserError, match='^backbone.stages.0.0.pointwise_conv1.weight: Net hides'):
        build(model)


class Forwards(nn.Module):
    """A wrapper that nobody knows, with the attributes of the model inside."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__('inner'), name)


def test_unknown_wrappers_are_rejected():
    with pytest.raises(UserError, match='^backbone.*: Forwards hides'):
        build(Forwards(small()))


def test_frozen_parameters_are_left_out():
    model = small(frozen_stages=2)
    found = settings(model, build(model))
    expected = {n for n, p in model.named_parameters() if p.requires_grad}
    assert found.keys() == expected and len(expected) < len(list(model.parameters()))
    everything = small(frozen_stages=4)
    everything.backbone.requires_grad_(False)
    assert {lr for lr, _ in settings(everything, build(everything)).values()} == {1e-3}


# ---- mmengine's multipliers, against mmengine

MULTIPLIERS = dict(
    bias_lr_mult=2.0, norm_decay_mult=0.1, bias_decay_mult=0.2, dwconv_decay_mult=0.3, flat_decay_mult=0.4
)


@pytest.mark.parametrize('family', SMALL)
@pytest.mark.parametrize(
    'extra',
    [
        {},
        dict(
            custom_keys={
                'backbone.stages.2': dict(lr_mult=3.0, decay_mult=0.5),
                'stages.2': dict(lr_mult=9.0, decay_mult=9.0),
                # Of equal length: the first in the alphabet counts.
                'stages.1': dict(lr_mult=5.0, decay_mult=7.0),
                'backbone': dict(lr_mult=4.0, decay_mult=0.25),
                'head': dict(lr_mult=10.0, decay_mult=0.0),
            }
        ),
    ],
)
def test_multipliers_are_mmengines(family, extra):
    model, paramwise = small(family), {**MULTIPLIERS, **extra}
    expected = settings(model, build(model, DefaultOptimWrapperConstructor, **paramwise))
    found = settings(model, build(model, decay_rate=1.0, **paramwise))
    assert found.keys() == expected.keys()
    for name in expected:
        assert found[name] == pytest.approx(expected[name], rel=1e-12), name
    plain, decayed = settings(model, build(model)), settings(model, build(model, **paramwise))
    assert len({lr for lr, _ in plain.values()}) == 7  # stem, five layers, the rest
    for name in expected:
        assert decayed[name][0] == pytest.approx(plain[name][0] * expected[name][0] / 1e-3, rel=1e-12), name


def test_custom_keys_change_only_matching_parameters():
    model = small()
    plain = settings(model, build(model))
    found = settings(model, build(model, custom_keys={'head': dict(lr_mult=10.0), 'gamma': dict(decay_mult=1.0)}))
    for name, (lr, weight_decay) in plain.items():
        assert found[name] == (
            lr * 10 if name.startswith('head') else lr,
            0.05 if name.endswith('gamma') else weight_decay,
        )


def test_shared_parameters_enter_once():
    model = small()
    expected = settings(model, build(model))
    model.other = model.head
    assert settings(model, build(model)) == expected
    model.borrowed = model.backbone.stages[0]
    name = 'backbone.stages.0.0.gamma and borrowed.0.gamma share one parameter'
    with pytest.raises(UserError, match=name):
        build(model)
    with pytest.raises(UserError, match=name):
        build(model, bypass_duplicate=False)
    assert settings(model, build(model, bypass_duplicate=True)) == expected


@pytest.mark.parametrize(
    'paramwise, message',
    [
        (dict(decay_rat=0.9), r'paramwise_cfg.decay_rat: .*no such field\nDid you mean decay_rate\?'),
        (dict(dcn_offset_lr_mult=0.1), r'paramwise_cfg.dcn_offset_lr_mult: .*no such field\n.*It takes: decay_rate'),
        (dict(decay_rate=None), 'decay_rate=None: must be above 0'),
        (dict(decay_rate=0), 'decay_rate=0'),
        (dict(decay_rate=1.1), 'decay_rate=1.1'),
        (dict(decay_rate='0.9'), "decay_rate='0.9'"),
        (dict(decay_type='layerwise'), "decay_type='layerwise': is unknown\nUse one of: layer_wise, stage_wise"),
        (dict(num_layers=0), 'num_layers=0'),
        (dict(norm_decay_mult='0'), "norm_decay_mult='0': must be a number"),
        (dict(custom_keys=dict(head=0.1)), r"custom_keys\['head'\]=0.1"),
        (dict(custom_keys=dict(head=dict(lr_mul=0.1))), r"custom_keys\['head'\].lr_mul: .*\nDid you mean lr_mult\?"),
        (dict(custom_keys=dict(head=dict(lr_mult=None))), r"custom_keys\['head'\].lr_mult=None"),
        (
            dict(custom_keys=dict(haed=dict(lr_mult=0.1))),
            r"custom_keys\['haed'\]: matches no parameter name\nDid you mean head\?",
        ),
    ],
)
def test_mistakes_are_named(paramwise, message):
    with pytest.raises(UserError, match=message) as caught:
        build(small(), **paramwise)
    assert len(str(caught.value).splitlines()) >= 2


def test_rates_must_be_given():
    for key in ('lr', 'weight_decay'):
        cfg = wrapper_cfg()
        del cfg['optimizer'][key]
        with pytest.raises(UserError, match=f'optimizer.{key}=None'):
            LayerDecayOptimizerConstructor(cfg, dict(decay_rate=0.5))
    with pytest.raises(UserError, match='decay_rate=None'):
        LayerDecayOptimizerConstructor(wrapper_cfg())


# ---- resuming


def step(model: nn.Module, wrapper) -> None:
    for i, p in enumerate(model.parameters()):
        p.grad = torch.full_like(p, i + 1.0)
    wrapper.step()


def moments(model: nn.Module, wrapper) -> dict[str, float]:
    return {n: wrapper.optimizer.state[p]['exp_avg'].flatten()[0].item() for n, p in model.named_parameters()}


def test_runs_of_mmseg_resume():
    constructor = pytest.importorskip('mmseg.engine.optimizers').LearningRateDecayOptimizerConstructor
    paramwise = dict(decay_rate=0.7, decay_type='stage_wise', num_layers=12)
    model, other = small(), small()
    theirs, own = build(model, constructor, **paramwise), build(other, **paramwise)
    step(model, theirs)
    own.load_state_dict(copy.deepcopy(theirs.state_dict()))
    expected = {n: 0.1 * (i + 1) for i, (n, _) in enumerate(model.named_parameters())}
    assert moments(other, own) == pytest.approx(expected)
    back = build(model, constructor, **paramwise)
    back.load_state_dict(copy.deepcopy(own.state_dict()))
    assert moments(model, back) == pytest.approx(expected)


def test_scopes_of_other_projects_find_it():
    for scope in ('mmengine', 'mmseg', 'mmdet'):
        with DefaultScope.overwrite_default_scope(scope):
            wrapper = build_optim_wrapper(
                small(),
                dict(
                    wrapper_cfg(),
                    constructor='replk_mm.LayerDecayOptimizerConstructor',
                    paramwise_cfg=dict(decay_rate=0.5),
                ),
            )
        assert wrapper.optimizer.param_groups[0]['lr'] == 1e-3 * 0.5**6


# ---- the table


def test_the_table_counts_every_parameter(tmp_path):
    model = small(frozen_stages=1)
    wrapper = build(model)
    found = parameter_groups(wrapper, model)
    params = dict(model.named_parameters())
    by_settings: dict[tuple, list[str]] = {}
    for name, (lr, weight_decay) in settings(model, wrapper).items():
        by_settings.setdefault((lr, weight_decay), []).append(name)
    assert len(found) == len(by_settings) + 1
    for row in found[:-1]:
        names = by_settings[row['lr'], row['weight_decay']]
        assert (row['tensors'], row['parameters']) == (len(names), sum(params[n].numel() for n in names))
        assert (row['first'], row['last']) == (names[0], names[-1])
    frozen = [n for n, p in params.items() if not p.requires_grad]
    assert [found[-1][k] for k in ('group', 'tensors', 'first', 'last')] == [
        'frozen',
        len(frozen),
        frozen[0],
        frozen[-1],
    ]
    assert sum(row['parameters'] for row in found) == sum(p.numel() for p in params.values())

    (tmp_path / 'mine').write_text('my work')
    for suffix in ('txt', 'json'):
        (tmp_path / f'groups.{suffix}').symlink_to('mine')
    write_parameter_groups(wrapper, model, tmp_path / 'groups.txt')
    assert (tmp_path / 'mine').read_text() == 'my work'  # links are replaced
    assert json.loads((tmp_path / 'groups.json').read_text()) == found
    lines = [line.split() for line in (tmp_path / 'groups.txt').read_text().splitlines()]
    assert lines[0] == ['group', 'lr', 'weight_decay', 'tensors', 'parameters', 'first', 'last']
    assert [line[0] for line in lines[2:]] == [row['group'] for row in found]
    assert [float(line[1]) for line in lines[2:]] == pytest.approx([row['lr'] for row in found], rel=1e-5)


def test_the_table_serves_every_optimizer():
    model = small()
    count, values = len(list(model.parameters())), sum(p.numel() for p in model.parameters())
    plain = parameter_groups(build_optim_wrapper(model, wrapper_cfg()), model)
    assert [(r['group'], r['lr'], r['tensors'], r['parameters']) for r in plain] == [('-', 1e-3, count, values)]
    one_a_parameter = build(model, DefaultOptimWrapperConstructor, norm_decay_mult=0.0)
    assert len(one_a_parameter.optimizer.param_groups) == count
    assert [r['weight_decay'] for r in parameter_groups(one_a_parameter, model)] == [0.05, 0.0]
    several = OptimWrapperDict(
        a=build_optim_wrapper(model.backbone, wrapper_cfg(1e-4)), b=build_optim_wrapper(model.head, wrapper_cfg(1e-2))
    )
    assert [(r['lr'], r['first']) for r in parameter_groups(several, model)] == [
        (1e-4, 'backbone.downsample_layers.0.0.weight'),
        (1e-2, 'head.0.weight'),
    ]
    assert parameter_groups(build_optim_wrapper(model, wrapper_cfg()), nn.DataParallel(model)) == plain


@pytest.mark.slow
def test_a_run_writes_the_table(tiny, tmp_path):  # noqa: F811
    tiny.train(
        tmp_path,
        8,
        {
            'optim_wrapper.constructor': 'replk_mm.LayerDecayOptimizerConstructor',
            'optim_wrapper.paramwise_cfg': dict(decay_rate=0.5),
            'param_scheduler': [dict(type='LinearLR', start_factor=0.1, by_epoch=False, end=1300)],
        },
    )
    rows = json.loads((tmp_path / 'parameter_groups.json').read_text())
    # A stem and four stages, one layer each, and the heads; not the rate of the warm-up.
    assert sorted({row['lr'] for row in rows}) == pytest.approx([1e-2 * 0.5**n for n in (5, 4, 3, 2, 1, 0)])
    assert (tmp_path / 'parameter_groups.txt').is_file() and {r['weight_decay'] for r in rows} == {0.0, 0.05}
