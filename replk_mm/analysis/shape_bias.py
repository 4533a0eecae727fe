"""Shape bias: does a network decide by shape or by texture, where the two cues conflict?

Geirhos, Rubisch, Michaelis, Bethge, Wichmann, Brendel, "ImageNet-trained CNNs are biased towards texture; increasing
shape bias improves accuracy and robustness", ICLR 2019, arXiv:1811.12231, define shape bias: among decisions for the
class of the shape or that of the texture, the share of decisions for the shape. A decision is the prediction of a
classifier (``shape_bias_images.py``), or of a segmentor the class that most pixels of an object are predicted as, among
the classes of objects.

The share hides how often a network uses either cue: 1 decision by shape, none by texture and 999 others give a shape
bias of 1. So the accuracies by shape and by texture, of all decisions, stand beside it.
"""

import copy
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from mmengine.config import Config
from torch import nn

from replk_mm.checkpoints.io import fetch_checkpoint, hash_checkpoint
from replk_mm.data.scenes.cue_conflict import CueConflictDataset, CueConflictScene, read_cue_conflict, read_label_map
from replk_mm.engine.predict import is_segmentor, label_map, load_for_prediction, predict
from replk_mm.engine.record import environment_info, write_record
from replk_mm.errors import UserError
from replk_mm.visualize import overlay, write_figure

#: Part of the protocol of records: only results with the same text are compared.
DEFINITION = (
    'of the objects decided for the class of their shape or that of their texture, the share decided for the '
    'shape (Geirhos et al., ICLR 2019); an object is decided for the class that most of its pixels are '
    'predicted as, of the classes of objects alone; neither of the two, a tie, or no pixel of any such class '
    "is 'other', which does not count in the share"
)
#: Largest number of objects in the picture and in one of its rows; side of each in pixels.
_SHOWN, _COLUMNS, _SIDE = 12, 4, 144
#: Colors of Okabe and Ito, distinct for color-blind readers.
COLORS = {'shape': '#0072B2', 'texture': '#D55E00', 'other': '#555555'}


@dataclass(frozen=True)
class Decision:
    """The decision of a network about an object or an image."""

    image: str  #: name of the image
    shape: str  #: class of the shape
    texture: str  #: class of the texture
    decided: str | None  #: a class; None for a tie, or if no pixel has a class of objects
    box: tuple[int, int, int, int] | None = None  #: of the object, in pixels; None for the whole image

    @property
    def cue(self) -> str:
        """The cue whose class was decided for: ``'shape'``, ``'texture'`` or ``'other'``."""
        cues = {self.texture: 'texture', self.shape: 'shape'}  # agreeing cues count as shape
        return cues.get(self.decided or '', 'other')


@dataclass(frozen=True)
class ShapeBias:
    """All decisions of a network."""

    conflict: Sequence[Decision]  #: where shape and texture are of different classes
    agreeing: Sequence[Decision]  #: where they are of one class
    data: Mapping[str, Any]  #: the settings that comparable results share

    def values(self) -> dict[str, Any]:
        """Numbers and shares of decisions, in all and by class of the shape.

        ``shape_bias`` is from 0 (texture) to 1 (shape), over the decisions of all classes; ``mean_over_classes`` is the
        mean of the shape biases of the classes. ``agreeing_accuracy`` is the share of correct decisions where the cues
        agree. Shares of nothing are None.
        """
        per_class = {
            name: _bias_of([d for d in self.conflict if d.shape == name])
            for name in sorted({d.shape for d in self.conflict})
        }
        biases = [row['shape_bias'] for row in per_class.values() if row['shape_bias'] is not None]
        correct = sum(d.cue == 'shape' for d in self.agreeing)
        return dict(
            **_bias_of(self.conflict),
            mean_over_classes=_share(sum(biases), len(biases)),
            per_class=per_class,
            agreeing_accuracy=_share(correct, len(self.agreeing)),
            agreeing_objects=len(self.agreeing),
        )


def _share(part: float, whole: int) -> float | None:
    return part / whole if whole else None


def _bias_of(decisions: Sequence[Decision]) -> dict[str, Any]:
    count = Counter(d.cue for d in decisions)
    return dict(
        shape_decisions=count['shape'],
        texture_decisions=count['texture'],
        other=count['other'],
        shape_accuracy=_share(count['shape'], len(decisions)),
        texture_accuracy=_share(count['texture'], len(decisions)),
        shape_bias=_share(count['shape'], count['shape'] + count['texture']),
    )


def majority_class(predicted: np.ndarray, mask: np.ndarray, classes: Mapping[str, int]) -> str | None:
    """The class that most pixels of an object are predicted as, among the classes of objects.

    Args:
        predicted: Class indices ``(H, W)``.
        mask: The object's pixels ``(H, W)``.
        classes: Index in ``predicted`` of each class of objects.

    Returns:
        Its name; None for a tie, or if no pixel has a class of objects.
    """
    counts = {name: int((predicted[mask] == index).sum()) for name, index in classes.items()}
    most = max(counts.values())
    names = [name for name, count in counts.items() if count == most]
    return names[0] if most and len(names) == 1 else None


def measure_shape_bias(
    cfg: Config, checkpoint: str, data_root: Path, out: Path, device: str | None = 'cpu'
) -> ShapeBias:
    """Measure the shape bias of a trained segmentation network; write ``shape_bias.json`` and ``shape_bias.png``.

    Args:
        cfg: The config it was trained with, on objects with both cues; left unchanged.
        checkpoint: Path or URL.
        data_root: Folder with ``conflict.json``, see :mod:`replk_mm.data.scenes.cue_conflict`.
        out: Folder for the two files.
        device: See :func:`replk_mm.engine.process.select_device`.

    Raises:
        UserError: If the data set, the checkpoint or their classes do not fit, or nothing can be written.
    """
    dataset = read_cue_conflict(Path(data_root))
    model: Any = load_for_prediction(copy.deepcopy(cfg), checkpoint, device)
    classes = _object_classes(model, dataset, cfg)
    shown, panels, conflict = _select_objects(dataset.conflict), [], []
    for decision, image, predicted in _decisions(model, dataset, dataset.conflict, classes):
        conflict.append(decision)
        if (decision.image, decision.box) in shown:
            panels.append((decision, image, predicted))
    agreeing = [decision for decision, _, _ in _decisions(model, dataset, dataset.agreeing, classes)]
    scenes = dict(
        **dataset.about, sha256=dataset.sha256, conflict=len(dataset.conflict), agreeing=len(dataset.agreeing)
    )
    bias = ShapeBias(conflict, agreeing, dict(scenes=scenes, definition=DEFINITION))
    _draw_decisions(panels, bias.values(), classes, model.dataset_meta['palette'], out / 'shape_bias.png')
    path = fetch_checkpoint(checkpoint)
    write_decisions(bias, out, config=str(cfg.filename), checkpoint=dict(path=str(path), sha256=hash_checkpoint(path)))
    return bias


def write_decisions(bias: ShapeBias, out: Path, **network: Any) -> None:
    """Write ``shape_bias.json``: values, protocol, the network and all decisions.

    Raises:
        UserError: If it cannot be written.
    """
    write_record(
        dict(
            values=bias.values(),
            protocol=dict(bias.data),
            **network,
            decisions=[asdict(decision) for decision in (*bias.conflict, *bias.agreeing)],
            environment=environment_info(),
        ),
        out / 'shape_bias.json',
    )


def _object_classes(model: Any, dataset: CueConflictDataset, cfg: Config) -> dict[str, int]:
    """Index of each class of objects in the model's predictions, by name."""
    if not is_segmentor(model):
        raise UserError(
            f'{cfg.filename}: a detector; shape bias needs the label maps of a segmentor\n'
            f'Use a segmentation config and its checkpoint.'
        )
    classes = list(model.dataset_meta['classes'])
    needed = {
        name
        for scene in (*dataset.conflict, *dataset.agreeing)
        for item in scene.objects
        for name in (item.shape, item.texture)
    }
    if absent := [name for name in dataset.object_classes if name in needed and name not in classes]:
        raise UserError(
            f'{cfg.filename}: its network lacks classes of the objects: {", ".join(absent)}\n'
            f'It has: {", ".join(classes)}. Train it on the training scenes of the same data set.'
        )
    return {name: classes.index(name) for name in dataset.object_classes if name in classes}


def _select_objects(scenes: Sequence[CueConflictScene]) -> set[tuple[str, tuple[int, int, int, int]]]:
    """Image and box of the objects in the picture: the first of each pair of classes, then the second of each pair."""
    pairs = [(scene, item) for scene in scenes for item in scene.objects]
    turns = Counter[tuple[str, str]]()
    order = []
    for _, item in pairs:
        order.append(turns[item.shape, item.texture])
        turns[item.shape, item.texture] += 1
    chosen = sorted(range(len(pairs)), key=order.__getitem__)[:_SHOWN]
    return {(scene.name, item.box) for scene, item in (pairs[i] for i in chosen)}


def _decisions(
    model: nn.Module, dataset: CueConflictDataset, scenes: Sequence[CueConflictScene], classes: Mapping[str, int]
) -> Iterator[tuple[Decision, np.ndarray, np.ndarray]]:
    """The decision about each object, with the image (BGR) and the predicted classes ``(H, W)`` of its scene."""
    predictions = predict(model, [str(scene.image) for scene in scenes])
    for scene, (path, image, prediction) in zip(scenes, predictions, strict=True):
        predicted, labels = label_map(prediction), read_label_map(scene.labels)
        if predicted.shape != labels.shape:
            raise UserError(
                f'{scene.labels}: {labels.shape[0]}x{labels.shape[1]} pixels, and its image {path} has '
                f'{predicted.shape[0]}x{predicted.shape[1]}\nGenerate the data set again.'
            )
        for item in scene.objects:
            decided = majority_class(predicted, dataset.mask(scene, item, labels), classes)
            yield Decision(scene.name, item.shape, item.texture, decided, item.box), image, predicted


def _draw_decisions(
    panels: Sequence[tuple[Decision, np.ndarray, np.ndarray]],
    values: Mapping[str, Any],
    classes: Mapping[str, int],
    palette: Sequence[Sequence[int]],
    path: Path,
) -> None:
    """Draw each object beside its prediction, with the decision as title."""
    ordered = sorted(panels, key=lambda panel: (panel[0].shape, panel[0].texture))
    columns = min(_COLUMNS, len(ordered))
    rows = -(-len(ordered) // columns)
    figure = Figure(figsize=(3.1 * columns + 0.3, 2.05 * rows + 1.3), layout='constrained')
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis in axes:
        axis.axis('off')
    for axis, (decision, image, predicted) in zip(axes, ordered, strict=False):
        # Only classes of objects are colored, since others do not count for the decision.
        painted = overlay(image, np.where(np.isin(predicted, list(classes.values())), predicted, 255), palette)
        axis.imshow(np.hstack([_crop(image, decision), _crop(painted, decision)])[:, :, ::-1])
        axis.set_title(
            f'shape {decision.shape}, texture {decision.texture}\n'
            f'decided: {decision.decided or "nothing"} ({decision.cue})',
            fontsize=8.5,
            color=COLORS[decision.cue],
        )
    used = [name for name, index in classes.items() if any((predicted == index).any() for _, _, predicted in ordered)]
    figure.legend(
        handles=[Patch(color=f'#{bytes(palette[classes[name]]).hex()}', label=f'predicted {name}') for name in used],
        loc='outside lower center',
        ncols=max(1, len(used)),
        frameon=False,
        fontsize=8.5,
    )
    figure.suptitle(summary(values), fontsize=10)
    write_figure(path, figure)


def summary(values: Mapping[str, Any]) -> str:
    """The figures of :meth:`ShapeBias.values` in two lines, for pictures and terminals."""
    decisions = sum(values[key] for key in ('shape_decisions', 'texture_decisions', 'other'))
    shares = ', '.join(
        f'{100 * values[key] / max(decisions, 1):.1f} % {text}'
        for key, text in (('shape_decisions', 'by shape'), ('texture_decisions', 'by texture'), ('other', 'other'))
    )
    bias, agreeing = (
        '-' if values[key] is None else f'{values[key]:.3f}' for key in ('shape_bias', 'agreeing_accuracy')
    )
    return f'{decisions} decisions: {shares}\nshape bias {bias}; accuracy where the cues agree {agreeing}'


def _crop(image: np.ndarray, decision: Decision) -> np.ndarray:
    """A square around the object, resized to :data:`_SIDE` pixels; pixels outside the image are white."""
    assert decision.box
    left, top, right, bottom = decision.box
    half = round(0.7 * max(right - left, bottom - top))
    x, y = (left + right) // 2, (top + bottom) // 2
    padded = cv2.copyMakeBorder(image, half, half, half, half, cv2.BORDER_CONSTANT, value=(255, 255, 255))
    return cv2.resize(padded[y : y + 2 * half, x : x + 2 * half], (_SIDE, _SIDE), interpolation=cv2.INTER_NEAREST)
