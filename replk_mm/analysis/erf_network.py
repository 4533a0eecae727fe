"""The backbone whose receptive field is measured, with its weights, and images as it takes them."""
import copy
import hashlib
import logging
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn as nn
from mmengine.config import Config, ConfigDict
from mmengine.logging import MMLogger
from mmengine.registry import MODELS, init_default_scope
from PIL import Image
from torch import Tensor

from replk_mm import checkpoints
from replk_mm.analysis.plain import randomize
from replk_mm.data.files import UNDECODABLE
from replk_mm.engine.config import build_model, fit_to_machine, load_config
from replk_mm.engine.explain import explaining
from replk_mm.errors import UserError
from replk_mm.files import sha256
from replk_mm.loading import adopt_classes, load_model

#: Files that are taken for images.
SUFFIXES = ('.jpg', '.jpeg', '.png', '.bmp', '.webp', '.tif', '.tiff')
# What the authors of RepLKNet normalise with, for configs that say nothing: ImageNet's, of values 0..255.
_MEAN, _STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)


@dataclass(frozen=True)
class Weights:
    """Where a backbone's weights are from.

    Attributes:
        checkpoint: Of the whole segmentor or detector, or of the bare backbone that the config is.
        pretrained: Of a backbone, for instance an ImageNet classifier's.
        seed: Of random weights, where neither is given.
        randomize: Draw also what starts as a constant, see :func:`replk_mm.analysis.plain.randomize`.
    """

    checkpoint: str | None = None
    pretrained: str | None = None
    seed: int = 0
    randomize: bool = False

    @property
    def trained(self) -> bool:
        """Whether they are not random."""
        return bool(self.checkpoint or self.pretrained)


@dataclass(frozen=True)
class Network:
    """A backbone in evaluation mode whose weights want no gradient.

    Attributes:
        backbone: Takes ``(1, 3, H, W)``.
        name: Its type and size, in words.
        config: Name of the config.
        weights: Where they are from, in words.
        trained: False for random ones.
        file: Path and hash of the weights' file; None for random ones.
        mean: Of the channels, values 0..255.
        std: Likewise.
        rgb: Order of the channels, else BGR.
    """

    backbone: nn.Module
    name: str
    config: str
    weights: str
    trained: bool
    file: dict[str, Any] | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    rgb: bool


def build(given: Config | str, weights: Weights, device: str) -> Network:
    """The backbone of a config.

    Args:
        given: A config, which stays as it is, or what :func:`replk_mm.engine.config.load_config` takes. Its model is a
            segmentor, a detector or a bare backbone.
        weights: Where from.
        device: ``'cpu'`` or ``'cuda'``.

    Raises:
        UserError: If it cannot be built, the weights do not fit it, or two files of weights are given.
    """
    if weights.checkpoint and weights.pretrained:
        raise UserError(f'--pretrained {weights.pretrained}: the checkpoint {weights.checkpoint} has all the weights already\n'
                        f'Name one of the two.')
    if weights.randomize and weights.trained:
        raise UserError(f'--randomize: is for random weights; {weights.checkpoint or weights.pretrained} has its own\n'
                        f'Leave one of the two out.')
    cfg = load_config(given, needs=('model',)) if isinstance(given, str) else copy.deepcopy(given)
    if weights.checkpoint:
        adopt_classes(cfg, weights.checkpoint)
    fit_to_machine(cfg, None, device, 1)
    node = cfg.model.get('backbone') or cfg.model
    _forget_files(node)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # the libraries' remarks are about training
        backbone, text = _loaded(cfg, weights) if weights.checkpoint else _started(cfg, node, weights)
    backbone.to(device).requires_grad_(False)
    backbone.eval()  # alone: mmseg's and mmdet's backbones return nothing
    file = weights.checkpoint or weights.pretrained
    path = checkpoints.fetch(file) if file else None
    mean, std, rgb = _normalization(cfg.model.get('data_preprocessor'))
    return Network(backbone, _name(node), Path(str(cfg.filename)).stem, text,
                   weights.trained, dict(path=str(path), sha256=sha256(path)) if path else None, mean, std, rgb)


def _forget_files(node: ConfigDict) -> None:
    """Drop the files that a backbone's config starts from, and those of networks in it (mmseg's BiSeNet, ICNet, STDC have
    one); what says how to draw weights stays."""
    for part in node.values():
        if isinstance(part, dict):
            _forget_files(part)
    init = node.get('init_cfg')
    init = [part for part in (init if isinstance(init, (list, tuple)) else [init])
            if part and part.get('type', 'Pretrained') != 'Pretrained']  # mmdet's PVT names a file alone
    node.pop('init_cfg', None)
    if init:
        node['init_cfg'] = init
    node.pop('pretrained', None)


def _loaded(cfg: Config, weights: Weights) -> tuple[nn.Module, str]:
    """The backbone out of a whole model with the weights of a checkpoint, and where they are from."""
    model = build_model(cfg)
    _, meta = load_model(model, str(weights.checkpoint))
    iteration = f', iteration {meta["iter"]}' if meta.get('iter') else ''
    return getattr(model, 'backbone', model), f'{weights.checkpoint}{iteration}'


def _started(cfg: Config, node: ConfigDict, weights: Weights) -> tuple[nn.Module, str]:
    """The backbone as training starts with it, and where its weights are from."""
    init_default_scope(cfg.get('default_scope', 'mmengine'))
    with explaining(cfg, 'model'), torch.random.fork_rng(), quiet():  # a line for every weight
        torch.manual_seed(weights.seed)
        backbone = MODELS.build(node)
        if hasattr(backbone, 'init_weights'):
            backbone.init_weights()
    if weights.pretrained:
        checkpoints.load_pretrained(backbone, weights.pretrained)
        return backbone, f'{weights.pretrained} (backbone)'
    if weights.randomize:
        randomize(backbone, weights.seed)
    return backbone, (f'random, {"norms and scales too" if weights.randomize else "as training starts"}, '
                      f'seed {weights.seed}')


@contextmanager
def quiet() -> Iterator[None]:
    """Keep what is no warning out of mmengine's log."""
    logger = MMLogger.get_current_instance()
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(level)


def _name(node: ConfigDict) -> str:
    """Type and size of a backbone, such as ``ConvNeXt tiny`` or ``ResNetV1c 50``."""
    size = next((node[key] for key in ('arch', 'depth') if isinstance(node.get(key), (str, int))), '')
    return f'{str(node.type).rpartition(".")[2]} {size}'.strip()


def _normalization(node: ConfigDict | None) -> tuple[tuple[float, ...], tuple[float, ...], bool]:
    """Mean, standard deviation and whether channels are RGB, as a config's preprocessor has them; ImageNet's without one."""
    if not node:
        return _MEAN, _STD, True
    mean, std = (tuple(float(v) for v in node.get(key) or (otherwise,) * 3) for key, otherwise in (('mean', 0), ('std', 1)))
    return mean, std, bool(node.get('bgr_to_rgb') or node.get('rgb_to_bgr'))  # both swap what is read as BGR


def image_files(folder: Path, count: int) -> list[Path]:
    """The first ``count`` images of a folder and the folders in it, sorted by path; all if there are fewer.

    Raises:
        UserError: If there is no such folder, or no image in it.
    """
    if not folder.is_dir():
        raise UserError(f'--images {folder}: no such folder' + (' (it is a file)' if folder.is_file() else ''))
    found = sorted(path for path in folder.rglob('*') if path.suffix.lower() in SUFFIXES and path.is_file())
    if not found:
        raise UserError(f'--images {folder}: no image in it, nor in the folders in it\n'
                        f'Images are files that end with {", ".join(SUFFIXES)}.')
    return found[:count]


def fingerprint(files: Iterable[Path]) -> str:
    """SHA-256 of images' contents in their order, whatever they are called: equal for copies in another folder."""
    digest = hashlib.sha256()
    for path in files:
        try:
            digest.update(hashlib.sha256(path.read_bytes()).digest())
        except OSError as error:
            raise UserError(f'{path}: cannot be read ({error.strerror})') from error
    return digest.hexdigest()


def read_image(path: Path, size: int, net: Network) -> Tensor:
    """An image as the network takes it, ``(1, 3, size, size)``: brought to a square by bicubic interpolation whatever its
    sides are, as the authors of RepLKNet do, and normalised.

    Raises:
        UserError: If it cannot be read.
    """
    try:
        with Image.open(path) as opened:
            square = opened.convert('RGB').resize((size, size), Image.Resampling.BICUBIC)
    except UNDECODABLE as error:
        raise UserError(f'{path}: not a readable image ({error or type(error).__name__})\n'
                        f'Mend or remove it; --images takes every image of a folder.') from error
    pixels = torch.from_numpy(np.array(square, dtype=np.float32)).permute(2, 0, 1)[None]
    pixels = pixels if net.rgb else pixels.flip(1)
    mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (net.mean, net.std))
    return (pixels - mean) / std
