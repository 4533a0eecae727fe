"""Energy of learned depthwise kernels by distance from their center, and networks whose kernels are cropped."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import torch.nn as nn
from mmengine.config import Config
from torch import Tensor

from replk_mm.analysis.receptive_field import ring_profile
from replk_mm.checkpoints.io import save_checkpoint
from replk_mm.engine.inference import build_for_inference
from replk_mm.engine.record import write_record
from replk_mm.errors import UserError
from replk_mm.files import GENERATOR

#: Least side of the kernels.
_LEAST_SIDE = 5


def large_kernels(network: nn.Module) -> dict[str, nn.Conv2d]:
    """Depthwise convolutions whose kernels have a side of at least 5 pixels, by module path."""
    convolutions = {name: module for name, module in network.named_modules() if isinstance(module, nn.Conv2d)}
    return {
        name: conv
        for name, conv in convolutions.items()
        if conv.groups == conv.in_channels == conv.out_channels and max(conv.kernel_size) >= _LEAST_SIDE
    }


def central_energy(weight: Tensor) -> np.ndarray:
    """Share of the squared weights ``(C, 1, kH, kW)`` within the central squares of side 1, 3, 5 and so on."""
    energy = weight.detach().double().square().sum((0, 1)).cpu().numpy()
    cumulative = np.cumsum(ring_profile(energy))[: max(energy.shape) // 2 + 1]
    return cumulative / max(cumulative[-1], np.finfo(float).tiny)


def crop_kernels(network: nn.Module, side: int) -> None:
    """Set the weights of large depthwise kernels outside their central square of ``side`` (odd) pixels to zero."""
    for conv in large_kernels(network).values():
        rows, columns = (slice(max(0, (k - side) // 2), k - max(0, (k - side) // 2)) for k in conv.kernel_size)
        center = conv.weight.data[..., rows, columns].clone()
        conv.weight.data.zero_()[..., rows, columns] = center


def measure_kernels(cfg: Config, checkpoint: str, out: Path, crop: int | None = None) -> list[dict[str, Any]]:
    """Write the energy of a trained network's merged kernels to ``kernels.json``.

    Args:
        cfg: The config it was trained with; left unchanged.
        checkpoint: Path or URL.
        out: Folder for the results.
        crop: Also write the merged network with kernels cropped to this side, as ``cropped.pth``.

    Returns:
        Of each layer ``layer``, ``kernel_size``, ``channels`` and ``energy``, see :func:`central_energy`.

    Raises:
        UserError: If the network has no large kernels, or ``crop`` is even.
    """
    if crop is not None and crop % 2 == 0:
        raise UserError(f'--crop {crop}: the center of a kernel has an odd side\nUse {crop - 1} or {crop + 1}.')
    built = build_for_inference(copy.deepcopy(cfg), checkpoint, reparam=True, packed=False)
    layers: list[dict[str, Any]] = [
        dict(layer=name, kernel_size=list(conv.kernel_size), channels=conv.in_channels, energy=energy.tolist())
        for name, conv in large_kernels(built.model).items()
        for energy in [central_energy(conv.weight)]
    ]
    if not layers:
        raise UserError(f'{cfg.filename}: no depthwise kernel of at least {_LEAST_SIDE} pixels\nUse another network.')
    write_record(dict(kind='kernel energy', checkpoint=checkpoint, layers=layers), out / 'kernels.json')
    if crop:
        crop_kernels(built.model, crop)
        form = dict(merge=True, fold=True, source=checkpoint, cropped_kernels=crop)
        plain = {key: value for key, value in built.meta.items() if isinstance(value, (str, int, float, list, dict))}
        meta = {**GENERATOR, **plain, 'replk_mm': dict(reparameterized=form)}
        save_checkpoint(dict(meta=meta, state_dict=built.model.state_dict()), out / 'cropped.pth')
    return layers
