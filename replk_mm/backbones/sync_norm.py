"""BatchNorm over the batches of all processes, on CPUs too, where torch has none.

"Batch Normalization: Accelerating Deep Network Training by Reducing Internal Covariate Shift", Ioffe and Szegedy, ICML
2015, arXiv:1502.03167, algorithm 1 and the gradients of section 3, with sums over all processes. Statistics of parts
are combined as in Chan, Golub and LeVeque, "Algorithms for Computing the Sample Variance", The American Statistician 37
(1983), equation 2.1.
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
    """BatchNorm whose batch, while training, is that of all processes; alone and in evaluation it is BatchNorm.

    Arguments, attributes and keys are those of :class:`torch.nn.BatchNorm2d`; the input is ``(N, C, ...)``. Every
    process must run the layer equally often; ``N`` may differ between them, and be 0.
    """

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f'expected an input of (N, C, ...), found one of {input.dim()} dimensions')

    def forward(self, input: Tensor) -> Tensor:
        """Normalize; while training update the running statistics, which are the same in every process."""
        # Shapes alone, whose memory one process counts for itself, need no others.
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
        of = torch.promote_types(input.dtype, torch.float32)
        return _Normalize.apply(input, self.weight, self.bias, mean.to(of), var.to(of), count, self.eps)


def _statistics(x: Tensor) -> tuple[Tensor, Tensor, float]:
    """Mean and biased variance of each channel over all processes, ``(C,)`` in float64, and over how many values."""
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
            f'BatchNorm needs more than one value a channel to train on, found {int(count)} in all processes'
        )
    mean = (means * counts).sum(0) / count
    return mean, ((variances + (means - mean).square()) * counts).sum(0) / count, count


class _Normalize(torch.autograd.Function):
    """``(x - mean) / sqrt(var + eps) * weight + bias``, where mean and variance depend on the inputs of all processes.

    Gradients are those of the sum of all processes' losses with respect to ``x``; those of ``weight`` and ``bias`` are
    this process's share, as of any other parameter, which distributed training adds up or averages.
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
            return torch.empty_like(x)  # torch's kernels divide by the number of images
        return F.batch_norm(x, mean, var, weight, bias, training=False, eps=eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, var = ctx.saved_tensors
        scale = torch.ones_like(mean) if weight is None else weight
        # As if the statistics were constants: gradient of x, sums of the gradient times the normalized x, and of the
        # gradient.
        grad_x, with_x, alone = (
            torch.ops.aten.native_batch_norm_backward(
                grad, x, scale, mean, var, None, None, False, ctx.eps, [True, True, True]
            )
            if x.numel()
            else (torch.empty_like(x), torch.zeros_like(scale), torch.zeros_like(scale))
        )
        if ctx.needs_input_grad[0]:
            sums = torch.cat([with_x, alone]).double()
            dist.all_reduce(sums)
            of_all_with_x, of_all = sums.chunk(2)
            # What moves through mean and variance is the same line in x for every value of a channel.
            inverse = (var.double() + ctx.eps).rsqrt()
            slope = -scale.double() * inverse.square() * of_all_with_x / ctx.count
            offset = -scale.double() * inverse * of_all / ctx.count - slope * mean.double()
            shape = (-1, *[1] * (x.dim() - 2))
            grad_x += torch.addcmul(offset.to(mean).view(shape), x, slope.to(mean).view(shape))
        of_affine = (None, None) if weight is None else (with_x, alone)
        return grad_x, *of_affine, None, None, None, None


def find_pooled_batch_norm(model: nn.Module) -> str | None:
    """Path of a module that trains BatchNorm on maps pooled to 1x1, where one image has no variance, or None."""
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
