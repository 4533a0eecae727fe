"""Other inference engines on the same network: exported to ONNX once, with the same threads and images."""

import contextlib
import importlib.util
import io
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from replk_mm.analysis.benchmark.synthetic_batch import model_kind
from replk_mm.errors import UserError

#: Engines, with the distributions that they need.
ENGINES = {'openvino': ('openvino', 'onnx', 'onnxscript'), 'onnxruntime': ('onnxruntime', 'onnx', 'onnxscript')}

Run = Callable[[Tensor], list[np.ndarray]]


def missing(engine: str) -> str | None:
    """The note for an engine whose distributions are not installed; None if they are."""
    lacking = [name for name in ENGINES[engine] if importlib.util.find_spec(name) is None]
    return f'{engine}: not installed (pip install {" ".join(lacking)})' if lacking else None


class Deployed(nn.Module):
    """What is exported: a backbone to its features, or a segmentor from the normalized image to its class map."""

    def __init__(self, net: Any) -> None:
        super().__init__()
        self.net = net
        self.segments = model_kind(net) == 'segmentor'

    def forward(self, image: Tensor) -> Any:
        """``(N, 3, H, W)`` to features ``(N, C_i, H_i, W_i)``, or to classes ``(N, H, W)``."""
        if not self.segments:
            return self.net(image)
        logits = self.net(image, mode='tensor')
        logits = F.interpolate(logits, image.shape[2:], mode='bilinear', align_corners=self.net.align_corners)
        if logits.shape[1] == 1:
            return (logits[:, 0].sigmoid() > self.net.decode_head.threshold).long()
        return logits.argmax(1)


def export(net: Any, image: Tensor, path: Path) -> None:
    """Write a network as ONNX.

    Args:
        net: With plain convolutions, reparameterized.
        image: An input of the shape to export for.
        path: File to write; large weights go into another one beside it.

    Raises:
        UserError: If the network has no ONNX form. The exporter raises errors of its own.
    """
    kind = model_kind(net)
    if kind not in ('backbone', 'segmentor'):
        raise UserError('a whole detector has no plain ONNX form; compare its backbone: benchmark.py backbone')
    test = (net.test_cfg or {}) if kind == 'segmentor' else {}
    if test.get('mode') == 'slide' and any(a > b for a, b in zip(image.shape[2:], test['crop_size'], strict=True)):
        raise UserError(
            'the config tests with sliding windows, which cannot be exported; for a comparison use '
            '--cfg-options model.test_cfg.mode=whole'
        )
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter('ignore')
        torch.onnx.export(Deployed(net).eval(), (image,), str(path), dynamo=True, input_names=['image'], verbose=False)


def load(engine: str, path: Path, threads: int, dtype: str = 'float32') -> Run:
    """A function that runs an exported network.

    Args:
        engine: A name in :data:`ENGINES`.
        path: The exported network.
        threads: Number of threads of the engine.
        dtype: Precision of the computation, ``'float32'`` or ``'bfloat16'``.

    Raises:
        UserError: If the engine does not have this precision here. Engines raise errors of their own.
    """
    if engine == 'onnxruntime':
        if dtype != 'float32':
            raise UserError(f'no {dtype} on CPUs')
        return _onnxruntime(path, threads)
    import openvino

    core = openvino.Core()
    if dtype == 'bfloat16' and 'BF16' not in core.get_property('CPU', 'OPTIMIZATION_CAPABILITIES'):
        raise UserError('this CPU has no bfloat16 for it')
    # Its default precision is bfloat16 on CPUs that have it.
    network = core.compile_model(
        str(path),
        'CPU',
        {
            'INFERENCE_PRECISION_HINT': {'float32': 'f32', 'bfloat16': 'bf16'}[dtype],
            'INFERENCE_NUM_THREADS': threads,
            'PERFORMANCE_HINT': 'LATENCY',
        },
    )
    request = network.create_infer_request()

    def run(image: Tensor) -> list[np.ndarray]:
        found = request.infer([image.contiguous().numpy()], share_inputs=True)
        return [found[output] for output in network.outputs]

    return run


def _onnxruntime(path: Path, threads: int) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3
    # Threads that wait busily after a run would take the processors from whatever is timed next.
    options.add_session_config_entry('session.force_spinning_stop', '1')
    session = onnxruntime.InferenceSession(str(path), options, providers=['CPUExecutionProvider'])
    return lambda image: session.run(None, {'image': image.contiguous().numpy()})
