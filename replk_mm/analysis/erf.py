"""Effective receptive field of a config's backbone; :mod:`replk_mm.analysis.receptive_field` defines it."""

import copy
import hashlib
import io
import json
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn as nn
from mmengine.config import Config, ConfigDict
from mmengine.registry import MODELS, init_default_scope
from PIL import Image
from pydantic import BaseModel, NonNegativeInt, PositiveInt
from torch import Tensor

from replk_mm.analysis.benchmark.case import randomize_constants
from replk_mm.analysis.receptive_field import (
    CENTER,
    GaussianFit,
    ImageShares,
    areas,
    effective_receptive_field,
    fit_gaussian,
    paper_scale,
    pixel_at,
)
from replk_mm.analysis.statistics import Interval, interval
from replk_mm.checkpoints.io import fetch_checkpoint, hash_checkpoint
from replk_mm.checkpoints.loading import load_pretrained
from replk_mm.data.datasets import as_list
from replk_mm.engine.config import fit_to_machine
from replk_mm.engine.config_errors import explain_build_errors
from replk_mm.engine.inference import build_for_inference
from replk_mm.engine.process import select_device
from replk_mm.engine.record import environment_info, write_record
from replk_mm.errors import UserError, command_line, explain_errors
from replk_mm.files import sha256, write_output
from replk_mm.logs import show_progress

KIND = 'effective receptive field'
_VERSION = 1
#: Largest side of images in pixels.
MAX_SIZE = 8192
#: Suffixes of image files.
SUFFIXES = ('.jpg', '.jpeg', '.png', '.bmp', '.webp', '.tif', '.tiff')
# ImageNet's mean and standard deviation of values 0..255, for configs without a data preprocessor.
_MEAN, _STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)


class Erf(BaseModel):
    """A measured effective receptive field; the schema of ``erf.json``."""

    model_config = dict(frozen=True, arbitrary_types_allowed=True)

    scores: np.ndarray  #: contribution scores ``(size, size)`` in float64; stored in ``erf.npz``
    backbone: str  #: type and size of the network
    config: str  #: name of its config
    weights: str  #: description of its weights
    trained: bool  #: false for random weights
    checkpoint: dict[str, Any] | None  #: path and hash of the file with the weights; None for random ones
    stage: NonNegativeInt  #: index of the feature map among the backbone's outputs
    channels: PositiveInt  #: channels of that map
    map_size: tuple[PositiveInt, PositiveInt]  #: its height and width
    size: PositiveInt  #: side of the images in pixels
    images: PositiveInt  #: number of images
    image_set: str  #: SHA-256 of their contents
    silent: NonNegativeInt  #: number of images without any gradient
    preprocessing: dict[str, Any]  #: mean, standard deviation and order of channels
    environment: dict[str, Any]  #: versions and hardware
    iteration: int | None = None  #: of the training that wrote the checkpoint
    profiles: np.ndarray | None = None  #: of each image ``(images, size)``; stored in ``erf.npz``
    position: tuple[float, float] = CENTER  #: of the map, as fractions of its height and width

    @property
    def stride(self) -> float:
        """Pixels of the image per pixel of the map, along the height."""
        return self.size / self.map_size[0]

    @property
    def pixel(self) -> tuple[int, int]:
        """Row and column of the pixel at the position; the middle is ``size // 2``."""
        return pixel_at(self.position, self.scores.shape)

    @property
    def offset(self) -> tuple[float, float] | None:
        """Center of gravity of the scores in pixels below and to the right of :attr:`pixel`; None if all are 0.

        A map's middle position lies over pixel ``size // 2`` in networks whose strided convolutions are padded
        (ResNet). In networks that cut the image into patches (ConvNeXt, Swin) it lies over the patch that starts there.
        """
        total = self.scores.sum()
        if not total > 0:
            return None
        rows, columns = (np.arange(self.size) - at for at in self.pixel)
        return float(self.scores.sum(1) @ rows / total), float(self.scores.sum(0) @ columns / total)

    @cached_property
    def gaussian(self) -> GaussianFit | None:
        """The Gaussian that fits the scores best; None if all are 0."""
        return fit_gaussian(self.scores)

    @cached_property
    def side(self) -> Interval | None:
        """Side of the square with 50 % of the scores, interpolated, and its interval over images; None if unknown."""
        if self.profiles is None or not self.profiles.any():
            return None
        return interval([ImageShares(tuple(map(str, range(len(self.profiles)))), self.profiles)])

    def values(self) -> dict[str, Any]:
        """The values in a suite's record: areas in the paper's scale and of the scores; None if all scores are 0."""
        return dict(
            areas=areas(paper_scale(self.scores), self.pixel),
            areas_of_scores=areas(self.scores, self.pixel),
            gaussian=asdict(gaussian) if (gaussian := self.gaussian) else None,
            side_interval=[self.side.low, self.side.high] if self.side and self.side.low is not None else None,
            size=self.size,
            images=self.images,
            trained=self.trained,
            weights=self.weights,
        )

    def protocol(self) -> dict[str, Any]:
        """The settings that two comparable measurements share."""
        return dict(
            size=self.size, images=self.images, image_set=self.image_set, stage=self.stage, trained=self.trained
        )

    def notes(self) -> list[str]:
        """Warnings for the reader, one line each."""
        notes = []
        if not self.trained:
            notes.append(
                'WEIGHTS: UNTRAINED. This is the receptive field of random weights, not of a trained network; '
                "give a CHECKPOINT, or a backbone's weights with --pretrained FILE"
            )
        if self.silent:
            notes.append(
                f'{self.silent} of {self.images} images contribute nothing: in every channel, the center of the map '
                f'is at most 0 or its gradient is nowhere positive'
                + ('; there are no areas' if self.silent == self.images else '')
            )
        return notes

    def save(self, folder: Path) -> None:
        """Write ``erf.json``, and the scores as ``erf.npz``.

        Raises:
            UserError: If they cannot be written.
        """
        matrix = io.BytesIO()
        arrays: dict[str, Any] = dict(scores=self.scores, profiles=self.profiles)
        np.savez_compressed(matrix, **{name: array for name, array in arrays.items() if array is not None})
        write_output(folder / 'erf.npz', matrix.getvalue())
        write_record(
            dict(
                kind=KIND,
                version=_VERSION,
                **self.model_dump(exclude={'scores', 'profiles'}),
                stride=self.stride,
                offset=self.offset,
                values=self.values(),
                protocol=self.protocol(),
                matrix='erf.npz',
            ),
            folder / 'erf.json',
        )

    @classmethod
    def load(cls, path: Path) -> 'Erf':
        """Read the files that :meth:`save` has written.

        Args:
            path: Path of ``erf.json``; ``erf.npz`` lies beside it.

        Raises:
            UserError: If the file is something else, or its matrix is missing or does not fit.
        """
        advice = f'Use an erf.json that {command_line("erf")} wrote, with erf.npz beside it.'
        try:
            record = json.loads(path.read_text(encoding='utf-8'))
            if (record['kind'], record['version']) != (KIND, _VERSION):
                raise ValueError(f'kind {record["kind"]!r}, version {record["version"]!r}')
            with np.load(path.with_name(str(record['matrix']))) as stored:
                arrays = {name: stored[name].astype(float) for name in stored}  # the first version has no profiles
            shapes = dict(scores=(record['size'], record['size']), profiles=(record['images'], record['size']))
            for name, array in arrays.items():
                if array.shape != shapes[name] or not np.isfinite(array).all() or array.min() < 0:
                    raise ValueError(f'{name} must have the shape {shapes[name]}, be finite and nowhere negative')
            erf = cls.model_validate({**record, **arrays})
        except FileNotFoundError as error:
            raise UserError(f'{error.filename}: no such file\n{advice}') from error
        except Exception as error:  # a damaged archive raises one of a dozen types
            raise UserError(
                f'{path}: not an effective receptive field: {type(error).__name__}: {error}\n{advice}'
            ) from error
        return erf


def measure_erf(
    cfg: Config,
    checkpoint: str | None,
    images: Path,
    size: int,
    count: int,
    out: Path,
    stage: int | None = None,
    device: str | None = 'cpu',
    *,
    pretrained: str | None = None,
    seed: int = 0,
    randomize: bool = False,
    position: tuple[float, float] = CENTER,
) -> Erf:
    """Measure the effective receptive field of a config's backbone, and write ``erf.json`` and ``erf.npz``.

    Args:
        cfg: Config of a segmentor, a detector or a bare backbone; left unchanged.
        checkpoint: Weights of that model; None for ``pretrained`` or random weights.
        images: Folder of images, taken in the order of their paths.
        size: Side in pixels to which images are resized.
        count: Largest number of images.
        out: Folder for the two files.
        stage: Index of the feature map among the backbone's outputs. Defaults to the last.
        device: See :func:`replk_mm.engine.process.select_device`.
        pretrained: File of a backbone's weights, such as an ImageNet classifier's.
        seed: Seed of random weights.
        randomize: Also randomize norms and layer scales, see
            :func:`replk_mm.analysis.benchmark.case.randomize_constants`.
        position: Of the map, as fractions of its height and width. Defaults to the center.

    Raises:
        UserError: If an argument does not fit, or a gradient is not finite.
    """
    if size > MAX_SIZE:
        raise UserError(f'--size {size}: the largest is {MAX_SIZE}')
    target = select_device(device)
    files = image_files(Path(images), count)
    cfg = copy.deepcopy(cfg)
    node = cfg.model.get('backbone') or cfg.model
    mean, std, rgb = _normalization(cfg.model.get('data_preprocessor'), node.get('in_channels', 3))
    size_of = next((node[key] for key in ('arch', 'depth', 'model_name') if isinstance(node.get(key), (str, int))), '')
    name, config = f'{str(node.type).rpartition(".")[2]} {size_of}'.strip(), Path(str(cfg.filename)).stem
    backbone, weights, iteration = _load_backbone(cfg, node, checkpoint, pretrained, seed, randomize, target)
    path = files[0]

    def load_images() -> Iterator[Tensor]:
        nonlocal path
        for path in show_progress(files, 'images'):
            yield read_image(path, size, mean, std, rgb).to(target)

    with explain_errors(f'{config}: {name} fails on an image of {size}x{size}', 'Try another --size.'):
        try:
            field = effective_receptive_field(backbone, load_images(), stage, position)
        except FloatingPointError as error:
            raise UserError(
                f'{path}: the gradient of {name} is not finite with this image\n'
                f'Weights: {weights}. Remove the image, or use other weights.'
            ) from error
    source = checkpoint or pretrained
    file = fetch_checkpoint(source) if source else None
    erf = Erf(
        scores=field.scores,
        backbone=name,
        config=config,
        weights=weights,
        trained=file is not None,
        checkpoint=dict(path=str(file), sha256=hash_checkpoint(file)) if file else None,
        stage=field.stage,
        channels=field.map_shape[1],
        map_size=(field.map_shape[2], field.map_shape[3]),
        size=size,
        images=len(files),
        image_set=hash_images(files),
        silent=field.silent,
        iteration=iteration,
        profiles=field.profiles,
        position=position,
        environment=environment_info(),
        preprocessing=dict(mean=list(mean), std=list(std), channels='RGB' if rgb else 'BGR'),
    )
    erf.save(Path(out))
    return erf


def read_image(path: Path, size: int, mean: Sequence[float], std: Sequence[float], rgb: bool) -> Tensor:
    """Read an image, resize it to a square by bicubic interpolation as the RepLKNet authors do, and normalize it.

    Args:
        path: The file.
        size: Side in pixels.
        mean: Mean of each channel, values 0..255.
        std: Standard deviation of each channel.
        rgb: Whether channels are in the order RGB; otherwise BGR.

    Returns:
        ``(1, C, size, size)``.

    Raises:
        UserError: If it cannot be read.
    """
    try:
        with Image.open(path) as opened:
            bands = (opened.convert('RGB') if len(mean) == 3 else opened).split()
            square = np.stack([np.asarray(band.resize((size, size), Image.Resampling.BICUBIC)) for band in bands])
    except Exception as error:  # Pillow's readers raise many types for damaged files
        raise UserError(
            f'{path}: not a readable image ({error or type(error).__name__})\n'
            f'Repair or remove it; --images takes every image of a folder.'
        ) from error
    if len(bands) != len(mean):
        raise UserError(
            f'{path}: {len(bands)} channels; the network takes {len(mean)}\nUse images like the training data.'
        )
    pixels = torch.from_numpy(square).float()[None]
    pixels = pixels if rgb or len(bands) < 3 else pixels[:, [2, 1, 0, *range(3, len(bands))]]
    return (pixels - torch.tensor(mean).view(1, -1, 1, 1)) / torch.tensor(std).view(1, -1, 1, 1)


def _load_backbone(
    cfg: Config,
    node: ConfigDict,
    checkpoint: str | None,
    pretrained: str | None,
    seed: int,
    randomize: bool,
    device: str,
) -> tuple[nn.Module, str, int | None]:
    """The backbone in evaluation mode, a description of its weights, and their iteration in training."""
    iteration = None
    if checkpoint and pretrained:
        raise UserError(
            f'--pretrained {pretrained}: the checkpoint {checkpoint} already has all weights\nGive one of the two.'
        )
    if randomize and (checkpoint or pretrained):
        raise UserError(
            f'--randomize: applies to random weights; {checkpoint or pretrained} has its own\nGive one of the two.'
        )
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # the libraries' warnings concern training
        if checkpoint:
            built = build_for_inference(cfg, checkpoint, device=device, packed=False)
            backbone = getattr(built.model, 'backbone', built.model)
            iteration = built.meta.get('iter')
            weights = f'{checkpoint}, iteration {iteration}' if iteration else checkpoint
        else:
            fit_to_machine(cfg, None, device, 1)
            _drop_pretrained(node)
            backbone, weights = _build_backbone(cfg, node, pretrained, seed, randomize)
    backbone.to(device).eval()  # a statement of its own: in mmseg and mmdet it returns None
    return backbone, weights, iteration


def _build_backbone(
    cfg: Config, node: ConfigDict, pretrained: str | None, seed: int, randomize: bool
) -> tuple[nn.Module, str]:
    """The backbone as it is before training, and a description of its weights."""
    init_default_scope(cfg.get('default_scope', 'mmengine'))
    with explain_build_errors(cfg, 'model'), torch.random.fork_rng():
        torch.manual_seed(seed)
        backbone = MODELS.build(node)
        if hasattr(backbone, 'init_weights'):
            backbone.init_weights()
    if pretrained:
        load_pretrained(backbone, pretrained, resize_kernels=cfg.get('resize_kernels'))
        return backbone, f'{pretrained} (backbone)'
    if randomize:
        randomize_constants(backbone, seed)
    return backbone, f'random, {"norms and scales too" if randomize else "as training starts"}, seed {seed}'


def _drop_pretrained(node: ConfigDict) -> None:
    """Remove the weight files from a backbone's config and from the networks inside it (mmseg's BiSeNet has one).

    Settings for random weights stay.
    """
    for part in node.values():
        if isinstance(part, dict):
            _drop_pretrained(part)
    initial = as_list(node.pop('init_cfg', None))
    # mmdet's PVT gives a file without a type.
    initial = [part for part in initial if part and part.get('type', 'Pretrained') != 'Pretrained']
    if initial:
        node['init_cfg'] = initial
    node.pop('pretrained', None)


def _normalization(node: ConfigDict | None, channels: int) -> tuple[tuple[float, ...], tuple[float, ...], bool]:
    """Mean, standard deviation and whether channels are RGB, of a config's preprocessor; ImageNet's without one."""
    if not node and channels == 3:
        return _MEAN, _STD, True
    node = node or ConfigDict()
    found = (tuple(map(float, node.get(key) or (default,))) for key, default in (('mean', 0), ('std', 1)))
    mean, std = (values * channels if len(values) == 1 else values for values in found)
    # Of mmseg and mmdet, and of mmpretrain: all swap the channels of BGR images.
    return mean, std, any(node.get(key) for key in ('bgr_to_rgb', 'rgb_to_bgr', 'to_rgb'))


def image_files(folder: Path, count: int) -> list[Path]:
    """The first ``count`` images in a folder and its subfolders, sorted by path; all if there are fewer.

    Raises:
        UserError: If there is no such folder, or no image in it.
    """
    if not folder.is_dir():
        raise UserError(f'--images {folder}: {"it is a file" if folder.is_file() else "no such folder"}')
    files = sorted(path for path in folder.rglob('*') if path.suffix.lower() in SUFFIXES and path.is_file())
    if not files:
        raise UserError(
            f'--images {folder}: no image in it or its subfolders\n'
            f'Images are files that end with {", ".join(SUFFIXES)}.'
        )
    return files[:count]


def hash_images(files: Sequence[Path]) -> str:
    """SHA-256 of the contents of images in their order, independent of their names."""
    return hashlib.sha256(b''.join(bytes.fromhex(sha256(path)) for path in files)).hexdigest()
