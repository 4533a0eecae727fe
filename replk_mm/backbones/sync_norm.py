"""Synchronized BatchNorm for every device; torch's own runs on GPUs only.

"Batch Normalization: Accelerating Deep Network Training by Reducing Internal Covariate Shift", Ioffe and Szegedy, ICML
2015, arXiv:1502.03167, algorithm 1 and the gradients of section 3, with sums over all processes. Statistics
of the processes are combined as in Chan, Golub and LeVeque, "Algorithms for Computing the Sample Variance", The
American Statistician 37 (1983), equation 2.1.
"""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from mmengine.dist import get_world_size
from mmengine.utils.dl_utils.parrots_wrapper import _BatchNorm
from torch import Tensor
from torch.autograd.function import once_differentiable

from replk_mm.registry import MODELS


@MODELS.register_module(name='SyncBN')
class SyncBatchNorm(_BatchNorm):
    """BatchNorm that trains on the joint batch of all processes. With one process and in evaluation it is BatchNorm.

    Arguments, attributes and keys are those of :class:`torch.nn.BatchNorm2d`. The input is ``(N, C, ...)``; ``N`` may
    differ between processes and may be 0. Every process must call the layer equally often.
    """

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f'SyncBatchNorm: the input must be (N, C, ...); found {input.dim()} dimensions')

    def forward(self, input: Tensor) -> Tensor:
        """Normalize the input; in training mode, update the running statistics, which are equal in all processes."""
        # Meta tensors have shapes only: a single process can run them.
        if not self.training or get_world_size() == 1 or input.is_meta:
            return super().forward(input)
        self._check_input_dim(input)
        with torch.no_grad():
            mean, var, count = _statistics(input)
            if self.track_running_stats and self.running_mean is not None and self.running_var is not None:
                self.num_batches_tracked.add_(1)
                share = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
                unbiased = var * (count / (count - 1))
                self.running_mean.lerp_(mean.to(self.running_mean), share)
                self.running_var.lerp_(unbiased.to(self.running_var), share)
        dtype = torch.promote_types(input.dtype, torch.float32)
        return _Normalize.apply(input, self.weight, self.bias, mean.to(dtype), var.to(dtype), count, self.eps)


def _statistics(x: Tensor) -> tuple[Tensor, Tensor, float]:
    """Return mean and biased variance of each channel, ``(C,)`` in float64, and their number of values."""
    own = torch.zeros(2 * x.shape[1] + 1, dtype=torch.float64, device=x.device)
    if x.numel():
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        var, mean = torch.var_mean(wide, [0, *range(2, x.dim())], correction=0)
        own = torch.cat([mean.double(), var.double(), own.new_tensor([x.numel() // x.shape[1]])])
    parts = [torch.empty_like(own) for _ in range(get_world_size())]
    dist.all_gather(parts, own)
    table = torch.stack(parts)
    means, variances, counts = table[:, : x.shape[1]], table[:, x.shape[1] : -1], table[:, -1:]
    count = float(counts.sum())
    if count <= 1:
        raise ValueError(
            f'SyncBatchNorm: training needs more than one value per channel; found {int(count)} in all processes'
        )
    mean = (means * counts).sum(0) / count
    return mean, ((variances + (means - mean).square()) * counts).sum(0) / count, count


class _Normalize(torch.autograd.Function):
    """``(x - mean) / sqrt(var + eps) * weight + bias``, with mean and variance over the inputs of all processes.

    The gradient of ``x`` is that of the sum of all losses. The gradients of ``weight`` and ``bias`` are the share of
    this process; distributed training reduces them like those of any other parameter.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor,
        var: Tensor,
        count: float,
        eps: float,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, mean, var)
        ctx.count, ctx.eps = count, eps
        if not x.numel():
            return torch.empty_like(x)  # torch's kernels divide by the batch size
        return F.batch_norm(x, mean, var, weight, bias, training=False, eps=eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, var = ctx.saved_tensors
        scale = torch.ones_like(mean) if weight is None else weight
        # For constant statistics: the gradient of x, sum(grad * normalized x) and sum(grad).
        grad_x, sum_product, sum_grad = (
            torch.ops.aten.native_batch_norm_backward(
                grad, x, scale, mean, var, None, None, False, ctx.eps, [True, True, True]
            )
            if x.numel()
            else (torch.empty_like(x), torch.zeros_like(scale), torch.zeros_like(scale))
        )
        if ctx.needs_input_grad[0]:
            sums = torch.cat([sum_product, sum_grad]).double()
            dist.all_reduce(sums)
            total_product, total_grad = sums.chunk(2)
            # The gradient through mean and variance is linear in x, with the same line for all values of a channel.
            inverse = (var.double() + ctx.eps).rsqrt()
            slope = -scale.double() * inverse.square() * total_product / ctx.count
            offset = -scale.double() * inverse * total_grad / ctx.count - slope * mean.double()
            shape = (-1, *[1] * (x.dim() - 2))
            grad_x += torch.addcmul(offset.to(mean).view(shape), x, slope.to(mean).view(shape))
        affine = (None, None) if weight is None else (sum_product, sum_grad)
        return grad_x, *affine, None, None, None, None


def find_pooled_batch_norm(model: nn.Module) -> str | None:
    """Return the path of the first module with BatchNorm after pooling to 1x1, which cannot train on one image."""
    for name, module in model.named_modules():
        children = list(module.children())
        if (
            isinstance(module, nn.Sequential)
            and children
            and isinstance(children[0], nn.AdaptiveAvgPool2d)
            and children[0].output_size in (1, (1, 1))
            and any(
                isinstance(m, _BatchNorm) and not isinstance(m, (nn.SyncBatchNorm, SyncBatchNorm))
                for m in module.modules()
            )
        ):
            return name
    return None
