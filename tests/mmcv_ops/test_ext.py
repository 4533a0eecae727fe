"""Focal loss, attention, and the installation of the operators."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import replk_mm.mmcv_ops
from replk_mm.errors import UserError
from replk_mm.mmcv_ops import ext


@pytest.mark.parametrize('weighted', [False, True])
@pytest.mark.parametrize('gamma', [0.0, 1.5, 2.0])
def test_sigmoid_focal_loss(gamma, weighted):
    x = torch.randn(7, 3) * 4
    target = torch.tensor([0, 1, 2, 1, 0, 2, 1] if weighted else [0, 1, 2, 3, 3, 3, 1])  # 3 is the background
    weight = torch.tensor([0.5, 1.0, 2.0]) if weighted else torch.zeros(0)
    exact = x.double().requires_grad_()
    p = 1 / (1 + torch.exp(-exact))
    positive = torch.nn.functional.one_hot(target, 4)[:, :3]
    loss = -positive * 0.25 * (1 - p) ** gamma * p.log() - (1 - positive) * 0.75 * p**gamma * (1 - p).log()
    if weighted:
        loss = loss * weight.double()[target][:, None]
    loss.sum().backward()
    output, gradient = torch.zeros(7, 3), torch.zeros(7, 3)
    ext.sigmoid_focal_loss_forward(x, target, weight, output, gamma=gamma, alpha=0.25)
    ext.sigmoid_focal_loss_backward(x, target, weight, gradient, gamma=gamma, alpha=0.25)
    torch.testing.assert_close(output, loss.detach().float(), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(gradient, exact.grad.float(), rtol=1e-5, atol=1e-7)


def test_sigmoid_focal_loss_of_large_logits():
    x, gradient = torch.tensor([[200.0, -200.0]]), torch.zeros(1, 2)
    output = torch.zeros(1, 2)
    arguments = (x, torch.tensor([1]), torch.zeros(0))  # both wrong: the loss is alpha times the logit
    ext.sigmoid_focal_loss_forward(*arguments, output, gamma=2.0, alpha=0.25)
    ext.sigmoid_focal_loss_backward(*arguments, gradient, gamma=2.0, alpha=0.25)
    torch.testing.assert_close(output, torch.tensor([[150.0, 50.0]]))
    torch.testing.assert_close(gradient, torch.tensor([[0.75, -0.25]]))


def test_deformable_attention_has_the_gradients_of_its_values(monkeypatch):
    attention = pytest.importorskip('mmcv.ops.multi_scale_deform_attn')
    monkeypatch.setattr(attention, 'ext_module', ext)
    shapes, starts = torch.tensor([[3, 4], [2, 2]]), torch.tensor([0, 12])
    value = torch.randn(1, 16, 2, 3, dtype=torch.float64, requires_grad=True)
    locations = (torch.rand(1, 5, 2, 2, 2, 2, dtype=torch.float64) * 0.9).requires_grad_()
    weights = torch.rand(1, 5, 2, 2, 2, dtype=torch.float64, requires_grad=True)
    apply = attention.MultiScaleDeformableAttnFunction.apply
    assert torch.autograd.gradcheck(lambda v, p, w: apply(v, shapes, starts, p, w, 64), (value, locations, weights))


def test_a_missing_operator_is_named_with_the_command_that_compiles_it():
    with pytest.raises(UserError, match=r'roi_pool_forward.*\n.*make setup MMCV=compiled.*in place of mmcv-lite'):
        ext.roi_pool_forward(torch.zeros(1), output=None)
    assert not hasattr(ext, '__path__')


@pytest.mark.parametrize('compiled', [False, True])
def test_install_keeps_compiled_operators(tmp_path, monkeypatch, compiled):
    (tmp_path / 'mmcv').mkdir()
    (tmp_path / 'mmcv' / '__init__.py').write_text('raise RuntimeError("imported")')
    if compiled:
        (tmp_path / 'mmcv' / '_ext.py').touch()
    monkeypatch.syspath_prepend(tmp_path)
    for name in ('mmcv', 'mmcv._ext'):
        monkeypatch.delitem(sys.modules, name, raising=False)
    for _ in range(2):
        replk_mm.mmcv_ops.install()
    installed = sys.modules.pop('mmcv._ext', None)
    assert installed is (None if compiled else ext)


@pytest.fixture
def lite(tmp_path, root):
    """Environment of a process whose mmcv has no compiled operators."""
    source = Path(pytest.importorskip('mmcv').__file__).parent
    (tmp_path / 'lite' / 'mmcv').mkdir(parents=True)
    for path in source.iterdir():
        if not path.name.startswith(('_ext', '__pycache__')):
            (tmp_path / 'lite' / 'mmcv' / path.name).symlink_to(path)
    return {'PYTHONPATH': f'{tmp_path / "lite"}:{root}', 'OMP_NUM_THREADS': '1', 'PATH': '/usr/bin:/bin'}


SCRIPT = """
import sys
import helper  # beside this script
import mmcv, mmdet.apis, mmseg.apis, torch
assert __name__ == '__main__' and sys.argv[1:] == ['--out', 'x'] and '/lite/' in mmcv.__file__, sys.argv
from mmcv.ops import RoIAlign, batched_nms, get_compiler_version
assert 'replk_mm' in get_compiler_version()
x = torch.arange(16.0).view(1, 1, 4, 4).requires_grad_()
y = RoIAlign(1, sampling_ratio=2)(x, torch.tensor([[0, 0.5, 0.5, 3.5, 3.5]]))
y.sum().backward()
assert abs(y.item() - 7.5) < 1e-6 and abs(x.grad.sum().item() - 1) < 1e-6
boxes = torch.tensor([[0., 0., 8., 8.], [0., 0., 8., 7.], [0., 0., 8., 7.]])
cfg = dict(type='nms', iou_threshold=0.5)
kept = batched_nms(boxes, torch.tensor([0.5, 0.9, 0.7]), torch.tensor([0, 0, 1]), cfg)[1]
assert kept.tolist() == [1, 2]
from mmengine.config import Config
assert Config.fromfile('replk_mm::upernet_replk-nano_demo.py').model.backbone.arch == 'nano'
print('done')
"""


@pytest.mark.slow
def test_an_unmodified_script_runs_without_compiled_operators(lite, tmp_path):
    (tmp_path / 'helper.py').touch()
    (tmp_path / 'script.py').write_text(SCRIPT)
    command = [sys.executable, '-m', 'replk_mm.mmcv_ops', str(tmp_path / 'script.py'), '--out', 'x']
    done = subprocess.run(command, env=lite, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.endswith('done\n'), done.stderr


@pytest.mark.slow
def test_importing_the_package_installs_nothing(lite, tmp_path):
    code = "import sys, replk_mm.registry, replk_mm.backbones, replk_mm.ops; assert 'mmcv._ext' not in sys.modules"
    subprocess.run([sys.executable, '-c', code], env=lite, cwd=tmp_path, check=True)


@pytest.mark.slow
@pytest.mark.parametrize('arguments', [(), ('missing.py',)])
def test_a_missing_script_is_a_user_error(arguments, root):
    command = [sys.executable, '-m', 'replk_mm.mmcv_ops', *arguments]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith('error: ') and 'Traceback' not in done.stderr
