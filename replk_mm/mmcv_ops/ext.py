"""The functions of ``mmcv._ext``, with its names and arguments, in torch.

``mmcv.ops`` allocates the outputs and defines the gradients; these functions fill the outputs. A name that is not
defined here raises an error when it is called.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from replk_mm.errors import UserError
from replk_mm.mmcv_ops.nms import nms, softnms
from replk_mm.mmcv_ops.roi_align import roi_align_backward, roi_align_forward

__all__ = ['nms', 'roi_align_backward', 'roi_align_forward', 'softnms']


def __getattr__(name: str) -> Callable:
    if name.startswith('__'):
        raise AttributeError(name)

    def missing(*args, **kwargs) -> None:
        raise UserError(
            f'mmcv operator {name}: not available without the compiled operators of mmcv\n'
            'Compile them: make setup MMCV=compiled. Without the repository, install mmcv in place of mmcv-lite.'
        )

    return missing


def get_compiler_version() -> str:
    """The compiler and the CUDA version that ``mmcv.utils.collect_env`` reports."""
    return 'none (replk_mm.mmcv_ops)'


get_compiling_cuda_version = get_compiler_version


def sigmoid_focal_loss_forward(
    input: Tensor, target: Tensor, weight: Tensor, output: Tensor, gamma: float, alpha: float
) -> None:
    """Focal loss of independent classes, "Focal Loss for Dense Object Detection" (arXiv:1708.02002), equation 5.

    Args:
        input: Logits, shape (N, C).
        target: Class of each sample, shape (N,); C for background.
        weight: Weight of each class, shape (C,), or empty.
        output: Receives the losses, shape (N, C).
        gamma: Focusing parameter.
        alpha: Weight of the positive class; the negative ones have ``1 - alpha``.
    """
    sign, factor = _signs(input, target, weight, alpha)
    logit = sign * input  # of the right answer
    output.copy_(-factor * torch.sigmoid(-logit).pow(gamma) * F.logsigmoid(logit))


def sigmoid_focal_loss_backward(
    input: Tensor, target: Tensor, weight: Tensor, grad_input: Tensor, gamma: float, alpha: float
) -> None:
    """Gradient of the sum of :func:`sigmoid_focal_loss_forward`, written to ``grad_input``, shape (N, C)."""
    sign, factor = _signs(input, target, weight, alpha)
    logit = sign * input
    right, wrong = torch.sigmoid(logit), torch.sigmoid(-logit)
    grad_input.copy_(sign * factor * wrong.pow(gamma) * (gamma * right * F.logsigmoid(logit) - wrong))


def _signs(input: Tensor, target: Tensor, weight: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """1 for the target's class and -1 for others, and the weight of each loss."""
    positive = target[:, None] == torch.arange(input.size(1), device=input.device)
    sign = torch.where(positive, 1.0, -1.0).to(input.dtype)
    factor = torch.where(positive, alpha, 1 - alpha).to(input.dtype)
    return sign, factor * weight[target][:, None] if weight.numel() else factor


def ms_deform_attn_forward(
    value: Tensor, spatial_shapes: Tensor, level_start_index: Tensor, locations: Tensor, weights: Tensor, **_
) -> Tensor:
    """Multi-scale deformable attention (arXiv:2010.04159) on GPUs, by the torch code that mmcv uses on CPUs.

    :class:`mmcv.ops.multi_scale_deform_attn.MultiScaleDeformableAttnFunction` documents shapes.
    """
    from mmcv.ops.multi_scale_deform_attn import multi_scale_deformable_attn_pytorch

    return multi_scale_deformable_attn_pytorch(value, spatial_shapes, locations, weights)


def ms_deform_attn_backward(
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor,
    locations: Tensor,
    weights: Tensor,
    grad_output: Tensor,
    *gradients: Tensor,
    **_,
) -> None:
    """Write the gradients with respect to ``value``, ``locations`` and ``weights`` to ``gradients``."""
    value, locations, weights = (x.detach().requires_grad_() for x in (value, locations, weights))
    with torch.enable_grad():
        output = ms_deform_attn_forward(value, spatial_shapes, level_start_index, locations, weights)
    found = torch.autograd.grad(output, (value, locations, weights), grad_output)
    for target, gradient in zip(gradients, found, strict=True):
        target.copy_(gradient)
