"""A linear classifier on frozen features: BatchNorm and a 1x1 convolution, as in self-supervised learning.

It classifies the cells of a feature map. Training enlarges neither features nor logits to the size of the image: the
loss compares the logits of a cell with the labels of all pixels in it.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from mmseg.models.decode_heads.decode_head import BaseDecodeHead
from mmseg.structures import SegDataSample
from torch import Tensor, nn

from replk_mm.registry import MODELS


def count_labels(labels: Tensor, size: Sequence[int], num_classes: int, ignore_index: int = 255) -> Tensor:
    """Count the pixels of each class in each cell of a map; returns ``(h * w, num_classes)``, int32.

    A pixel belongs to the cell that ``F.interpolate(mode='nearest-exact')`` reads for it.

    Args:
        labels: Label map ``(H, W)``.
        size: Height ``h`` and width ``w`` of the map.
        num_classes: Number of classes.
        ignore_index: Label that is not counted, as are those beyond the classes. Defaults to 255.
    """
    rows, columns = (
        (2 * torch.arange(n, device=labels.device) + 1) * cells // (2 * n)
        for n, cells in zip(labels.shape, size, strict=True)
    )
    index = (rows[:, None] * size[1] + columns) * num_classes + labels
    counted = index[(labels >= 0) & (labels < num_classes) & (labels != ignore_index)]
    return torch.bincount(counted, minlength=size[0] * size[1] * num_classes).view(-1, num_classes).int()


def cell_cross_entropy(logits: Tensor, counts: Tensor) -> Tensor:
    """Mean cross-entropy of the counted pixels, each with the logits of its cell.

    Args:
        logits: ``(..., classes, cells)``.
        counts: Pixels of each class in each cell, ``(classes, cells)``.

    Returns:
        The loss, of shape ``(...)``.
    """
    return -(counts * logits.log_softmax(-2)).sum((-2, -1)) / counts.sum().clamp(min=1)


@MODELS.register_module()
class LinearHead(BaseDecodeHead):
    """BatchNorm without affine parameters, and a 1x1 convolution, on the concatenated feature maps.

    Several maps are resized to the second to last one, which has stride 16 in most backbones: smaller maps by bilinear
    interpolation, larger ones by average pooling. Segmentors predict logits first, and then resize them.

    Args:
        in_channels: Channels of each map.
        num_classes: Number of classes.
        in_index: Indices of the maps.
        ignore_index: Label that is not trained. Defaults to 255.
        init_cfg: As in mmseg's heads.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        num_classes: int,
        in_index: Sequence[int],
        ignore_index: int = 255,
        init_cfg: dict | None = dict(type='Normal', std=0.01, override=dict(name='conv_seg')),  # noqa: B006
    ) -> None:
        super().__init__(
            list(in_channels),
            sum(in_channels),
            num_classes=num_classes,
            in_index=list(in_index),
            input_transform='multiple_select',
            dropout_ratio=0,
            ignore_index=ignore_index,
            loss_decode=dict(type='CrossEntropyLoss', avg_non_ignore=True),
            init_cfg=init_cfg,
        )
        # Frozen features do not drift: the mean over all steps estimates their statistics best.
        self.bn = nn.BatchNorm2d(self.channels, affine=False, momentum=None)

    def gather(self, inputs: Sequence[Tensor]) -> Tensor:
        """Resize and concatenate the feature maps of a backbone to ``(N, channels, h, w)``."""
        maps = self._transform_inputs(inputs)
        size = maps[-2:][0].shape[2:]
        return torch.cat([_resize(x, size) for x in maps], 1)

    def forward(self, inputs: Sequence[Tensor]) -> Tensor:
        """Return the logits ``(N, K, h, w)`` of the feature maps of a backbone."""
        return self.conv_seg(self.bn(self.gather(inputs)))

    def loss_by_feat(self, seg_logits: Tensor, batch_data_samples: list[SegDataSample]) -> dict[str, Tensor]:
        """Compute the loss of logits ``(N, K, h, w)``, see :func:`cell_cross_entropy`."""
        labels = self._stack_batch_gt(batch_data_samples).squeeze(1)
        counts = [count_labels(x, seg_logits.shape[2:], self.num_classes, self.ignore_index) for x in labels]
        return dict(loss_ce=cell_cross_entropy(seg_logits.flatten(2).transpose(0, 1).flatten(1), torch.cat(counts).t()))


def _resize(x: Tensor, size: torch.Size) -> Tensor:
    if x.shape[2:] == size:
        return x
    return (
        F.interpolate(x, size, mode='bilinear')
        if x.shape[2] < size[0]
        else F.adaptive_avg_pool2d(x, (size[0], size[1]))
    )
