"""A measured effective receptive field: its figures, and the files that keep it."""
import json
import zipfile
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from replk_mm.engine import results
from replk_mm.errors import UserError

#: Shares of the contribution whose areas are given, as the paper's table has them.
SHARES = (0.2, 0.3, 0.5, 0.99)
KIND = 'effective receptive field'
_VERSION = 1
#: What a matrix's file has beside 8 bytes for each score, at most.
_NPZ_HEADER = 4096
#: What a file says of a field.
_TYPES = dict(backbone=str, config=str, weights=str, trained=bool, stage=int, channels=int, size=int, images=int,
              image_set=str, silent=int, preprocessing=dict, environment=dict)


@dataclass(frozen=True)
class Erf:
    """A measured effective receptive field.

    Attributes:
        scores: Contribution scores, ``(size, size)`` float64.
        backbone: Type and size of the network.
        config: Name of its config.
        weights: Where its weights are from, in words.
        trained: False for random weights.
        checkpoint: Path and hash of the file of weights; None for random ones.
        stage: Index of the feature map among the backbone's outputs.
        channels: Of that map.
        map_size: Its height and width.
        size: Side of the images in pixels.
        images: How many.
        image_set: Hash of their contents.
        silent: How many of them gave no gradient at all.
        preprocessing: Mean, standard deviation and order of channels.
        environment: Versions and hardware.
    """

    scores: np.ndarray
    backbone: str
    config: str
    weights: str
    trained: bool
    checkpoint: dict[str, Any] | None
    stage: int
    channels: int
    map_size: tuple[int, int]
    size: int
    images: int
    image_set: str
    silent: int
    preprocessing: dict[str, Any]
    environment: dict[str, Any]

    @property
    def stride(self) -> float:
        """Pixels of the image for one of the map, along the height."""
        return self.size / self.map_size[0]

    @property
    def offset(self) -> tuple[float, float] | None:
        """Centre of gravity of the scores in pixels below and to the right of the middle; None if all are 0.

        A map's middle position lies over pixel ``size // 2`` in networks whose strided convolutions are padded (ResNet); in
        those that cut the image into patches (ConvNeXt, Swin) it lies over the patch that starts there.
        """
        total = self.scores.sum()
        if not total > 0:
            return None
        at = np.arange(self.size) - self.size // 2
        return float(self.scores.sum(1) @ at / total), float(self.scores.sum(0) @ at / total)

    def values(self) -> dict[str, Any]:
        """What a suite records: areas in the paper's scale and of the scores themselves; null where all scores are 0."""
        return dict(areas=areas(paper_scale(self.scores)), areas_of_scores=areas(self.scores), size=self.size,
                    images=self.images, trained=self.trained, weights=self.weights)

    def protocol(self) -> dict[str, Any]:
        """What two measurements must have in common to be compared."""
        return dict(size=self.size, images=self.images, image_set=self.image_set, stage=self.stage, trained=self.trained)

    def notes(self) -> list[str]:
        """What a reader must know of it."""
        found = []
        if not self.trained:
            found.append('WEIGHTS: UNTRAINED. This is the receptive field of random weights, not what the network learns to '
                         'look at; name a CHECKPOINT, or a backbone\'s weights with --pretrained FILE')
        if self.silent:
            found.append(f'{self.silent} of {self.images} images contribute nothing: the centre of the map is at most 0 in '
                         f'every channel there, or its gradient is nowhere positive'
                         + ('; there are no areas' if self.silent == self.images else ''))
        return found

    def save(self, folder: Path) -> None:
        """Write ``erf.json`` and ``erf.npz`` (the scores).

        Raises:
            UserError: If they cannot be written.
        """
        known = {key: value for key, value in asdict(self).items() if key != 'scores'}
        record = dict(kind=KIND, version=_VERSION, **known, stride=self.stride, offset=self.offset, values=self.values(),
                      protocol=self.protocol(), matrix='erf.npz')
        try:
            np.savez_compressed(folder / 'erf.npz', scores=self.scores)
        except OSError as error:
            raise UserError(f'{folder / "erf.npz"}: cannot be written ({error.strerror})\n'
                            f'Make room, or choose another place with --out DIR.') from error
        results.write(record, folder / 'erf.json')

    @classmethod
    def load(cls, path: Path) -> 'Erf':
        """Read what :meth:`save` wrote.

        Args:
            path: Of ``erf.json``.

        Raises:
            UserError: If it is something else, or its matrix is missing or of another size.
        """
        advice = 'It is the erf.json that tools/erf.py CONFIG --images DIR --out DIR writes, with erf.npz beside it.'
        try:
            record = json.loads(path.read_text(encoding='utf-8'))
            if record['kind'] != KIND or record['version'] != _VERSION:
                raise ValueError(f'kind {record["kind"]!r}, version {record["version"]!r}')
            matrix, size = path.with_name(str(record['matrix'])), record['size']
            with zipfile.ZipFile(matrix) as archive:
                unpacked = sum(entry.file_size for entry in archive.infolist())
            if type(size) is not int or size < 1 or unpacked > 8 * size**2 + _NPZ_HEADER:
                raise ValueError(f'its images are of {size!r:.40} pixels, and its matrix unpacks to {unpacked:,} bytes')
            with np.load(matrix) as stored:
                scores = stored['scores']
            if scores.shape != (record['size'],) * 2:
                raise ValueError(f'its matrix is {scores.shape}, its images of {record["size"]} pixels')
            if not np.isfinite(scores).all() or scores.min() < 0:
                raise ValueError('its matrix has scores below 0, or that are not finite')
            known = {key: record[key] for key in cls.__dataclass_fields__ if key != 'scores'}
            wrong = [key for key, kind in _TYPES.items() if type(known[key]) is not kind]
            if wrong:
                raise ValueError(f'its {wrong[0]} is {str(known[wrong[0]])[:40]}')
            height, width = known['map_size']
            if min(height, width) < 1:
                raise ValueError(f'a map of {height}x{width}')
        except FileNotFoundError as error:
            raise UserError(f'{error.filename}: no such file\n{advice}') from error
        except (OSError, EOFError, ValueError, LookupError, TypeError, RuntimeError, MemoryError, OverflowError, zlib.error,
                zipfile.BadZipFile) as error:
            raise UserError(f'{path}: no effective receptive field: {type(error).__name__}: {error}\n{advice}') from error
        return cls(scores, **{**known, 'map_size': (height, width)})


def paper_scale(scores: np.ndarray) -> np.ndarray:
    """log10(score + 1) over its largest value; zeros stay zeros."""
    logs = np.log1p(scores)  # of any base; score + 1 itself would lose what is below 1e-16
    largest = logs.max()
    return logs / largest if largest > 0 else logs


def areas(matrix: np.ndarray) -> dict[str, dict[str, Any]]:
    """The smallest centred square that holds each of :data:`SHARES` of a matrix's sum.

    Args:
        matrix: ``(size, size)``, nowhere negative.

    Returns:
        By share, ``side`` in pixels and ``ratio`` of the image's area; None both if the sum is 0. Sides are odd, as the
        authors' are; the square that would leave the image is the whole image.
    """
    size = len(matrix)
    away = np.abs(np.arange(size) - size // 2)
    rings = np.bincount(np.maximum.outer(away, away).ravel(), weights=matrix.ravel())
    held = np.cumsum(rings)
    found: dict[str, dict[str, Any]] = {}
    for share in SHARES:
        if held[-1] > 0:
            side = min(2 * int(np.searchsorted(held, share * held[-1])) + 1, size)
            found[str(share)] = dict(side=side, ratio=(side / size)**2)
        else:
            found[str(share)] = dict(side=None, ratio=None)
    return found
