"""Write a network as ONNX, for OpenVINO or for torch, in float32 or smaller numbers.

The network is traced once by torch.export. OpenVINO reads the ONNX form. Eight-bit integers come from the post-training
quantization of ONNX Runtime or, for OpenVINO, NNCF.
"""

import contextlib
import io
import logging
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from replk_mm.deploy.artefact import FORMATS, NETWORK_FILES, PACKAGES, openvino_has_bfloat16, require_packages
from replk_mm.deploy.exportable import AdaptivePoolingByMatrices, ExportableModel
from replk_mm.deploy.operators import OPSET, onnx_translations
from replk_mm.errors import UserError, first_line

#: Precisions of each format. ONNX Runtime and torch.export compute bfloat16 on few CPUs, so it is OpenVINO's alone.
SUPPORTED = {'onnx': ('fp32', 'fp16', 'int8'), 'openvino': ('fp32', 'fp16', 'bf16', 'int8'), 'torch': ('fp32',)}
#: Weights with fewer values stay in float32.
_SMALL = 64


def check_format(format: str, precision: str) -> None:
    """Check that a format supports a precision and that the packages for both are installed.

    Raises:
        UserError: If not.
    """
    if precision not in SUPPORTED[format]:
        able = ', '.join(name for name in FORMATS if precision in SUPPORTED[name])
        raise UserError(f'--format {format} has no {precision}\nUse one of {", ".join(SUPPORTED[format])}, or {able}.')
    packages = PACKAGES[format]
    if precision == 'int8' and format == 'openvino':
        packages = (*packages, 'nncf')
    require_packages(packages, f'--format {format} --precision {precision}')
    if precision == 'bf16' and not openvino_has_bfloat16():
        raise UserError(
            '--precision bf16: OpenVINO has none on this CPU, so it could not be compared\nUse fp16 or int8.'
        )


def trace(module: ExportableModel, example: Sequence[Tensor], dynamic: bool) -> torch.export.ExportedProgram:
    """Trace a network.

    Args:
        module: From :func:`replk_mm.deploy.exportable.exportable`.
        example: One tensor for each input, with at least two images if ``dynamic``.
        dynamic: Whether the number of images, their height and their width may change.

    Raises:
        UserError: If torch.export cannot trace it.
    """
    try:
        shapes: Any = None
        if dynamic:
            changes = torch.export.Dim.DYNAMIC  # torch 2.6 and newer
            shapes = tuple({0: changes, 2: changes, 3: changes} if x.dim() == 4 else {0: changes} for x in example)
        with _quiet(), torch.no_grad(), AdaptivePoolingByMatrices():
            return torch.export.export(module, tuple(example), dynamic_shapes=shapes, strict=False)
    except UserError:
        raise
    except Exception as error:
        advice = 'Export for one size: --shape H W.' if dynamic else 'torch.export does not support a part of it.'
        how = 'with dynamic height and width' if dynamic else 'by torch.export'
        raise UserError(
            f'{type(module.model).__name__}: cannot be exported {how}: {first_line(error):.300}\n{advice}'
        ) from error


def smallest_size(program: torch.export.ExportedProgram) -> list[int]:
    """Smallest height and width in pixels for which a trace is valid. Maps of one row are a case of their own."""
    image = next(node.meta['val'] for node in program.graph.nodes if node.op == 'placeholder' and node.name == 'image')
    return [
        int(program.range_constraints[side.node.expr].lower) if isinstance(side, torch.SymInt) else int(side)
        for side in image.shape[2:]
    ]


def write_network(
    program: torch.export.ExportedProgram,
    module: ExportableModel,
    folder: Path,
    format: str,
    precision: str,
    calibration: Sequence[Sequence[Tensor]] = (),
) -> Path:
    """Write a traced network.

    Args:
        program: From :func:`trace`.
        module: The network that was traced.
        folder: Empty folder for the files.
        format: A name in :data:`replk_mm.deploy.artefact.FORMATS`.
        precision: A name in :data:`SUPPORTED` of the format. With ``'fp16'`` the weights are stored in float16; the
            engine chooses the arithmetic, which is float32 on most CPUs.
        calibration: For ``'int8'``, inputs of typical images.

    Returns:
        The file of the network.

    Raises:
        UserError: If the format lacks an operator, or the quantization fails.
    """
    path = folder / NETWORK_FILES[format]
    if format == 'torch':
        torch.export.save(program, path)
        return path
    with tempfile.TemporaryDirectory() as scratch, _quiet():
        onnx = path if format == 'onnx' and precision != 'int8' else Path(scratch, 'network.onnx')
        _write_onnx(program, module, onnx, half=format == 'onnx' and precision == 'fp16')
        try:
            if format == 'openvino':
                _write_openvino(onnx, path, precision, calibration)
            elif precision == 'int8':
                _quantize_onnx(onnx, path, module.inputs, calibration)
        except Exception as error:
            what = f'{format}, {precision}'
            raise UserError(
                f'{type(module.model).__name__}: cannot be written as {what}: {first_line(error):.300}\n'
                f'Use another --precision or --format.'
            ) from error
    return path


def _write_onnx(program: torch.export.ExportedProgram, module: ExportableModel, path: Path, half: bool) -> None:
    try:
        found = torch.onnx.export(
            program,
            dynamo=True,
            custom_translation_table=onnx_translations(),
            input_names=list(module.inputs),
            output_names=list(module.outputs),
            opset_version=OPSET,
            verbose=False,
        )
    except Exception as error:
        causes = [line for line in str(error.__cause__ or error).splitlines() if line.strip()]
        raise UserError(
            f'{type(module.model).__name__}: has no form in ONNX: {causes[0] if causes else first_line(error):.300}\n'
            f'Use --format torch, or another backbone or head.'
        ) from error
    assert found is not None
    if half:
        _store_half(found.model.graph)
    found.save(path)


def _store_half(graph: Any) -> None:
    """Store weights in float16, in place; a cast to float32 follows each, which engines compute once."""
    import numpy as np
    import onnx_ir as ir

    for name, value in list(graph.initializers.items()):
        weight = value.const_value.numpy()
        if weight.dtype != np.float32 or weight.size < _SMALL:
            continue
        stored = ir.Value(name=f'{name}.fp16', const_value=ir.tensor(weight.astype(np.float16)))
        stored.shape, stored.dtype = value.shape, ir.DataType.FLOAT16
        cast = ir.node('Cast', [stored], {'to': int(ir.DataType.FLOAT)})
        value.replace_all_uses_with(cast.outputs[0])
        graph.initializers.pop(name)
        graph.register_initializer(stored)
        graph.insert_before(graph[0], cast)


def _write_openvino(onnx: Path, path: Path, precision: str, calibration: Sequence[Sequence[Tensor]]) -> None:
    import openvino

    network = openvino.convert_model(str(onnx))
    if precision == 'int8':
        import nncf

        images = nncf.Dataset([[x.numpy() for x in inputs] for inputs in calibration])
        network = nncf.quantize(network, images, subset_size=len(calibration))
    openvino.save_model(network, str(path), compress_to_fp16=precision == 'fp16')


def _quantize_onnx(onnx: Path, path: Path, names: Sequence[str], calibration: Sequence[Sequence[Tensor]]) -> None:
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.left = iter(calibration)

        def get_next(self) -> dict | None:
            inputs = next(self.left, None)
            return None if inputs is None else {name: x.numpy() for name, x in zip(names, inputs, strict=True)}

    prepared = onnx.with_name('prepared.onnx')
    quant_pre_process(str(onnx), str(prepared), skip_symbolic_shape=True)
    quantize_static(
        str(prepared),
        str(path),
        Reader(),
        quant_format=QuantFormat.QDQ,
        op_types_to_quantize=['Conv', 'Gemm', 'MatMul'],
        per_channel=True,
    )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hide what exporters print and log below an error."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter('ignore')
            yield
    finally:
        logging.disable(level)
