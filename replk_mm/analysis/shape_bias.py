"""Does a segmentation network go by shape or by texture? Objects with the shape of one class and the texture of another tell.

Geirhos, Rubisch, Michaelis, Bethge, Wichmann, Brendel, "ImageNet-trained CNNs are biased towards texture; increasing shape
bias improves accuracy and robustness", ICLR 2019, arXiv:1811.12231: of the decisions that are either the class of the shape or
that of the texture, the share that is that of the shape. There a decision is a classifier's answer. Here it is the class that
most pixels of an object are predicted as, of the classes of objects alone: background inside an object is no answer.
"""
import copy
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from mmengine.config import Config
from torch import nn

from replk_mm import checkpoints
from replk_mm.analysis.shape_bias_picture import Shown, draw
from replk_mm.data.conflict_files import ConflictObject, ConflictScene, ConflictSet, read_conflict, read_labels
from replk_mm.engine import results
from replk_mm.engine.machine import prepare_work_dir
from replk_mm.engine.predict import is_segmentor, label_map, load_trained, predict
from replk_mm.errors import UserError
from replk_mm.files import sha256

DEFINITION = ("of the objects decided for the class of their shape or that of their texture, the share decided for the shape "
              "(Geirhos et al., ICLR 2019); an object is decided for the class that most of its pixels are predicted as, of "
              "the classes of objects alone; neither of the two, a tie, or no pixel of any such class is 'other', which does "
              "not count in the share")
#: Objects in the picture at most.
_SHOWN = 12


@dataclass(frozen=True)
class Decision:
    """What an object was decided for: a class of objects, or None for a tie or no such pixel."""

    scene: ConflictScene
    item: ConflictObject
    decided: str | None

    @property
    def cue(self) -> str:
        """'shape', 'texture' or 'other': what the decision went by."""
        cues = {self.item.texture: 'texture', self.item.shape: 'shape'}  # of agreeing cues: shape
        return cues.get(self.decided or '', 'other')


@dataclass(frozen=True)
class ShapeBias:
    """The decisions of a network.

    Attributes:
        conflict: About objects whose shape and texture are of two classes.
        agreeing: About objects whose shape and texture are of one class.
        scenes: What the data set is.
    """

    conflict: Sequence[Decision]
    agreeing: Sequence[Decision]
    scenes: Mapping[str, Any]

    def values(self) -> dict[str, Any]:
        """The figures: counts, ``shape_bias`` from 0 (texture) to 1 (shape), also by the class of the shape, and the share of
        right decisions where the cues agree. A share of nothing is None."""
        right = sum(d.cue == 'shape' for d in self.agreeing)
        return dict(**_figures(self.conflict),
                    per_class={name: _figures([d for d in self.conflict if d.item.shape == name])
                               for name in sorted({d.item.shape for d in self.conflict})},
                    agreeing_accuracy=right / len(self.agreeing) if self.agreeing else None,
                    agreeing_objects=len(self.agreeing))

    def protocol(self) -> dict[str, Any]:
        """What figures must have in common to be compared."""
        return dict(scenes=dict(self.scenes), definition=DEFINITION)


def _figures(decisions: Sequence[Decision]) -> dict[str, Any]:
    count = Counter(d.cue for d in decisions)
    either = count['shape'] + count['texture']
    return dict(shape_decisions=count['shape'], texture_decisions=count['texture'], other=count['other'],
                shape_bias=count['shape'] / either if either else None)


def decide(predicted: np.ndarray, mask: np.ndarray, known: Mapping[str, int]) -> str | None:
    """The class that most pixels of an object are predicted as.

    Args:
        predicted: Class indices ``(H, W)``.
        mask: The object's pixels ``(H, W)``.
        known: Index of each class of objects in ``predicted``; other classes are no answer.

    Returns:
        Its name; None if no pixel has such a class, or several classes have as many.
    """
    counts = {name: int((predicted[mask] == index).sum()) for name, index in known.items()}
    most = max(counts.values())
    first = [name for name, count in counts.items() if count == most]
    return first[0] if most and len(first) == 1 else None


def measure(cfg: Config, checkpoint: str, data_root: Path, out: Path, device: str | None = 'cpu') -> ShapeBias:
    """Measure the shape bias of a trained segmentation network; write ``shape_bias.json`` and ``shape_bias.png``.

    Args:
        cfg: The config it was trained with, on objects that carry both cues; left as it is.
        checkpoint: Path or address.
        data_root: Folder with ``conflict.json``, see :mod:`replk_mm.data.conflict_files`.
        out: Folder for the two files.
        device: ``'cpu'``, ``'cuda'``, ``'cuda:N'``, or None for what is there. Defaults to ``'cpu'``.

    Raises:
        UserError: If the data set, the checkpoint or their classes do not fit, or nothing can be written.
    """
    out = prepare_work_dir(out, option='--out')
    found = read_conflict(Path(data_root))
    model: Any = load_trained(copy.deepcopy(cfg), checkpoint, device)
    known = _known(model, found, cfg)
    shown = _chosen(found.conflict)
    pictures: list[Shown] = []
    conflict, agreeing = [], []
    for decision, image, predicted in _decisions(model, found, found.conflict, known):
        conflict.append(decision)
        if (decision.scene, decision.item) in shown:
            pictures.append(Shown(image, predicted, decision.item, decision.decided, decision.cue))
    for decision, _, _ in _decisions(model, found, found.agreeing, known):
        agreeing.append(decision)
    bias = ShapeBias(conflict, agreeing, dict(
        **found.about, sha256=found.sha256, conflict=len(found.conflict), agreeing=len(found.agreeing)))
    draw(pictures, bias.values(), known, model.dataset_meta['palette'], out / 'shape_bias.png')
    path = checkpoints.fetch(checkpoint)
    results.write(dict(values=bias.values(), protocol=bias.protocol(), config=str(cfg.filename),
                       checkpoint=dict(path=str(path), sha256=sha256(path)),
                       decisions=[_plain(decision) for decision in (*conflict, *agreeing)],
                       environment=results.environment()), out / 'shape_bias.json')
    return bias


def _known(model: Any, found: ConflictSet, cfg: Config) -> dict[str, int]:
    """The index of each class of objects in the model's predictions, by name."""
    if not is_segmentor(model):
        raise UserError(f'{cfg.filename}: a detector; shape bias is measured on the label maps of segmentation networks\n'
                        f'Name a segmentation config and its checkpoint.')
    classes = list(model.dataset_meta['classes'])
    needed = {name for scene in (*found.conflict, *found.agreeing) for item in scene.objects
              for name in (item.shape, item.texture)}
    if absent := [name for name in found.object_classes if name in needed and name not in classes]:
        raise UserError(f'{cfg.filename}: its network has no class {", ".join(absent)}, of which there are objects\n'
                        f'It has: {", ".join(classes)}. Train it on the training scenes of the same data set.')
    return {name: classes.index(name) for name in found.object_classes if name in classes}


def _chosen(scenes: Sequence[ConflictScene]) -> set[tuple[ConflictScene, ConflictObject]]:
    """Objects for the picture: of each pair of classes the first, then of each the second, and so on."""
    turns: Counter[tuple[str, str]] = Counter()
    ordered: list[tuple[int, int, tuple[ConflictScene, ConflictObject]]] = []
    for scene in scenes:
        for item in scene.objects:
            pair = (item.shape, item.texture)
            ordered.append((turns[pair], len(ordered), (scene, item)))
            turns[pair] += 1
    return {chosen for _, _, chosen in sorted(ordered, key=lambda entry: entry[:2])[:_SHOWN]}


def _decisions(model: nn.Module, found: ConflictSet, scenes: Sequence[ConflictScene],
               known: Mapping[str, int]) -> Iterator[tuple[Decision, np.ndarray, np.ndarray]]:
    """The decision about each object, with the image (BGR) and the predicted class indices of its scene."""
    for scene, (path, image, prediction) in zip(scenes, predict(model, [str(scene.image) for scene in scenes]), strict=True):
        predicted, labels = label_map(prediction), read_labels(scene.labels)
        if predicted.shape != labels.shape:
            raise UserError(f'{scene.labels}: {labels.shape[0]}x{labels.shape[1]} pixels, and its image {path} has '
                            f'{predicted.shape[0]}x{predicted.shape[1]}\nWrite the data set anew.')
        for item in scene.objects:
            yield Decision(scene, item, decide(predicted, found.mask(scene, item, labels), known)), image, predicted


def _plain(decision: Decision) -> dict[str, Any]:
    item = decision.item
    return dict(image=decision.scene.name, box=list(item.box), shape=item.shape, texture=item.texture,
                decided=decision.decided)
