"""Our types in any OpenMMLab project without custom_imports, and what importing us costs. Each case is a fresh process."""
import os
import subprocess
import sys

import pytest

TINY = {
    'RepLKNet': "arch=dict(large_kernel_sizes=[5, 5, 5, 3], small_kernel=3, layers=[1, 1, 1, 1], "
                'channels=[8, 8, 8, 8], dw_ratio=1)',
    'ConvNeXt': 'arch=dict(depths=[1, 1, 1, 1], channels=[8, 8, 8, 8]), out_indices=(0, 1, 2, 3), '
                'gap_before_final_norm=False',
}
BACKBONES = ', '.join(f"dict(type='replk_mm.{name}', {arguments})" for name, arguments in TINY.items())
CHECK = '''
for backbone in backbones:
    assert type(backbone).__module__.startswith('replk_mm.models'), backbone
    assert [tuple(o.shape) for o in backbone(torch.zeros(1, 3, 64, 64))] == [(1, 8, s, s) for s in (16, 8, 4, 2)]
'''


def run(root, program: str) -> str:
    env = {**os.environ, 'PYTHONPATH': str(root), 'OMP_NUM_THREADS': '1'}
    done = subprocess.run([sys.executable, '-c', program], env=env, capture_output=True, text=True, timeout=300,
                          cwd=root / 'tests')
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_importing_costs_nothing(root):
    heavy = ('torch', 'mmcv', 'mmseg', 'mmdet', 'mmpretrain', 'replk_mm.models')
    run(root, f'''
import sys, replk_mm
assert replk_mm.__version__
found = [name for name in {heavy} if name in sys.modules]
assert not found, found
''')


def test_mmengine_alone(root):
    """Building needs neither mmseg nor mmdet; nobody imports replk_mm but mmengine, for the scope in the type."""
    run(root, f'''
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
''')


def test_other_scopes(root):
    pytest.importorskip('mmseg')
    pytest.importorskip('mmdet')
    run(root, f'''
import sys
import torch
from mmengine.registry import DefaultScope
import mmdet.registry
import mmseg.registry
for project in (mmdet, mmseg):
    with DefaultScope.overwrite_default_scope(project.__name__):
        assert project is mmseg or 'replk_mm' not in sys.modules
        backbones = [project.registry.MODELS.build(cfg) for cfg in ({BACKBONES})]
{CHECK.replace(chr(10), chr(10) + 8 * ' ')}
        assert project is mmseg or 'mmseg.models' not in sys.modules
''')


def test_configs_are_inherited(root, tmp_path):
    pytest.importorskip('mmseg')
    (tmp_path / 'mine.py').write_text(
        "_base_ = 'replk_mm::upernet_replk-nano_ade20k.py'\nmodel = dict(backbone=dict(drop_path_rate=.125))\n")
    run(root, f'''
import replk_mm
from mmengine.config import Config
from mmengine.hub import get_config
cfg = Config.fromfile({str(tmp_path / 'mine.py')!r})
assert cfg.model.backbone.type == 'replk_mm.RepLKNet' and cfg.model.backbone.arch == 'nano'
assert cfg.model.backbone.drop_path_rate == .125
plain = get_config('replk_mm::upernet_replk-nano_ade20k.py')
assert plain.model.backbone.drop_path_rate == 0 and plain.model.decode_head.type == 'replk_mm.UPerHead'
nested = get_config('mmseg::_base_/default_runtime.py')  # other projects' configs as ever
assert nested.default_scope == 'mmseg'
try:
    get_config('replk_mm::no-such.py')
except Exception as error:
    assert 'no-such' in str(error), error
else:
    raise SystemExit('a config that does not exist was found')
''')
