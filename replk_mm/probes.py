"""Probes of the environment for the command ``doctor``: what imports and runs.

This module imports the standard library only, so that it can tell that torch or mmengine is missing. Each probe runs
in its own process, so that a missing module, an incompatible binary or a crash becomes a line of the report.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def probe_torch() -> dict[str, Any]:
    """Version, threads and devices of torch."""
    import torch

    devices = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        device = torch.cuda.get_device_properties(index)
        devices.append({'name': f'cuda:{index}', 'model': device.name, 'memory_gib': device.total_memory / 2**30})
    return {
        'version': torch.__version__,
        'cuda': torch.version.cuda,
        'threads': torch.get_num_threads(),
        'capability': torch.backends.cpu.get_cpu_capability(),
        'devices': devices,
    }


def probe_ops() -> dict[str, Any]:
    """Run mmcv's NMS on three boxes; ``devices`` maps each device to ``'ok'`` or an error."""
    import torch
    from mmcv.ops import nms

    from replk_mm.mmcv_ops import is_compiled

    boxes = torch.tensor([[0.0, 0.0, 10.0, 10.0], [1.0, 1.0, 11.0, 11.0], [20.0, 20.0, 30.0, 30.0]])
    scores = torch.tensor([0.9, 0.8, 0.7])
    devices = ['cpu'] + [f'cuda:{i}' for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0)]
    report = {}
    for device in devices:
        try:
            # The first two overlap by 81 / 119, so NMS suppresses the second.
            _, kept = nms(boxes.to(device), scores.to(device), iou_threshold=0.5)
            report[device] = 'ok' if kept.tolist() == [0, 2] else f'nms kept boxes {kept.tolist()} instead of [0, 2]'
        except Exception as error:
            report[device] = _one_line(error)
    return {'devices': report, 'compiled': is_compiled()}


def probe_segmentation() -> dict[str, Any]:
    """Import mmseg and run its UperNet head on four feature maps."""
    import mmseg.apis
    import torch
    from mmseg.registry import MODELS
    from mmseg.utils import register_all_modules

    register_all_modules()
    head = MODELS.build(
        {
            'type': 'UPerHead',
            'in_channels': [4] * 4,
            'in_index': [0, 1, 2, 3],
            'channels': 4,
            'num_classes': 3,
            'norm_cfg': {'type': 'BN'},
            'align_corners': False,
        }
    ).eval()
    head([torch.zeros(1, 4, side, side) for side in (16, 8, 4, 2)])
    return {'version': mmseg.__version__}


def probe_detection() -> dict[str, Any]:
    """Import mmdet, run RoIAlign on a feature map, and encode a mask with pycocotools."""
    import mmdet.apis
    import numpy as np
    import torch
    from mmdet.registry import MODELS
    from mmdet.utils import register_all_modules
    from pycocotools import mask

    register_all_modules()
    pool = MODELS.build(
        {
            'type': 'SingleRoIExtractor',
            'roi_layer': {'type': 'RoIAlign', 'output_size': 7},
            'out_channels': 4,
            'featmap_strides': [4],
        }
    )
    pool([torch.zeros(1, 4, 16, 16)], torch.tensor([[0.0, 0.0, 0.0, 20.0, 20.0]]))
    mask.encode(np.asfortranarray(np.ones((3, 5), np.uint8)))
    return {'version': mmdet.__version__}


def probe_torchvision() -> dict[str, Any]:
    """Import torchvision, which registers its operators in the torch that it was built for."""
    import torchvision

    return {'version': torchvision.__version__}


PROBES: dict[str, Callable[[], dict[str, Any]]] = {
    'torch': probe_torch,
    'ops': probe_ops,
    'segmentation': probe_segmentation,
    'detection': probe_detection,
    'torchvision': probe_torchvision,
}


def _one_line(error: BaseException) -> str:
    return f'{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else "no message"}'


def run_probe(name: str, python: str = sys.executable, timeout: float = 300) -> dict[str, Any]:
    """Run a probe in a fresh process of ``python``.

    Args:
        name: A key of :data:`PROBES`.
        python: The interpreter whose packages are probed.
        timeout: Seconds after which the probe counts as failed.

    Returns:
        The probe's result with ``ok=True``, or ``ok=False`` and ``error``, one line.
    """
    paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get('PYTHONPATH'))))
    try:
        done = subprocess.run(
            [python, '-m', 'replk_mm.probes', name],
            env={**os.environ, 'PYTHONPATH': paths},
            capture_output=True,
            text=True,
            timeout=timeout,
        )
    except subprocess.TimeoutExpired:
        return {'ok': False, 'error': f'no answer within {timeout:.0f} seconds'}
    try:
        return json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        last = (done.stderr.strip().splitlines() or ['no output'])[-1]
        ended = f'killed by signal {-done.returncode}' if done.returncode < 0 else f'exit status {done.returncode}'
        return {'ok': False, 'error': f'{ended}: {last}'}


if __name__ == '__main__':  # a probe
    try:
        if not sys.argv[1].startswith('torch'):
            from replk_mm import mmcv_ops

            mmcv_ops.install()
        answer = {'ok': True, **PROBES[sys.argv[1]]()}
    except Exception as caught:
        answer = {'ok': False, 'error': _one_line(caught)}
    print('\n' + json.dumps(answer))
