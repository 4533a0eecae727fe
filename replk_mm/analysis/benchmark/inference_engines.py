"""OpenVINO and ONNX Runtime on the same network, exported for the measured shape, with the same number of threads."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from replk_mm.analysis.benchmark.synthetic_batch import model_kind
from replk_mm.deploy.artefact import PACKAGES, load_session, missing_packages
from replk_mm.deploy.export import trace, write_network
from replk_mm.deploy.exportable import ExportableBackbone, exportable
from replk_mm.errors import UserError

#: Engines, with the format that each reads.
ENGINES = {'openvino': 'openvino', 'onnxruntime': 'onnx'}

#: Runs a network: images ``(N, 3, H, W)`` to its outputs.
EngineCall = Callable[[Tensor], list[Tensor]]


def missing_distributions(engine: str) -> list[str]:
    """The distributions of an engine that are not installed."""
    return missing_packages(PACKAGES[ENGINES[engine]])


def load_engine(net: Any, image: Tensor, folder: Path, engine: str, threads: int, dtype: str) -> EngineCall:
    """Load a network into an engine: a backbone up to its features, a segmentor up to its class map.

    Args:
        net: Reparameterized network with plain convolutions; unchanged.
        image: Input ``(N, 3, H, W)`` of the shape to export for.
        folder: Folder for the exported network.
        engine: A name in :data:`ENGINES`.
        threads: Number of threads of the engine.
        dtype: Precision of the computation, ``'float32'`` or ``'bfloat16'``.

    Raises:
        UserError: If the network cannot be exported, or the engine does not support the precision on this CPU.
    """
    kind, format = model_kind(net), ENGINES[engine]
    precision = {'float32': 'fp32', 'bfloat16': 'bf16'}[dtype]
    if precision == 'bf16' and format == 'onnx':
        raise UserError(f'no {dtype} on CPUs')
    if kind not in ('backbone', 'segmentor'):
        raise UserError('export the whole model with the command export, and compare the folder that it writes')
    test = (net.test_cfg or {}) if kind == 'segmentor' else {}
    if test.get('mode') == 'slide' and any(a > b for a, b in zip(image.shape[2:], test['crop_size'], strict=True)):
        raise UserError(
            'the config tests with sliding windows, which cannot be exported; '
            'add --cfg-options model.test_cfg.mode=whole'
        )
    module = ExportableBackbone(net) if kind == 'backbone' else exportable(net, labels=True)
    program = trace(module, (image,), dynamic=False)
    path = write_network(program, module, folder, format, 'fp32')
    # Of a segmentor, the class map alone.
    outputs = module.outputs if kind == 'backbone' else module.outputs[1:]
    session = load_session(path, format, precision, module.inputs, outputs, threads)
    return lambda image: list(session([image.contiguous()]))
