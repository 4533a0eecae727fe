"""Drop-ins for mmseg's segmentor and heads that never hold the logits at the size of the image.

``replk_mm.EncoderDecoder``, ``replk_mm.UPerHead`` and ``replk_mm.FCNHead`` take the arguments of mmseg's classes, have the
same parameters and state dicts and log the same names; losses, gradients, accuracies and predictions are the same up to
rounding. See :mod:`replk_mm.ops.upsampled` for how.
"""
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from mmcv.cnn import ConvModule
from mmengine.structures import PixelData
from mmseg.models import EncoderDecoder as MMSegEncoderDecoder
from mmseg.models.decode_heads import FCNHead as MMSegFCNHead
from mmseg.models.decode_heads import UPerHead as MMSegUPerHead
from mmseg.models.decode_heads.decode_head import BaseDecodeHead
from mmseg.models.losses import CrossEntropyLoss
from mmseg.models.utils import resize
from mmseg.structures import SegDataSample
from torch import Tensor, nn

from replk_mm.ops.pyramid import conv_of_resized
from replk_mm.ops.upsampled import upsampled_argmax, upsampled_cross_entropy
from replk_mm.ops.watching import hooked, observed
from replk_mm.registry import MODELS


class UpsampledLoss(BaseDecodeHead):
    """A head whose cross-entropy is taken without its logits at the labels' size.

    For one plain ``CrossEntropyLoss`` (softmax, mean over the pixels, no class weights, no pixel sampler). Any other loss is
    computed by mmseg.
    """

    def loss_by_feat(self, seg_logits: Tensor, batch_data_samples: list[SegDataSample]) -> dict[str, Tensor]:
        """Losses of logits ``(N, K, h, w)`` under the names that mmseg gives them, and ``acc_seg`` in percent."""
        loss = self._plain_cross_entropy()
        if loss is None:
            return super().loss_by_feat(seg_logits, batch_data_samples)
        labels = self._stack_batch_gt(batch_data_samples).squeeze(1)
        total, correct, counted = upsampled_cross_entropy(seg_logits, labels, self.ignore_index, self.align_corners)
        # mmseg's own constants, which decide what a batch without labels gives.
        eps = torch.finfo(torch.float32).eps
        mean = total / ((counted.to(total.dtype) if loss.avg_non_ignore else labels.numel()) + eps)
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
    """mmseg's ``UPerHead`` with the loss of :class:`UpsampledLoss`, in the memory layout of the backbone's features.

    On CPUs the two convolutions over concatenated maps run at the maps' own resolutions (:mod:`replk_mm.ops.pyramid`): with
    512 channels that is half of the head's arithmetic. Everywhere else, in half precision, and where a program is recorded
    or its arithmetic counted, they run as in mmseg.
    """

    def psp_forward(self, inputs: Sequence[Tensor]) -> Tensor:
        """The pyramid pooling module on the last of ``inputs``, ``(N, C, H, W)`` to ``(N, channels, H, W)``."""
        x = inputs[-1]
        return self._join(self.bottleneck, [x, *(pool(x) for pool in self.psp_modules)])

    def _forward_feature(self, inputs: Sequence[Tensor]) -> Tensor:
        """Features ``(N, channels, h, w)`` before the classifier, at the size of the first of ``inputs``."""
        inputs = self._transform_inputs(inputs)
        levels = [lateral(x) for lateral, x in zip(self.lateral_convs, inputs, strict=False)]
        levels.append(self.psp_forward(inputs))
        for i in range(len(levels) - 1, 0, -1):
            levels[i - 1] = levels[i - 1] + self._resize(levels[i], levels[i - 1])
        outs = [conv(x) for conv, x in zip(self.fpn_convs, levels, strict=False)]
        return self._join(self.fpn_bottleneck, [*outs, levels[-1]])

    def _join(self, module: ConvModule, maps: list[Tensor]) -> Tensor:
        """``module`` on all maps, brought to the size of the first and concatenated."""
        if _computes_plainly(module, maps):
            out = conv_of_resized(maps, module.conv.weight, module.conv.bias, self.align_corners)
            out = module.norm(out) if module.with_norm else out
            return module.activate(out) if module.with_activation else out
        joined = torch.cat([maps[0], *(self._resize(x, maps[0]) for x in maps[1:])], dim=1)
        # Maps of 1x1 have no layout to hand on: the concatenation loses it there, and every layer behind it.
        if maps[0].is_contiguous(memory_format=torch.channels_last):
            joined = joined.contiguous(memory_format=torch.channels_last)
        return module(joined)

    def _resize(self, x: Tensor, like: Tensor) -> Tensor:
        return resize(x, size=like.shape[2:], mode='bilinear', align_corners=self.align_corners)


def _computes_plainly(module: ConvModule, maps: list[Tensor]) -> bool:
    """Whether ``module`` is a 3x3 convolution, a norm and an activation on a CPU, not in half precision nor watched."""
    conv = module.conv
    dtype = torch.get_autocast_dtype('cpu') if torch.is_autocast_enabled('cpu') else maps[0].dtype
    return (maps[0].device.type == 'cpu' and dtype in (torch.float32, torch.float64, torch.bfloat16)
            and not observed() and not hooked(module, conv) and type(conv) is nn.Conv2d
            and conv.kernel_size == (3, 3) and conv.padding == (1, 1) and conv.stride == conv.dilation == (1, 1)
            and conv.groups == 1 and conv.padding_mode == 'zeros' and not module.with_explicit_padding
            and not module.with_spectral_norm and module.order == ('conv', 'norm', 'act')
            and module.efficient_conv_bn_eval_forward is None)


def _pixel_data(data: Tensor) -> PixelData:
    return PixelData(data=data)


class DeferredLogits(PixelData):
    """Logits at the size of the image, which are computed when ``data`` is first read.

    Test-time augmentation and code that looks at ``seg_logits`` find them; ``to_dict()``, and so a metric, sees them only if
    something has read them before. Copies and pickles are plain ``PixelData``.

    Args:
        compute: Returns the logits, ``(K, H, W)``.
    """

    _compute: Callable[[], Tensor]

    def __init__(self, compute: Callable[[], Tensor]) -> None:
        super().__init__()
        object.__setattr__(self, '_compute', compute)  # PixelData's own takes maps only

    def __getattr__(self, name: str) -> Any:
        if name != 'data':
            raise AttributeError(f'{type(self).__name__} has no attribute {name!r}')
        self.set_field(self._compute(), 'data')
        return self.data

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width."""
        return self.data.shape[-2], self.data.shape[-1]

    def new(self, **kwargs: Any) -> PixelData:
        """A plain copy; arguments as for ``PixelData``."""
        return _pixel_data(self.data).new(**kwargs)

    def clone(self) -> PixelData:
        """A plain copy."""
        return _pixel_data(self.data)

    def __getitem__(self, item: tuple) -> PixelData:
        return _pixel_data(self.data)[item]

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
            logits = self.decode_head.forward(self.extract_feat(inputs))
            size = _input_size(metas[0])
        else:
            logits = self.inference(inputs, metas)
            size = tuple(logits.shape[2:])
        samples = data_samples or [SegDataSample() for _ in metas]
        for small, sample in zip(logits.split(1), samples, strict=True):
            meta = sample.metainfo if data_samples else None
            sample.set_data(dict(
                seg_logits=DeferredLogits(partial(self._large_logits, small, size, meta)),
                pred_sem_seg=PixelData(data=self._class_map(small[0], size, meta).unsqueeze(0))))
        return samples

    def _class_map(self, small: Tensor, size: Sequence[int], meta: dict | None) -> Tensor:
        if meta is None:
            return upsampled_argmax(small, size, align_corners=self.align_corners)
        return upsampled_argmax(small, size, meta.get('img_padding_size', meta.get('padding_size', (0, 0, 0, 0))),
                                meta['flip_direction'] if meta.get('flip') else None, meta['ori_shape'], self.align_corners)

    def _large_logits(self, small: Tensor, size: Sequence[int], meta: dict | None) -> Tensor:
        large = resize(small, size=size, mode='bilinear', align_corners=self.align_corners)
        return self.postprocess_result(large, None if meta is None else [SegDataSample(metainfo=meta)])[0].seg_logits.data


def _input_size(meta: dict) -> tuple[int, int]:
    """Height and width to which ``BaseDecodeHead.predict_by_feat`` brings the logits."""
    size = meta['img_shape'] if isinstance(meta['img_shape'], torch.Size) else meta.get('pad_shape', meta['img_shape'])
    return int(size[0]), int(size[1])
