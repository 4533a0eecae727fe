"""Our types in any OpenMMLab project without custom_imports. Each case is a fresh process."""

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow
TINY = {
    'RepLKNet': 'arch=dict(large_kernel_sizes=[5, 5, 5, 3], small_kernel=3, layers=[1, 1, 1, 1], '
    'channels=[8, 8, 8, 8], dw_ratio=1)',
    'ConvNeXt': 'arch=dict(depths=[1, 1, 1, 1], channels=[8, 8, 8, 8]), out_indices=(0, 1, 2, 3), '
    'gap_before_final_norm=False',
}
BACKBONES = ', '.join(f"dict(type='replk_mm.{name}', {arguments})" for name, arguments in TINY.items())
CHECK = """
for backbone in backbones:
    assert type(backbone).__module__.startswith('replk_mm.backbones'), backbone
    assert [tuple(o.shape) for o in backbone(torch.zeros(1, 3, 64, 64))] == [(1, 8, s, s) for s in (16, 8, 4, 2)]
"""


def run(root, program: str) -> str:
    env = {**os.environ, 'PYTHONPATH': str(root), 'OMP_NUM_THREADS': '1'}
    done = subprocess.run(
        [sys.executable, '-c', program], env=env, capture_output=True, text=True, timeout=300, cwd=root / 'tests'
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_importing_costs_nothing(root):
    heavy = ('torch', 'mmcv', 'mmseg', 'mmdet', 'mmpretrain', 'replk_mm.backbones')
    run(
        root,
        f"""
import sys, replk_mm
assert replk_mm.__version__
found = [name for name in {heavy} if name in sys.modules]
assert not found, found
""",
    )


def test_mmengine_alone(root):
    """Building needs neither mmseg nor mmdet; nobody imports replk_mm but mmengine, for the scope in the type."""
    run(
        root,
        f"""
import sys
import torch
from mmengine.registry import MODELS
assert 'replk_mm' not in sys.modules
backbones = [MODELS.build(cfg) for cfg in ({BACKBONES})]
{CHECK}
found = [name for name in ('mmseg', 'mmdet', 'mmpretrain') if name in sys.modules]
assert not found, found
# mmpretrain has classes of the same names; ours must not answer without their scope.
for name in ('RepLKNet', 'ConvNeXt', 'LN2d'):
    assert MODELS.get(name) is None, name
    assert MODELS.get(f'replk_mm.{{name}}') is not None, name
""",
    )


@pytest.mark.extras('mmpretrain')
def test_scope_of_mmpretrain(root):
    """Its own registry, without custom_imports. Beside transformers 5, mmpretrain needs our import."""
    run(
        root,
        f"""
import sys
import torch
from mmengine.registry import DefaultScope
import replk_mm.mmcv_ops
import mmpretrain.registry
with DefaultScope.overwrite_default_scope('mmpretrain'):
    assert 'replk_mm.registry' not in sys.modules
    backbones = [mmpretrain.registry.MODELS.build(cfg) for cfg in ({BACKBONES})]
    {CHECK.replace(chr(10), chr(10) + 4 * ' ')}
""",
    )


def test_other_scopes(root):
    pytest.importorskip('mmseg')
    pytest.importorskip('mmdet')
    run(
        root,
        f"""
import sys
import torch
from mmengine.registry import DefaultScope
import replk_mm.mmcv_ops
import mmdet.registry
import mmseg.registry
for project in (mmdet, mmseg):
    with DefaultScope.overwrite_default_scope(project.__name__):
        assert project is mmseg or 'replk_mm.registry' not in sys.modules
        backbones = [project.registry.MODELS.build(cfg) for cfg in ({BACKBONES})]
{CHECK.replace(chr(10), chr(10) + 8 * ' ')}
        assert project is mmseg or 'mmseg.models' not in sys.modules
""",
    )


# What a program has outside our package, before and after it imports us and trains our backbones.
STATE = """
import inspect, os, signal, sys, warnings
import torch
import replk_mm.mmcv_ops
import mmcv.ops
import mmengine.config, mmengine.hub, mmengine.utils
from mmengine.config import Config, config, utils
from mmengine.runner import checkpoint

def functions(owner):
    return {name: value for name, value in vars(owner).items() if callable(value) or isinstance(value, staticmethod)}

def state():
    return dict(
        loaders=functions(checkpoint), schemes=dict(checkpoint.CheckpointLoader._schemes),
        operators=functions(sys.modules['mmcv._ext']),
        configs=[functions(owner) for owner in (config, utils, Config, mmengine.hub.hub, mmengine.utils)],
        packages=dict(utils.MODULE2PACKAGE), environment=dict(os.environ), warnings=list(warnings.filters),
        signals=[signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)], torch=dict(
            load=torch.load, threads=torch.get_num_threads(), dtype=torch.get_default_dtype(),
            grad=torch.is_grad_enabled(),
            deterministic=torch.are_deterministic_algorithms_enabled(), device=torch.get_default_device(),
            precision=torch.get_float32_matmul_precision(), safe_globals=list(torch.serialization.get_safe_globals()),
            mkldnn=torch.backends.mkldnn.enabled, nnpack=torch.backends.nnpack.enabled() if callable(
                getattr(torch.backends.nnpack, 'enabled', None)) else None,
            cudnn=[torch.backends.cudnn.enabled, torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic],
            functions=[torch.nn.functional.conv2d, torch.nn.Conv2d.forward, torch.nn.functional.interpolate]))
"""
NEIGHBOUR = """
from mmengine.model import BaseModule
from mmengine.registry import MODELS

loaded = []

@checkpoint.CheckpointLoader.register_scheme('own://')
def load_from_own(filename, map_location):
    loaded.append(filename)
    return torch.load(filename.removeprefix('own://'), weights_only=False)

@MODELS.register_module()
class Neighbour(BaseModule):
    def __init__(self, init_cfg=None):
        super().__init__(init_cfg)
        self.conv = torch.nn.Conv2d(3, 4, 1)

class Settings:
    pass
"""


def test_a_program_that_uses_our_backbones_is_left_as_it_is(root, tmp_path):
    pytest.importorskip('mmcv.ops')
    run(
        root,
        f"""
{STATE}{NEIGHBOUR}
before = state()
import replk_mm.registry
backbones = [MODELS.build(cfg) for cfg in ({BACKBONES})]
for backbone in backbones:
    backbone.init_weights()
    sum(feature.square().mean() for feature in backbone(torch.randn(2, 3, 64, 64))).backward()
    with torch.no_grad():
        backbone.eval()(torch.randn(1, 3, 64, 64))
after = state()
changed = [key for key in before if before[key] != after[key]]
assert not changed, (changed, [(k, before['torch'][k], after['torch'][k]) for k in before['torch']])

# A neighbour's checkpoint has an object of its own in it, and mmengine loads it as it does without us.
neighbour = Neighbour()
path = {str(tmp_path / 'own.pth')!r}
torch.save(dict(state_dict=neighbour.state_dict(), settings=Settings()), path)
again = MODELS.build(dict(type='Neighbour', init_cfg=dict(type='Pretrained', checkpoint='own://' + path)))
again.init_weights()
assert loaded == ['own://' + path]
assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), neighbour.state_dict().values()))
torch.save(neighbour.state_dict(), path)
again = MODELS.build(dict(type='Neighbour', init_cfg=dict(type='Pretrained', checkpoint=path)))
again.init_weights()
assert torch.equal(again.conv.weight, neighbour.conv.weight)
""",
    )


def test_configs_are_inherited_after_one_call(root, tmp_path):
    pytest.importorskip('mmseg')
    (tmp_path / 'mine.py').write_text(
        "_base_ = 'replk_mm::upernet_replk-nano_ade20k.py'\nmodel = dict(backbone=dict(drop_path_rate=.125))\n"
    )
    (tmp_path / 'theirs.py').write_text("_base_ = 'mmseg::_base_/default_runtime.py'\n")
    (tmp_path / 'gone.py').write_text("_base_ = 'replk_mm::no-such.py'\n")
    run(
        root,
        f"""
from mmengine.config import Config
import replk_mm
for _ in range(2):
    replk_mm.register_configs()
cfg = Config.fromfile({str(tmp_path / 'mine.py')!r})
assert cfg.model.backbone.type == 'replk_mm.RepLKNet' and cfg.model.backbone.arch == 'nano'
assert cfg.model.backbone.drop_path_rate == .125
assert Config.fromfile({str(tmp_path / 'theirs.py')!r}).default_scope == 'mmseg'
assert Config.fromfile('replk_mm::upernet_replk-nano_ade20k.py').model.backbone.drop_path_rate == 0
assert Config.fromfile('mmseg::_base_/default_runtime.py').default_scope == 'mmseg'
try:
    Config.fromfile({str(tmp_path / 'gone.py')!r})
except Exception as error:
    assert 'no-such' in str(error), error
else:
    raise SystemExit('a config that does not exist was found')
""",
    )


def test_commands_set_up_their_process_once(root):
    run(
        root,
        f"""
{STATE}
from replk_mm.engine.process import setup_process
before = state()
setup_process()
setup_process()
after = state()
changed = {{key for key in before if before[key] != after[key]}}
assert changed == {{'loaders', 'schemes', 'configs', 'warnings'}}, changed
""",
    )
