"""A folder with an exported network and its manifest, and the engines that run it.

``manifest.json`` has what one needs to run the network without this package, where it came from, and how far its
outputs are from those of torch.
"""

import importlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor

from replk_mm.checkpoints.io import MANIFEST, is_export
from replk_mm.errors import UserError, first_line, format_list
from replk_mm.files import sha256

FORMATS = ('onnx', 'openvino', 'torch')
PRECISIONS = ('fp32', 'fp16', 'bf16', 'int8')
#: The file of the network in each format. Its weights may be in other files beside it.
NETWORK_FILES = {'onnx': 'network.onnx', 'openvino': 'network.xml', 'torch': 'network.pt2'}
#: Packages that each format needs, to export and to run.
PACKAGES = {'onnx': ('onnxruntime', 'onnx', 'onnxscript'), 'openvino': ('openvino', 'onnx', 'onnxscript'), 'torch': ()}
#: Environment variable that allows to load format ``torch``.
TRUST = 'REPLK_MM_TRUST_EXPORTS'
RUNTIMES = {'onnx': 'onnxruntime', 'openvino': 'openvino', 'torch': 'torch'}
#: Runs a network: one tensor for each input to one for each output.
Session = Callable[[Sequence[Tensor]], Sequence[Tensor]]


class _Strict(BaseModel):
    model_config = ConfigDict(extra='forbid')


class TensorInfo(_Strict):
    """An input or output of the network."""

    name: str
    dtype: str  #: as in numpy
    shape: list[int | str]  #: a name stands for any size
    meaning: str


class Normalization(_Strict):
    """What happens to an image, RGB or BGR in 0..255, before it becomes the input ``image``."""

    channel_order: Literal['RGB', 'BGR', 'as loaded']
    mean: list[float]  #: subtracted from each channel
    std: list[float]  #: each channel is then divided by it
    pad_size_divisor: int = 1  #: height and width are padded to a multiple of it, at the right and at the bottom
    pad_value: float = 0.0  #: after the normalization


class Comparison(_Strict):
    """Difference of one output of the exported network from torch's."""

    images: str  #: which images
    output: str
    difference: float  #: of segmentors and detectors, share of pixels or objects that differ; else relative difference
    tolerance: float
    unit: Literal['relative', 'share']
    count: int  #: number of values, pixels, images or objects that were compared

    @property
    def ok(self) -> bool:
        """Whether the difference is within the tolerance."""
        return self.difference <= self.tolerance  # False for NaN

    def __str__(self) -> str:
        unit = 'values, relative to the largest' if self.unit == 'relative' else 'differ'
        verdict = 'within' if self.ok else 'BEYOND'
        value = f'{self.difference:.1e}' if self.unit == 'relative' else f'{self.difference:.3%}'
        limit = f'{self.tolerance:.0e}' if self.unit == 'relative' else f'{self.tolerance:.2%}'
        return f'{self.images}: {self.output}: {value} of {self.count:,} {unit}, {verdict} the tolerance of {limit}'


class Manifest(_Strict):
    """The content of ``manifest.json``."""

    schema_version: Literal[1] = 1
    generator: str  #: program that wrote it
    format: Literal['onnx', 'openvino', 'torch']
    precision: Literal['fp32', 'fp16', 'bf16', 'int8']
    network: str  #: file of the network in this folder
    files: dict[str, str]  #: SHA-256 of each file of the network
    opset: int | None  #: of ONNX; None for other formats
    task: Literal['segmentation', 'detection', 'classification']
    model: str  #: class of the model
    inputs: list[TensorInfo]
    outputs: list[TensorInfo]
    smallest_size: list[int]  #: smallest height and width in pixels; of a fixed shape, that
    normalization: Normalization
    classes: list[str]
    palette: list[list[int]]  #: colour of each class, RGB
    config: str
    checkpoint: dict[str, str | None]  #: name and SHA-256
    iteration: int | None = None  #: iterations of its training, if it states them
    #: how the test pipeline of the config resizes images: width and height, and whether it keeps their ratio
    resize: dict[str, Any] | None = None
    reparameterization: str  #: what was merged and folded
    comparisons: list[Comparison]
    calibration_images: int | None = None  #: number of images that set the ranges of int8
    #: of detectors, the test settings that are part of the network; else those that apply to its outputs
    postprocessing: dict[str, Any]
    weights: str  #: SHA-256 of the names and shapes of the weights of the model before merging
    environment: dict[str, Any]


def is_artefact(path: str | Path) -> bool:
    """Whether a path is the folder of an exported network."""
    return is_export(Path(path))


def read_manifest(folder: str | Path) -> Manifest:
    """Read ``manifest.json``.

    Raises:
        UserError: If it is damaged or of another version, or a file is missing or has changed.
    """
    path = Path(folder, MANIFEST)
    try:
        manifest = Manifest.model_validate_json(path.read_bytes())
    except (ValidationError, OSError) as error:
        why = first_line(error)
        if isinstance(error, ValidationError):
            first = error.errors()[0]
            why = f'{".".join(map(str, first["loc"]))}: {first["msg"]}'
        raise UserError(
            f'{path}: cannot be read: {why:.200}\nExport the network again, or use the release that wrote it.'
        ) from error
    for name, expected in {manifest.network: '', **manifest.files}.items():
        file = Path(folder, name)
        if Path(name).name != name or not file.is_file():
            raise UserError(f'{file}: is missing\nCopy the whole folder, or export the network again.')
        if expected and sha256(file) != expected:
            raise UserError(f'{file}: is not the file that was exported (its SHA-256 differs)\nExport it again.')
    return manifest


class Artefact:
    """An exported network in an engine, on the CPU.

    Args:
        folder: The folder that the export wrote.
        threads: Threads of the engine. Defaults to torch's.
        trust: Load format ``torch``, which can run any code. By default, only if the environment has :data:`TRUST`.

    Raises:
        UserError: If the folder is damaged or not trusted, or the engine is not installed or cannot run the network.
    """

    def __init__(self, folder: str | Path, threads: int | None = None, trust: bool = False) -> None:
        self.folder, self.manifest = Path(folder), read_manifest(folder)
        if self.manifest.format == 'torch' and not (trust or os.environ.get(TRUST) == '1'):
            raise UserError(
                f'{folder}: torch.export.load runs code that a file of format torch may contain\n'
                f'If you trust its author, set {TRUST}=1; formats onnx and openvino need no trust.'
            )
        found = self.manifest
        inputs, outputs = ([tensor.name for tensor in tensors] for tensors in (found.inputs, found.outputs))
        path = self.folder / found.network
        self._session = load_session(path, found.format, found.precision, inputs, outputs, threads)

    def __call__(self, *inputs: Tensor) -> dict[str, Tensor]:
        """Run the network on any number of images.

        Args:
            *inputs: One tensor for each input of the manifest, on any device. A network for a fixed number of images
                runs as often as needed, the last time with repeated images.

        Raises:
            UserError: If it was exported for images of another size.
        """
        device = inputs[0].device
        inputs = tuple(x.detach().cpu().float().contiguous() for x in inputs)
        self._check_shape(inputs[0])
        batch = self.manifest.inputs[0].shape[0]
        count = len(inputs[0])
        step = batch if isinstance(batch, int) else count
        results: list[Sequence[Tensor]] = []
        for start in range(0, count, step):
            part = [x[start : start + step] for x in inputs]
            if missing := step - len(part[0]):
                part = [torch.cat([x, x[-1:].expand(missing, *x.shape[1:])]) for x in part]
            results.append(self._session(part))
        names = [output.name for output in self.manifest.outputs]
        return {
            name: torch.cat(parts)[:count].to(device)
            for name, parts in zip(names, zip(*results, strict=True), strict=True)
        }

    def __deepcopy__(self, memo: dict) -> 'Artefact':
        return self  # an engine cannot be copied

    def _check_shape(self, image: Tensor) -> None:
        expected = self.manifest.inputs[0].shape
        smallest = self.manifest.smallest_size
        if any(isinstance(n, int) and n != given for n, given in zip(expected[1:], image.shape[1:], strict=True)):
            raise UserError(
                f'{self.folder}: exported for images of {"x".join(map(str, expected[1:]))}, this one has '
                f'{"x".join(map(str, image.shape[1:]))} (channels, height, width)\n'
                f'Export with --dynamic, or with --shape of the images that the config makes.'
            )
        if any(given < least for given, least in zip(image.shape[2:], smallest, strict=True)):
            raise UserError(
                f'{self.folder}: exported for images of at least {smallest[0]}x{smallest[1]}, this one has '
                f'{image.shape[2]}x{image.shape[3]} (height, width)\nExport with --shape of these images.'
            )


def missing_packages(names: Sequence[str]) -> list[str]:
    """Those of the packages that cannot be imported."""
    return [name for name in names if not _is_importable(name)]


def _is_importable(name: str) -> bool:
    try:
        importlib.import_module(name)
    except ImportError:
        return False
    return True


def require_packages(names: Sequence[str], what: str) -> None:
    """Raise an error if a package is not installed.

    Raises:
        UserError: With the command that installs it.
    """
    if missing := missing_packages(names):
        extra = 'openvino,onnx' if {'openvino', 'nncf'} & {*names} else 'onnx'
        raise UserError(
            f'{what}: cannot be imported: {format_list(missing)}\n'
            f'Run make setup EXTRAS={extra}, or pip install {" ".join(missing)}.'
        )


def load_session(
    path: Path, format: str, precision: str, inputs: Sequence[str], outputs: Sequence[str], threads: int | None = None
) -> Session:
    """Load a network into the engine of its format.

    Args:
        path: The file of the network.
        format: A name in :data:`FORMATS`.
        precision: A name in :data:`PRECISIONS`.
        inputs: Names of its inputs.
        outputs: Names of the outputs to return.
        threads: Threads of the engine. Defaults to torch's, which also applies to format ``torch``.

    Raises:
        UserError: If the engine is not installed, does not support the precision, or rejects the network.
    """
    engine = RUNTIMES[format]
    require_packages((engine,), f'{path.parent}: format {format}')
    threads = threads or torch.get_num_threads()
    try:
        if format == 'onnx':
            return _load_onnx(path, inputs, outputs, threads)
        if format == 'openvino':
            return _load_openvino(path, outputs, threads, precision)
        return _load_torch(path)
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f'{path}: {engine} cannot load the network: {first_line(error):.300}\nExport it again.'
        ) from error


def _load_onnx(path: Path, inputs: Sequence[str], outputs: Sequence[str], threads: int) -> Session:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads, options.log_severity_level = threads, 1, 3
    # Threads that spin after a call would slow down what torch computes next.
    options.add_session_config_entry('session.force_spinning_stop', '1')
    session = onnxruntime.InferenceSession(str(path), options, providers=['CPUExecutionProvider'])

    def run(tensors: Sequence[Tensor]) -> list[Tensor]:
        feed = {name: x.numpy() for name, x in zip(inputs, tensors, strict=True)}
        return [torch.from_numpy(x) for x in session.run(list(outputs), feed)]

    return run


def _load_openvino(path: Path, outputs: Sequence[str], threads: int, precision: str) -> Session:
    import openvino

    if precision == 'bf16' and not openvino_has_bfloat16():
        raise UserError(f'{path.parent}: OpenVINO has no bfloat16 on this CPU\nExport it with another --precision.')
    settings = {
        # Without the hint it computes in bfloat16 on CPUs that support it.
        'INFERENCE_PRECISION_HINT': 'bf16' if precision == 'bf16' else 'f32',
        'INFERENCE_NUM_THREADS': threads,
        'PERFORMANCE_HINT': 'LATENCY',
    }
    request = openvino.Core().compile_model(str(path), 'CPU', settings).create_infer_request()

    def run(tensors: Sequence[Tensor]) -> list[Tensor]:
        found = request.infer([x.numpy() for x in tensors], share_inputs=True)
        return [torch.from_numpy(found[name].copy()) for name in outputs]  # the engine reuses its own

    return run


def openvino_has_bfloat16() -> bool:
    """Whether OpenVINO computes in bfloat16 on this CPU."""
    import openvino

    return 'BF16' in openvino.Core().get_property('CPU', 'OPTIMIZATION_CAPABILITIES')


def _load_torch(path: Path) -> Session:
    from replk_mm import mmcv_ops
    from replk_mm.deploy import operators  # noqa: F401  (registers those of detectors)

    mmcv_ops.install()
    network = torch.export.load(str(path)).module()

    def run(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        with torch.no_grad():
            return network(*tensors)

    return run


def fit_image(image: Tensor, shape: Sequence[int]) -> Tensor:
    """Interpolate images ``(N, C, H, W)`` to a height and width, unless they have them."""
    if tuple(image.shape[2:]) == tuple(shape):
        return image
    return F.interpolate(image, tuple(shape), mode='bilinear', align_corners=False)
