"""What works on this machine, found out by doing it.

Every probe runs in a process of its own: a missing module, a binary that does not fit or a crash becomes a line in a
report instead of the end of it. Nothing but the standard library is imported before a probe asks for it.
"""
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def probe_torch() -> dict[str, Any]:
    """Version, threads and devices of torch."""
    import torch
    devices = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        device = torch.cuda.get_device_properties(index)
        devices.append({'name': f'cuda:{index}', 'model': device.name, 'memory_gib': device.total_memory / 2**30})
    return {'version': torch.__version__, 'cuda': torch.version.cuda, 'threads': torch.get_num_threads(),
            'capability': torch.backends.cpu.get_cpu_capability(), 'devices': devices}


def probe_ops() -> dict[str, Any]:
    """Suppress one of three boxes by mmcv's compiled operator on every device.

    ``devices`` maps a device to ``'ok'`` or to what went wrong there. Raises what importing mmcv raises.
    """
    import torch
    from mmcv.ops import nms
    boxes = torch.tensor([[0., 0., 10., 10.], [1., 1., 11., 11.], [20., 20., 30., 30.]])
    scores = torch.tensor([.9, .8, .7])
    devices = ['cpu'] + [f'cuda:{i}' for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0)]
    report = {}
    for device in devices:
        try:
            # The first two overlap by 81 / 119, so the second has to go.
            _, kept = nms(boxes.to(device), scores.to(device), iou_threshold=.5)
            report[device] = 'ok' if kept.tolist() == [0, 2] else f'nms kept boxes {kept.tolist()} instead of [0, 2]'
        except Exception as error:
            report[device] = _one_line(error)
    return {'devices': report}


def probe_opencv() -> dict[str, Any]:
    """Import OpenCV, which needs libraries of the system for its windows."""
    import cv2
    return {'version': cv2.__version__}


def probe_segmentation() -> dict[str, Any]:
    """Import mmseg and let its smallest UperNet head segment four feature maps."""
    import mmseg
    import mmseg.apis
    import torch
    from mmseg.registry import MODELS
    from mmseg.utils import register_all_modules
    register_all_modules()
    head = MODELS.build({
        'type': 'UPerHead', 'in_channels': [4] * 4, 'in_index': [0, 1, 2, 3], 'channels': 4, 'num_classes': 3,
        'norm_cfg': {'type': 'BN'}, 'align_corners': False}).eval()
    with torch.no_grad():
        logits = head([torch.zeros(1, 4, side, side) for side in (16, 8, 4, 2)])
    if tuple(logits.shape) != (1, 3, 16, 16):
        raise RuntimeError(f'UPerHead answered with shape {tuple(logits.shape)} instead of (1, 3, 16, 16)')
    return {'version': mmseg.__version__}


def probe_detection() -> dict[str, Any]:
    """Import mmdet, pool a region from a feature pyramid of its own, and measure a mask with pycocotools."""
    import mmdet
    import mmdet.apis
    import numpy as np
    import torch
    from mmdet.registry import MODELS
    from mmdet.utils import register_all_modules
    from pycocotools import mask
    register_all_modules()
    neck = MODELS.build({'type': 'FPN', 'in_channels': [4, 8], 'out_channels': 4, 'num_outs': 2}).eval()
    pool = MODELS.build({'type': 'SingleRoIExtractor', 'roi_layer': {'type': 'RoIAlign', 'output_size': 7},
                         'out_channels': 4, 'featmap_strides': [4, 8]})
    with torch.no_grad():
        levels = neck([torch.zeros(1, 4, 16, 16), torch.zeros(1, 8, 8, 8)])
        regions = pool(levels, torch.tensor([[0., 0., 0., 20., 20.]]))
    if tuple(regions.shape) != (1, 4, 7, 7):
        raise RuntimeError(f'RoIAlign answered with shape {tuple(regions.shape)} instead of (1, 4, 7, 7)')
    area = int(mask.area(mask.encode(np.asfortranarray(np.ones((3, 5), np.uint8)))))
    if area != 15:
        raise RuntimeError(f'pycocotools measures {area} pixels in a mask of 15')
    return {'version': mmdet.__version__}


PROBES: dict[str, Callable[[], dict[str, Any]]] = {
    'torch': probe_torch, 'opencv': probe_opencv, 'ops': probe_ops, 'segmentation': probe_segmentation,
    'detection': probe_detection}


def _one_line(error: BaseException) -> str:
    return f'{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else "no message"}'


def run_probe(name: str, python: str = sys.executable, timeout: float = 300) -> dict[str, Any]:
    """Run a probe in a fresh process of ``python``.

    Args:
        name: A key of :data:`PROBES`.
        python: The interpreter whose packages are probed.
        timeout: Seconds after which the probe counts as failed.

    Returns:
        What the probe found with ``ok=True``, or ``ok=False`` and ``error``, one line.
    """
    root = str(Path(__file__).resolve().parents[2])
    paths = os.pathsep.join(filter(None, (root, os.environ.get('PYTHONPATH'))))
    try:
        done = subprocess.run([python, '-m', 'replk_mm.install.probes', name], env={**os.environ, 'PYTHONPATH': paths},
                              capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired:
        return {'ok': False, 'error': f'no answer within {timeout:.0f} seconds'}
    try:
        return json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        last = (done.stderr.strip().splitlines() or ['no output'])[-1]
        ended = f'killed by signal {-done.returncode}' if done.returncode < 0 else f'exit status {done.returncode}'
        return {'ok': False, 'error': f'{ended}: {last}'}


if __name__ == '__main__':
    try:
        answer = {'ok': True, **PROBES[sys.argv[1]]()}
    except Exception as caught:
        answer = {'ok': False, 'error': _one_line(caught)}
    print('\n' + json.dumps(answer))
