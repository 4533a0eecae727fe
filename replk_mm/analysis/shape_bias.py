"""Does a segmentation network decide by shape or by texture? Objects with two cues tell.

Geirhos, Rubisch, Michaelis, Bethge, Wichmann, Brendel, "ImageNet-trained CNNs are biased towards texture; increasing
shape bias improves accuracy and robustness", ICLR 2019, arXiv:1811.12231: of the decisions for either the class of the
shape or that of the texture, the share for the shape. There a decision is a classifier's answer. Here it is the class
that most pixels of an object are predicted as, among the classes of objects: background inside an object is no answer.
"""

import copy
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from mmengine.config import Config
from torch import nn

from replk_mm.checkpoints.io import fetch_checkpoint
from replk_mm.data.scenes.cue_conflict import (
    CueConflictDataset,
    CueConflictObject,
    CueConflictScene,
    read_cue_conflict,
    read_label_map,
)
from replk_mm.engine import results
from replk_mm.engine.machine import prepare_work_dir
from replk_mm.engine.predict import is_segmentor, label_map, load_trained, predict
from replk_mm.errors import UserError
from replk_mm.files import sha256
from replk_mm.visualize import overlay

#: Part of the protocol of records: figures of another text are not compared.
DEFINITION = (
    'of the objects decided for the class of their shape or that of their texture, the share decided for the '
    'shape (Geirhos et al., ICLR 2019); an object is decided for the class that most of its pixels are '
    'predicted as, of the classes of objects alone; neither of the two, a tie, or no pixel of any such class '
    "is 'other', which does not count in the share"
)
#: Objects in the picture at most, and in one row of it, and the side of each in pixels.
_SHOWN, _COLUMNS, _SIDE = 12, 4, 144
# Colours of Okabe and Ito, which are safe for colour-blind readers; the text repeats them.
_COLOURS = {'shape': '#0072B2', 'texture': '#D55E00', 'other': '#555555'}


@dataclass(frozen=True)
class Decision:
    """The class that an object was decided for."""

    scene: CueConflictScene
    item: CueConflictObject
    decided: str | None  #: a class of objects; None for a tie or no pixel of such a class

    @property
    def cue(self) -> str:
        """``'shape'``, ``'texture'`` or ``'other'``: the cue whose class was decided for."""
        cues = {self.item.texture: 'texture', self.item.shape: 'shape'}  # of agreeing cues: shape
        return cues.get(self.decided or '', 'other')


@dataclass(frozen=True)
class ShapeBias:
    """The decisions of a network."""

    conflict: Sequence[Decision]  #: about objects whose shape and texture are of two classes
    agreeing: Sequence[Decision]  #: about objects whose shape and texture are of one class
    scenes: Mapping[str, Any]  #: which data set it is

    def values(self) -> dict[str, Any]:
        """Counts, ``shape_bias`` from 0 (texture) to 1 (shape), both also by the class of the shape, and the share of
        right decisions where the cues agree. A share of nothing is None."""
        right = sum(d.cue == 'shape' for d in self.agreeing)
        return dict(
            **_figures(self.conflict),
            per_class={
                name: _figures([d for d in self.conflict if d.item.shape == name])
                for name in sorted({d.item.shape for d in self.conflict})
            },
            agreeing_accuracy=right / len(self.agreeing) if self.agreeing else None,
            agreeing_objects=len(self.agreeing),
        )

    def protocol(self) -> dict[str, Any]:
        """What figures must have in common to be compared."""
        return dict(scenes=dict(self.scenes), definition=DEFINITION)


def _figures(decisions: Sequence[Decision]) -> dict[str, Any]:
    count = Counter(d.cue for d in decisions)
    either = count['shape'] + count['texture']
    return dict(
        shape_decisions=count['shape'],
        texture_decisions=count['texture'],
        other=count['other'],
        shape_bias=count['shape'] / either if either else None,
    )


def decide(predicted: np.ndarray, mask: np.ndarray, known: Mapping[str, int]) -> str | None:
    """The class that most pixels of an object are predicted as.

    Args:
        predicted: Class indices ``(H, W)``.
        mask: The object's pixels ``(H, W)``.
        known: Index of each class of objects in ``predicted``; other classes are no answer.

    Returns:
        Its name; None if no pixel has such a class, or several classes have equally many.
    """
    counts = {name: int((predicted[mask] == index).sum()) for name, index in known.items()}
    most = max(counts.values())
    first = [name for name, count in counts.items() if count == most]
    return first[0] if most and len(first) == 1 else None


def measure(cfg: Config, checkpoint: str, data_root: Path, out: Path, device: str | None = 'cpu') -> ShapeBias:
    """Measure the shape bias of a trained segmentation network; write ``shape_bias.json`` and ``shape_bias.png``.

    Args:
        cfg: The config it was trained with, on objects that carry both cues; left unchanged.
        checkpoint: Path or address.
        data_root: Folder with ``conflict.json``, see :mod:`replk_mm.data.scenes.cue_conflict`.
        out: Folder for the two files.
        device: See :func:`replk_mm.engine.machine.select_device`.

    Raises:
        UserError: If the data set, the checkpoint or their classes do not fit, or nothing can be written.
    """
    out = prepare_work_dir(out, option='--out')
    found = read_cue_conflict(Path(data_root))
    model: Any = load_trained(copy.deepcopy(cfg), checkpoint, device)
    known = _known(model, found, cfg)
    chosen, panels, conflict = _chosen(found.conflict), [], []
    for decision, image, predicted in _decisions(model, found, found.conflict, known):
        conflict.append(decision)
        if (decision.scene, decision.item) in chosen:
            panels.append((decision, image, predicted))
    agreeing = [decision for decision, _, _ in _decisions(model, found, found.agreeing, known)]
    bias = ShapeBias(
        conflict,
        agreeing,
        dict(**found.about, sha256=found.sha256, conflict=len(found.conflict), agreeing=len(found.agreeing)),
    )
    _draw(panels, bias.values(), known, model.dataset_meta['palette'], out / 'shape_bias.png')
    path = fetch_checkpoint(checkpoint)
    results.write(
        dict(
            values=bias.values(),
            protocol=bias.protocol(),
            config=str(cfg.filename),
            checkpoint=dict(path=str(path), sha256=sha256(path)),
            decisions=[
                dict(
                    image=d.scene.name,
                    box=list(d.item.box),
                    shape=d.item.shape,
                    texture=d.item.texture,
                    decided=d.decided,
                )
                for d in (*conflict, *agreeing)
            ],
            environment=results.environment(),
        ),
        out / 'shape_bias.json',
    )
    return bias


def _known(model: Any, found: CueConflictDataset, cfg: Config) -> dict[str, int]:
    """The index of each class of objects in the model's predictions, by name."""
    if not is_segmentor(model):
        raise UserError(
            f'{cfg.filename}: a detector; shape bias is measured on the label maps of segmentors\n'
            f'Name a segmentation config and its checkpoint.'
        )
    classes = list(model.dataset_meta['classes'])
    needed = {
        name
        for scene in (*found.conflict, *found.agreeing)
        for item in scene.objects
        for name in (item.shape, item.texture)
    }
    if absent := [name for name in found.object_classes if name in needed and name not in classes]:
        raise UserError(
            f'{cfg.filename}: its network has no class {", ".join(absent)}, of which there are objects\n'
            f'It has: {", ".join(classes)}. Train it on the training scenes of the same data set.'
        )
    return {name: classes.index(name) for name in found.object_classes if name in classes}


def _chosen(scenes: Sequence[CueConflictScene]) -> set[tuple[CueConflictScene, CueConflictObject]]:
    """Objects for the picture: the first of each pair of classes, then the second of each, and so on."""
    pairs = [(scene, item) for scene in scenes for item in scene.objects]
    turns = Counter[tuple[str, str]]()
    order = []
    for _, item in pairs:
        order.append(turns[item.shape, item.texture])
        turns[item.shape, item.texture] += 1
    return {pairs[i] for i in sorted(range(len(pairs)), key=order.__getitem__)[:_SHOWN]}


def _decisions(
    model: nn.Module, found: CueConflictDataset, scenes: Sequence[CueConflictScene], known: Mapping[str, int]
) -> Iterator[tuple[Decision, np.ndarray, np.ndarray]]:
    """The decision about each object, with the image (BGR) and the predicted class indices of its scene."""
    predictions = predict(model, [str(scene.image) for scene in scenes])
    for scene, (path, image, prediction) in zip(scenes, predictions, strict=True):
        predicted, labels = label_map(prediction), read_label_map(scene.labels)
        if predicted.shape != labels.shape:
            raise UserError(
                f'{scene.labels}: {labels.shape[0]}x{labels.shape[1]} pixels, and its image {path} has '
                f'{predicted.shape[0]}x{predicted.shape[1]}\nWrite the data set again.'
            )
        for item in scene.objects:
            yield Decision(scene, item, decide(predicted, found.mask(scene, item, labels), known)), image, predicted


def _draw(
    shown: Sequence[tuple[Decision, np.ndarray, np.ndarray]],
    values: Mapping[str, Any],
    known: Mapping[str, int],
    palette: Sequence[Sequence[int]],
    path: Path,
) -> None:
    """Write the picture: each object as it is and with its prediction, titled with its decision."""
    ordered = sorted(shown, key=lambda panel: (panel[0].item.shape, panel[0].item.texture))
    columns = min(_COLUMNS, len(ordered))
    rows = -(-len(ordered) // columns)
    figure = Figure(figsize=(3.1 * columns + 0.3, 2.05 * rows + 1.3), layout='constrained')
    FigureCanvasAgg(figure)
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for panel in panels:
        panel.axis('off')
    for panel, (decision, image, predicted) in zip(panels, ordered, strict=False):
        item = decision.item
        # Only classes of objects are coloured: what else is predicted inside an object decides nothing.
        painted = overlay(image, np.where(np.isin(predicted, list(known.values())), predicted, 255), palette)
        panel.imshow(np.hstack([_cut(image, item), _cut(painted, item)])[:, :, ::-1])
        panel.set_title(
            f'shape {item.shape}, texture {item.texture}\ndecided: {decision.decided or "nothing"} ({decision.cue})',
            fontsize=8.5,
            color=_COLOURS[decision.cue],
        )
    used = [name for name, index in known.items() if any((predicted == index).any() for _, _, predicted in ordered)]
    figure.legend(
        handles=[Patch(color=f'#{bytes(palette[known[name]]).hex()}', label=f'predicted {name}') for name in used],
        loc='outside lower center',
        ncols=max(1, len(used)),
        frameon=False,
        fontsize=8.5,
    )
    bias, agreeing = values['shape_bias'], values['agreeing_accuracy']
    figure.suptitle(
        f'shape bias {"-" if bias is None else f"{bias:.2f}"}: {values["shape_decisions"]} by shape, '
        f'{values["texture_decisions"]} by texture, {values["other"]} other'
        + ('' if agreeing is None else f'\ncues agree: {100 * agreeing:.0f} % right'),
        fontsize=10,
    )
    figure.savefig(path, dpi=110)


def _cut(image: np.ndarray, item: CueConflictObject) -> np.ndarray:
    """A square around the object, its side :data:`_SIDE` pixels; what lies outside of the image is white."""
    left, top, right, bottom = item.box
    half = round(0.7 * max(right - left, bottom - top))
    x, y = (left + right) // 2, (top + bottom) // 2
    padded = cv2.copyMakeBorder(image, half, half, half, half, cv2.BORDER_CONSTANT, value=(255, 255, 255))
    return cv2.resize(padded[y : y + 2 * half, x : x + 2 * half], (_SIDE, _SIDE), interpolation=cv2.INTER_NEAREST)
