"""Effective receptive field: how much each pixel of an image contributes to the centre of a feature map.

Luo et al., "Understanding the Effective Receptive Field in Deep Convolutional Neural Networks", 2016, take the gradient of the
centre with respect to the image. This is that gradient as Ding et al. measure it, "Scaling Up Your Kernels to 31x31"
(arXiv 2203.06717, effective receptive fields; the folder erf/ of their repository):

- the centre is position ``[H // 2, W // 2]`` of the map, ReLU applied, summed over the channels;
- negative parts of its gradient are dropped; the rest is summed over the image's channels and averaged over images: the
  *contribution scores*, one for each pixel;
- the paper's *scale* is log10(score + 1) over its largest value; heat maps show it, and the published areas count in it;
- the *area* for a share t is that of the smallest square around pixel ``[size // 2, size // 2]`` which holds t of the sum.

log10(score + 1) is the score itself, but for a factor, where gradients are small, and flat where they are large: multiplying
all gradients by ten changes the areas. So they are given of the scores themselves too, where it does not.
"""
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
from mmengine.config import Config
from torch import Tensor

from replk_mm.analysis.erf_network import Network, Weights, build, fingerprint, image_files, quiet, read_image
from replk_mm.analysis.erf_plot import draw
from replk_mm.analysis.erf_result import Erf
from replk_mm.engine import results
from replk_mm.engine.machine import prepare_work_dir, select_device
from replk_mm.errors import UserError

#: Seconds between two lines of progress.
_PAUSE = 5


def contributions(backbone: nn.Module, image: Tensor, stage: int | None = None) -> tuple[Tensor, int, torch.Size]:
    """Contribution scores of one image.

    Args:
        backbone: In evaluation mode.
        image: ``(1, C, H, W)``.
        stage: Index among the backbone's outputs; None for the last.

    Returns:
        Scores ``(H, W)`` in float64; the index of the output; the shape ``(1, C', H', W')`` of the feature map.

    Raises:
        UserError: If there is no such output, or it is no feature map.
    """
    leaf = image.detach().clone().requires_grad_()
    found = backbone(leaf)
    outputs = list(found.values()) if isinstance(found, dict) else list(found) if isinstance(found, (list, tuple)) else [found]
    index = len(outputs) - 1 if stage is None else stage
    if not 0 <= index < len(outputs):
        raise UserError(f'--stage {stage}: {type(backbone).__name__} has {len(outputs)} outputs\n'
                        f'Name one of 0..{len(outputs) - 1}; out_indices of the backbone chooses which there are.')
    feature = outputs[index]
    if not isinstance(feature, Tensor) or feature.dim() != 4:
        what = f'of shape {tuple(feature.shape)}' if isinstance(feature, Tensor) else f'a {type(feature).__name__}'
        raise UserError(f'{type(backbone).__name__}: output {index} is {what}, no feature map (N, C, H, W)\n'
                        f'Name another output with --stage.')
    height, width = feature.shape[2:]
    # Not autograd.grad, which refuses networks that recompute their activations.
    feature[:, :, height // 2, width // 2].relu().sum().backward()
    assert leaf.grad is not None
    return leaf.grad.double().relu().sum((0, 1)), index, feature.shape


def measure_erf(cfg: Config | str, checkpoint: str | None, images: Path, size: int, count: int, out: Path,
                stage: int | None = None, device: str | None = 'cpu', progress: Callable[[str], None] = lambda line: None, *,
                pretrained: str | None = None, seed: int = 0, randomize: bool = False) -> Erf:
    """Measure the effective receptive field of a config's backbone; write it with its heat map to a folder.

    Args:
        cfg: Config, which stays as it is, or its name. Its model is a segmentor, a detector or a bare backbone.
        checkpoint: Of that model; None for ``pretrained`` or random weights.
        images: Folder of images, which are taken in the order of their paths.
        size: Side to which images are brought, in pixels.
        count: Images at most.
        out: Folder for ``erf.json``, ``erf.npz`` and ``erf.png``.
        stage: Index of the feature map among the backbone's outputs; None for the last.
        device: See :func:`replk_mm.engine.machine.select_device`.
        progress: Called with a line every few seconds.
        pretrained: File of a backbone's weights.
        seed: Of random weights.
        randomize: Draw norms and layer scales too, see :class:`replk_mm.analysis.erf_network.Weights`.

    Raises:
        UserError: If something of the above cannot be used, or a gradient is not finite.
    """
    where = select_device(device)
    files = image_files(Path(images), count)
    folder = prepare_work_dir(out, option='--out')
    net = build(cfg, Weights(checkpoint, pretrained, seed, randomize), where)
    with quiet():  # how each convolution is computed
        total, silent, index, shape = _accumulate(net, files, size, stage, where, progress)
    found = Erf(scores=total / len(files), backbone=net.name, config=net.config, weights=net.weights, trained=net.trained,
                checkpoint=net.file, stage=index, channels=shape[1], map_size=(shape[2], shape[3]), size=size,
                images=len(files), image_set=fingerprint(files), silent=silent,
                preprocessing=dict(mean=list(net.mean), std=list(net.std), channels='RGB' if net.rgb else 'BGR'),
                environment=results.environment())
    found.save(folder)
    draw([found], folder / 'erf.png')
    return found


def _accumulate(net: Network, files: Sequence[Path], size: int, stage: int | None, device: str,
                progress: Callable[[str], None]) -> tuple[np.ndarray, int, int, torch.Size]:
    """Summed scores, how many images gave none, the index of the stage and the shape of its map."""
    total, silent, index, shape = torch.zeros(size, size, dtype=torch.float64), 0, 0, torch.Size()
    started = said = time.monotonic()
    for i, path in enumerate(files, 1):
        image = read_image(path, size, net).to(device)
        try:
            scores, index, shape = contributions(net.backbone, image, stage)
        except (RuntimeError, ValueError, TypeError, IndexError, AssertionError, ZeroDivisionError) as error:
            text = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UserError(f'{net.config}: {net.name} fails on an image of {size}x{size}: {text}\n'
                            f'Try another --size; REPLK_MM_TRACEBACK=1 shows where it fails.') from error
        if not scores.isfinite().all():
            raise UserError(f'{path}: the gradient of {net.name} is not finite with this image\n'
                            f'Weights: {net.weights}. Remove the image, or use other weights.')
        total += scores.cpu()
        silent += not scores.any().item()
        now = time.monotonic()
        if i in (1, len(files)) or now - said > _PAUSE:
            said = now
            progress(f'image {i} of {len(files)}, {(now - started) / i * (len(files) - i):.0f} s left')
    return total.numpy(), silent, index, shape
