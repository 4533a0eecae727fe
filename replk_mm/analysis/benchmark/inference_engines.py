"""OpenVINO and ONNX Runtime on the same network, exported to ONNX, with the same number of threads."""

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

#: Runs a network: images ``(N, 3, H, W)`` to its outputs.
EngineCall = Callable[[Tensor], list[np.ndarray]]


def missing_distributions(engine: str) -> list[str]:
    """The distributions of an engine that are not installed."""
    return [name for name in ENGINES[engine] if importlib.util.find_spec(name) is None]


class ExportedModel(nn.Module):
    """A backbone up to its features, or a segmentor from the normalized image to its class map."""

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


def export_onnx(net: Any, image: Tensor, path: Path) -> None:
    """Export a network to ONNX.

    Args:
        net: Reparameterized network with plain convolutions.
        image: Input ``(N, 3, H, W)`` of the shape to export for.
        path: File to write; large weights go into another file beside it.

    Raises:
        UserError: If the network has no ONNX form. The exporter raises errors of its own.
    """
    kind = model_kind(net)
    if kind not in ('backbone', 'segmentor'):
        raise UserError("a whole detector has no plain ONNX form; compare its backbone with 'benchmark backbone'")
    test = (net.test_cfg or {}) if kind == 'segmentor' else {}
    if test.get('mode') == 'slide' and any(a > b for a, b in zip(image.shape[2:], test['crop_size'], strict=True)):
        raise UserError(
            'the config tests with sliding windows, which cannot be exported; '
            'add --cfg-options model.test_cfg.mode=whole'
        )
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter('ignore')
        model = ExportedModel(net).eval()
        torch.onnx.export(model, (image,), str(path), dynamo=True, input_names=['image'], verbose=False)


def load_engine(engine: str, path: Path, threads: int, dtype: str = 'float32') -> EngineCall:
    """Load an exported network into an engine.

    Args:
        engine: A name in :data:`ENGINES`.
        path: The exported network.
        threads: Number of threads of the engine.
        dtype: Precision of the computation, ``'float32'`` or ``'bfloat16'``.

    Raises:
        UserError: If the engine does not support this precision on this CPU. Engines raise errors of their own.
    """
    if engine == 'onnxruntime':
        if dtype != 'float32':
            raise UserError(f'no {dtype} on CPUs')
        return _load_onnxruntime(path, threads)
    import openvino

    core = openvino.Core()
    if dtype == 'bfloat16' and 'BF16' not in core.get_property('CPU', 'OPTIMIZATION_CAPABILITIES'):
        raise UserError('this CPU has no bfloat16 for it')
    settings = {
        # Without the hint it computes in bfloat16 on CPUs that support it.
        'INFERENCE_PRECISION_HINT': {'float32': 'f32', 'bfloat16': 'bf16'}[dtype],
        'INFERENCE_NUM_THREADS': threads,
        'PERFORMANCE_HINT': 'LATENCY',
    }
    network = core.compile_model(str(path), 'CPU', settings)
    request = network.create_infer_request()

    def call(image: Tensor) -> list[np.ndarray]:
        outputs = request.infer([image.contiguous().numpy()], share_inputs=True)
        return [outputs[output] for output in network.outputs]

    return call


def _load_onnxruntime(path: Path, threads: int) -> EngineCall:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3
    # Threads that spin after a call would slow down the call that is timed next.
    options.add_session_config_entry('session.force_spinning_stop', '1')
    session = onnxruntime.InferenceSession(str(path), options, providers=['CPUExecutionProvider'])
    return lambda image: session.run(None, {'image': image.contiguous().numpy()})
