"""Shape bias of an ImageNet classifier, on the published images with a cue conflict.

Images: "stimuli/style-transfer-preprocessed-512" of github.com/rgeirhos/texture-vs-shape (Geirhos et al., ICLR 2019,
arXiv:1811.12231), one folder for each class of shapes. ``cat/cat1-dog2.png`` has the shape of a cat and the texture of
a dog. A decision is the one of 16 classes whose ImageNet-1K classes have the highest mean probability. The authors
recommend it there and implement it in github.com/bethgelab/model-vs-human, which also has the ImageNet-1K classes of
each of the 16, :data:`MEMBERS`.
"""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from mmengine.config import Config
from PIL import Image
from torch import Tensor

from replk_mm.analysis.erf import hash_images
from replk_mm.analysis.shape_bias import COLORS, Decision, ShapeBias, summary, write_decisions
from replk_mm.backbones.adapters import require
from replk_mm.backbones.catalogue import find_backbone
from replk_mm.checkpoints.io import read_checkpoint
from replk_mm.checkpoints.key_formats import efficientnet_to_timm
from replk_mm.engine.process import select_device
from replk_mm.errors import UserError, explain_errors
from replk_mm.visualize import write_figure

#: Logits ``(N, 1000)`` of ImageNet-1K, of ``N`` image files.
Classifier = Callable[[Sequence[Path]], Tensor]

# Ranges of indices include both ends.
_RANGES = {
    'airplane': '404',
    'bear': '294-297',
    'bicycle': '444 671',
    'bird': '8 10-16 18-20 22-24 80-83 87-96 98-100 127-133 135-145',
    'boat': '472 554 625 814 914',
    'bottle': '440 720 737 898-899 901 907',
    'car': '436 511 817',
    'cat': '281-286',
    'chair': '423 559 765 857',
    'clock': '409 530 892',
    'dog': '152-191 193-203 205-226 228-241 243-250 252-257 259 261-263 265-268',
    'elephant': '385-386',
    'keyboard': '508 878',
    'knife': '499',
    'oven': '766',
    'truck': '555 569 656 675 717 734 864 867',
}
#: The ImageNet-1K classes of each of the 16 classes: indices in the order of WordNet ids, from 0.
MEMBERS: dict[str, list[int]] = {
    name: [
        index
        for part in text.split()
        for first, _, last in [part.partition('-')]
        for index in range(int(first), int(last or first) + 1)
    ]
    for name, text in _RANGES.items()
}
DEFINITION = (
    'of the images decided for the class of their shape or that of their texture, the share decided for the shape '
    '(Geirhos et al., ICLR 2019); the decision is the class of 16 with the highest mean probability of its ImageNet-1K '
    'classes'
)
_NAME = re.compile(r'(?:.*_)?([a-z]+)\d+-([a-z]+)\d+\.png')


def list_images(root: Path) -> list[tuple[Path, str, str]]:
    """Path, class of the shape and class of the texture of the images ``root/SHAPE/SHAPE1-TEXTURE1.png``.

    Raises:
        UserError: If there are none, or a name does not have this form.
    """
    found = []
    for path in sorted(root.glob('*/*.png')):
        name = _NAME.fullmatch(path.name)
        if not name or name[1] != path.parent.name or not {name[1], name[2]} <= MEMBERS.keys():
            raise UserError(
                f'{path}: not named as an image with a cue conflict, such as cat/cat1-dog2.png\n'
                f'The classes are: {", ".join(MEMBERS)}.'
            )
        found.append((path, name[1], name[2]))
    if not found:
        raise UserError(
            f'{root}: contains neither conflict.json nor images such as cat/cat1-dog2.png\nFor generated scenes, write '
            f'them with make_demo_data --scenes conflict; the images are those of github.com/rgeirhos/texture-vs-shape.'
        )
    return found


def decide(logits: Tensor) -> list[str]:
    """The class of 16 with the highest mean probability, for logits ``(N, 1000)``.

    Raises:
        UserError: If there are not 1000 logits.
    """
    if logits.shape[1:] != (1000,):
        raise UserError(
            f'the classifier has outputs of shape {tuple(logits.shape[1:])}, not 1000\n'
            f'Use a classifier with the classes of ImageNet-1K.'
        )
    probabilities = logits.double().softmax(1)
    means = torch.stack([probabilities[:, members].mean(1) for members in MEMBERS.values()], 1)
    return [list(MEMBERS)[k] for k in means.argmax(1).tolist()]


def measure_classifier(classifier: Classifier, root: Path, out: Path, batch: int = 32, **network: Any) -> ShapeBias:
    """Measure the shape bias of a classifier; write ``shape_bias.json`` and ``shape_bias.png``.

    Args:
        classifier: Of ImageNet-1K, such as from :func:`load_timm`.
        root: Folder with images, see :func:`list_images`.
        out: Folder for the two files.
        batch: Images at once. Defaults to 32.
        **network: Entries of the record that identify the classifier.

    Raises:
        UserError: If the images or the classifier do not fit, or nothing can be written.
    """
    images, decisions = list_images(root), []
    for start in range(0, len(images), batch):
        part = images[start : start + batch]
        decided = decide(classifier([path for path, _, _ in part]))
        for (path, shape, texture), name in zip(part, decided, strict=True):
            decisions.append(Decision(f'{shape}/{path.name}', shape, texture, name))
    conflict = [d for d in decisions if d.shape != d.texture]
    data = dict(images=len(images), sha256=hash_images([path for path, _, _ in images]))
    bias = ShapeBias(conflict, [d for d in decisions if d.shape == d.texture], dict(images=data, definition=DEFINITION))
    _draw(bias.values(), out / 'shape_bias.png')
    write_decisions(bias, out, **network)
    return bias


def load_timm(name: str, checkpoint: str | None = None, device: str | None = 'cpu') -> Classifier:
    """A classifier of timm, with the images resized, cropped and normalized as for its ImageNet accuracy.

    Args:
        name: Of the catalogue, such as ``'timm/resnet50.a1_in1k'`` or ``'efficientnet-lite0'``.
        checkpoint: Weights of the whole classifier. Defaults to those of the catalogue.
        device: See :func:`replk_mm.engine.process.select_device`.

    Raises:
        UserError: If timm is not installed, has no such network, or the weights do not fit.
    """
    entry, weights = find_backbone(name)
    if 'model_name' not in entry.config or entry.config['type'] != 'replk_mm.TimmBackbone':
        raise UserError(f'{name}: not a classifier of timm\nUse timm/NAME, or a config of mmpretrain and a checkpoint.')
    timm, weights = require('timm', name), weights or next(iter(entry.weights), None)
    where = checkpoint or (weights and weights.url)
    with explain_errors(f'{where or name}: no weights of the whole classifier', 'Give a checkpoint of it.'):
        model = timm.create_model(entry.config['model_name'], pretrained=not where)
        if where:
            model.load_state_dict(efficientnet_to_timm(read_checkpoint(where)))
    data = timm.data.resolve_data_config({}, model=model)
    mean, std = ([x / 255 for x in figures] for figures in (entry.mean, entry.std))
    transform = timm.data.create_transform(**{**data, 'mean': mean, 'std': std})
    device = select_device(device)
    model = model.eval().to(device)

    @torch.no_grad()
    def classify(paths: Sequence[Path]) -> Tensor:
        images = torch.stack([transform(Image.open(path).convert('RGB')) for path in paths])
        return model(images.to(device)).cpu()

    return classify


def load_mmpretrain(cfg: Config, checkpoint: str, device: str | None = 'cpu') -> Classifier:
    """A classifier of mmpretrain, with the test pipeline of its config.

    Raises:
        UserError: If mmpretrain is not installed.
    """
    require('mmpretrain', str(cfg.filename))
    from mmpretrain.apis import ImageClassificationInferencer

    infer = ImageClassificationInferencer(cfg, pretrained=checkpoint, device=select_device(device))

    def classify(paths: Sequence[Path]) -> Tensor:
        found = infer([str(path) for path in paths], batch_size=len(paths))
        return torch.tensor([result['pred_scores'].tolist() for result in found]).log()  # logits but for a constant

    return classify


def _draw(values: dict[str, Any], path: Path) -> None:
    """Shares of decisions by shape, by texture and of others, for each class of shapes."""
    names = list(values['per_class'])[::-1]
    figure = Figure(figsize=(7, 0.3 * len(names) + 1.6), layout='constrained')
    axis, left = figure.subplots(), [0.0] * len(names)
    for cue, key in (('shape', 'shape_decisions'), ('texture', 'texture_decisions'), ('other', 'other')):
        rows = [values['per_class'][name] for name in names]
        width = [row[key] / (row['shape_decisions'] + row['texture_decisions'] + row['other']) for row in rows]
        axis.barh(names, width, left=left, color=COLORS[cue], label=cue)
        left = [a + b for a, b in zip(left, width, strict=True)]
    axis.set(xlim=(0, 1), xlabel='share of the images with this shape')
    figure.legend(loc='outside lower center', ncols=3, frameon=False, fontsize=8.5)
    figure.suptitle(summary(values), fontsize=10)
    write_figure(path, figure)
