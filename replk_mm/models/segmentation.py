"""Drop-ins for mmseg's segmentor and heads that never hold the logits at the size of the image.

``replk_mm.EncoderDecoder``, ``replk_mm.UPerHead`` and ``replk_mm.FCNHead`` take the arguments of mmseg's classes, have the
same parameters and state dicts and log the same names; losses, gradients, accuracies and predictions are the same up to
rounding. See :mod:`replk_mm.ops.upsampled` for how.
"""
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from mmengine.structures import PixelData
from mmseg.models import EncoderDecoder as MMSegEncoderDecoder
from mmseg.models.decode_heads import FCNHead as MMSegFCNHead
from mmseg.models.decode_heads import UPerHead as MMSegUPerHead
from mmseg.models.decode_heads.decode_head import BaseDecodeHead
from mmseg.models.losses import CrossEntropyLoss
from mmseg.structures import SegDataSample
from torch import Tensor, nn

from replk_mm.ops.upsampled import upsampled_argmax, upsampled_cross_entropy
from replk_mm.registry import MODELS


class UpsampledLoss(BaseDecodeHead):
    """A head whose cross-entropy is taken without its logits at the labels' size.

    For one plain ``CrossEntropyLoss`` (softmax, mean over the pixels, no class weights, no pixel sampler). Any other loss is
    computed by mmseg.
    """

    def loss_by_feat(self, seg_logits: Tensor, batch_data_samples: list[SegDataSample]) -> dict[str, Tensor]:
        """Losses of logits ``(N, K, h, w)`` under the names that mmseg gives them, and ``acc_seg`` in percent."""
        loss = self._plain_cross_entropy()
        labels = self._stack_batch_gt(batch_data_samples).squeeze(1)
        if loss is None or labels.numel() == 0:
            return super().loss_by_feat(seg_logits, batch_data_samples)
        total, correct, counted = upsampled_cross_entropy(seg_logits, labels, self.ignore_index, self.align_corners)
        # mmseg's own constants, which decide what a batch without labels gives.
        eps = torch.finfo(torch.float32).eps
        mean = total / ((counted if loss.avg_non_ignore else labels.numel()) + eps)
        return {loss.loss_name: loss.loss_weight * mean,
                'acc_seg': ((correct + eps) * 100 / (counted + eps)).float().view(1)}

    def _plain_cross_entropy(self) -> CrossEntropyLoss | None:
        losses = list(self.loss_decode) if isinstance(self.loss_decode, nn.ModuleList) else [self.loss_decode]
        plain = (len(losses) == 1 and type(losses[0]) is CrossEntropyLoss and not losses[0].use_sigmoid
                 and not losses[0].use_mask and losses[0].class_weight is None and losses[0].reduction == 'mean'
                 and self.sampler is None and self.ignore_index is not None)
        return losses[0] if plain else None


@MODELS.register_module()
class FCNHead(UpsampledLoss, MMSegFCNHead):
    """mmseg's ``FCNHead`` with the loss of :class:`UpsampledLoss`."""


@MODELS.register_module()
class UPerHead(UpsampledLoss, MMSegUPerHead):
    """mmseg's ``UPerHead`` with the loss of :class:`UpsampledLoss`, in the memory layout of the backbone's features."""

    def psp_forward(self, inputs: Sequence[Tensor]) -> Tensor:
        """The pyramid pooling module on the last of ``inputs``, ``(N, C, H, W)`` to ``(N, channels, H, W)``."""
        x = inputs[-1]
        outs = torch.cat([x, *self.psp_modules(x)], dim=1)
        # Maps of 1x1 have no layout to hand on, so that the pyramid loses it there, and every layer behind it.
        if x.is_contiguous(memory_format=torch.channels_last):
            outs = outs.contiguous(memory_format=torch.channels_last)
        return self.bottleneck(outs)


def _pixel_data(data: Tensor) -> PixelData:
    return PixelData(data=data)


class DeferredLogits(PixelData):
    """Logits at the size of the image, which are computed when ``data`` is first read.

    Test-time augmentation and code that looks at ``seg_logits`` find them; ``to_dict()``, and so a metric, sees them only if
    something has read them before. Copies and pickles are plain ``PixelData``.

    Args:
        compute: Returns the logits, ``(K, H, W)``.
    """

    def __init__(self, compute: Callable[[], Tensor]) -> None:
        super().__init__()
        object.__setattr__(self, '_compute', compute)  # PixelData's own takes maps only

    def __getattr__(self, name: str) -> Tensor:
        if name != 'data':
            raise AttributeError(f'{type(self).__name__} has no attribute {name!r}')
        self.data = self._compute()
        return self.data

    def new(self, **kwargs: Any) -> PixelData:
        """A plain copy, with ``data`` computed; arguments as for ``PixelData``."""
        return _pixel_data(self.data).new(**kwargs)

    def __reduce__(self) -> tuple:
        return _pixel_data, (self.data,)


@MODELS.register_module()
class EncoderDecoder(MMSegEncoderDecoder):
    """mmseg's ``EncoderDecoder``, which predicts from the head's small logits.

    mmseg brings the logits of all classes to the size of the network's input, then to that of the photograph, and keeps them
    beside the class map. Here the class map comes from the small logits, some rows at a time, and ``seg_logits`` are computed
    if they are read (:class:`DeferredLogits`). Sliding windows are summed up as in mmseg; what comes after is the same.

    Args:
        keep_logits: Predict as mmseg does, ``seg_logits`` included. Defaults to False. A head with one output channel or
            with a way of its own to predict has mmseg's prediction anyway.
        *args: As for mmseg's class.
        **kwargs: As for mmseg's class.
    """

    def __init__(self, *args: Any, keep_logits: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.keep_logits = keep_logits

    def predict(self, inputs: Tensor, data_samples: list[SegDataSample] | None = None) -> list[SegDataSample]:
        """Class maps of images ``(N, C, H, W)``, as ``pred_sem_seg`` of each sample at its ``ori_shape``."""
        head = type(self.decode_head)
        if (self.keep_logits or self.out_channels == 1 or head.predict is not BaseDecodeHead.predict
                or head.predict_by_feat is not BaseDecodeHead.predict_by_feat):
            return super().predict(inputs, data_samples)
        shape = inputs.shape[2:]
        metas = [sample.metainfo for sample in data_samples or []]
        metas = metas or [dict(ori_shape=shape, img_shape=shape, pad_shape=shape)] * len(inputs)
        if self.test_cfg.mode == 'whole':
            logits = self.decode_head(self.extract_feat(inputs))
            resized = partial(self.decode_head.predict_by_feat, batch_img_metas=metas)
        else:
            logits = self.inference(inputs, metas)
            resized = nn.Identity()
        size = resized(logits[:1, :1].to('meta')).shape[2:]  # a tensor without data: the head says to which size it brings it
        samples = data_samples or [SegDataSample() for _ in metas]
        for small, sample in zip(logits, samples, strict=True):
            meta = sample.metainfo if data_samples else None
            sample.set_data(dict(
                seg_logits=DeferredLogits(partial(self._large_logits, small, resized, meta)),
                pred_sem_seg=PixelData(data=self._class_map(small, size, meta).unsqueeze(0))))
        return samples

    def _class_map(self, small: Tensor, size: Sequence[int], meta: dict | None) -> Tensor:
        if meta is None:
            return upsampled_argmax(small, size, align_corners=self.align_corners)
        return upsampled_argmax(small, size, meta.get('img_padding_size', meta.get('padding_size', (0, 0, 0, 0))),
                                meta['flip_direction'] if meta.get('flip') else None, meta['ori_shape'], self.align_corners)

    def _large_logits(self, small: Tensor, resized: Callable[[Tensor], Tensor], meta: dict | None) -> Tensor:
        samples = None if meta is None else [SegDataSample(metainfo=meta)]
        return self.postprocess_result(resized(small.unsqueeze(0)), samples)[0].seg_logits.data
