"""mmseg's segmentor and heads without logits at the size of the image.

``replk_mm.EncoderDecoder``, ``replk_mm.UPerHead`` and ``replk_mm.FCNHead`` take the arguments of mmseg's classes, have
the same parameters and state dicts, and log the same names. Losses, gradients, accuracies and predictions are equal up
to rounding. :mod:`replk_mm.heads.upsampling` and :mod:`replk_mm.heads.class_map` describe the computation.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from mmcv.cnn import ConvModule
from mmengine.structures import PixelData
from mmseg.models import EncoderDecoder as MMSegEncoderDecoder
from mmseg.models import SegTTAModel as MMSegSegTTAModel
from mmseg.models.decode_heads import FCNHead as MMSegFCNHead
from mmseg.models.decode_heads import UPerHead as MMSegUPerHead
from mmseg.models.decode_heads.decode_head import BaseDecodeHead
from mmseg.models.losses import CrossEntropyLoss
from mmseg.models.utils import resize
from mmseg.structures import SegDataSample
from torch import Tensor, nn

from replk_mm.errors import UserError
from replk_mm.heads.class_map import LogitRows, Windows, class_map
from replk_mm.heads.pyramid import pyramid_conv2d
from replk_mm.heads.upsampling import upsampled_cross_entropy
from replk_mm.ops.depthwise import is_traced
from replk_mm.ops.fused import has_hooks
from replk_mm.registry import MODELS


class UpsampledLossMixin(BaseDecodeHead):
    """Cross-entropy of a head without logits at the size of the labels.

    It applies to a single ``CrossEntropyLoss`` with softmax, mean reduction, no class weights and no pixel sampler.
    mmseg computes all other losses.
    """

    def loss_by_feat(self, seg_logits: Tensor, batch_data_samples: list[SegDataSample]) -> dict[str, Tensor]:
        """Compute the loss of logits ``(N, K, h, w)`` and ``acc_seg`` in percent, under the names that mmseg uses."""
        loss = self._plain_cross_entropy()
        if loss is None:
            return super().loss_by_feat(seg_logits, batch_data_samples)
        labels = self._stack_batch_gt(batch_data_samples).squeeze(1)
        total, correct, counted = upsampled_cross_entropy(seg_logits, labels, self.ignore_index, self.align_corners)
        # As in mmseg; this decides the values of a batch without labels.
        eps = torch.finfo(torch.float32).eps
        mean = total / ((counted.to(total.dtype) if loss.avg_non_ignore else labels.numel()) + eps)
        return {
            loss.loss_name: loss.loss_weight * mean,
            'acc_seg': ((correct + eps) * 100 / (counted + eps)).float().view(1),
        }

    def _plain_cross_entropy(self) -> CrossEntropyLoss | None:
        losses = list(self.loss_decode) if isinstance(self.loss_decode, nn.ModuleList) else [self.loss_decode]
        plain = (
            len(losses) == 1
            and type(losses[0]) is CrossEntropyLoss
            and not losses[0].use_sigmoid
            and not losses[0].use_mask
            and losses[0].class_weight is None
            and losses[0].reduction == 'mean'
            and self.sampler is None
            and self.ignore_index is not None
        )
        return losses[0] if plain else None


@MODELS.register_module()
class FCNHead(UpsampledLossMixin, MMSegFCNHead):
    """mmseg's ``FCNHead`` with the loss of :class:`UpsampledLossMixin`."""


@MODELS.register_module()
class UPerHead(UpsampledLossMixin, MMSegUPerHead):
    """mmseg's ``UPerHead`` with the loss of :class:`UpsampledLossMixin` that keeps the layout of its input.

    On CPUs the two convolutions over concatenated maps run at the resolution of each map
    (:mod:`replk_mm.heads.pyramid`), which halves the arithmetic of a head with 512 channels. They run as in mmseg on
    other devices, in half precision, and under tracing or FLOP counting.
    """

    def psp_forward(self, inputs: Sequence[Tensor]) -> Tensor:
        """Apply the pyramid pooling module to the last of ``inputs``; returns ``(N, channels, H, W)``."""
        x = inputs[-1]
        return self._fuse_levels(self.bottleneck, [x, *(pool(x) for pool in self.psp_modules)])

    def _forward_feature(self, inputs: Sequence[Tensor]) -> Tensor:
        """Return the features ``(N, channels, h, w)`` before the classifier, at the size of the first of ``inputs``."""
        inputs = self._transform_inputs(inputs)
        levels = [lateral(x) for lateral, x in zip(self.lateral_convs, inputs, strict=False)]
        levels.append(self.psp_forward(inputs))
        for i in range(len(levels) - 1, 0, -1):
            levels[i - 1] = levels[i - 1] + self._resize(levels[i], levels[i - 1])
        outs = [conv(x) for conv, x in zip(self.fpn_convs, levels, strict=False)]
        return self._fuse_levels(self.fpn_bottleneck, [*outs, levels[-1]])

    def _fuse_levels(self, module: ConvModule, maps: list[Tensor]) -> Tensor:
        """Resize all maps to the size of the first, concatenate them and apply ``module``."""
        if _is_plain_conv(module, maps):
            out = pyramid_conv2d(maps, module.conv.weight, module.conv.bias, self.align_corners)
            out = module.norm(out) if module.with_norm else out
            return module.activate(out) if module.with_activation else out
        concatenated = torch.cat([maps[0], *(self._resize(x, maps[0]) for x in maps[1:])], dim=1)
        # A concatenation with 1x1 maps would lose the layout for all following layers.
        if maps[0].is_contiguous(memory_format=torch.channels_last):
            concatenated = concatenated.contiguous(memory_format=torch.channels_last)
        return module(concatenated)

    def _resize(self, x: Tensor, like: Tensor) -> Tensor:
        return resize(x, size=like.shape[2:], mode='bilinear', align_corners=self.align_corners)


def _is_plain_conv(module: ConvModule, maps: list[Tensor]) -> bool:
    """Return whether ``module`` is a plain 3x3 convolution with norm and activation, on a CPU and not traced."""
    conv = module.conv
    dtype = torch.get_autocast_dtype('cpu') if torch.is_autocast_enabled('cpu') else maps[0].dtype
    return (
        maps[0].device.type == 'cpu'
        and dtype in (torch.float32, torch.float64, torch.bfloat16)
        and not is_traced()
        and not has_hooks(module, conv)
        and type(conv) is nn.Conv2d
        and conv.kernel_size == (3, 3)
        and conv.padding == (1, 1)
        and conv.stride == conv.dilation == (1, 1)
        and conv.groups == 1
        and conv.padding_mode == 'zeros'
        and module.order == ('conv', 'norm', 'act')
        and module.efficient_conv_bn_eval_forward is None
    )


class DeferredLogits(PixelData):
    """Logits at the size of the image, computed at the first access of ``data``.

    Copies and pickles are plain ``PixelData``. ``to_dict()``, and thus a metric, includes the logits only after an
    access.

    Args:
        compute: Function that returns the logits, ``(K, H, W)``.
    """

    _compute: Callable[[], Tensor]

    def __init__(self, compute: Callable[[], Tensor]) -> None:
        super().__init__()
        object.__setattr__(self, '_compute', compute)  # PixelData's __setattr__ accepts only maps

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
        """Return a plain copy; arguments as for ``PixelData``."""
        return PixelData(data=self.data).new(**kwargs)

    def clone(self) -> PixelData:
        """Return a plain copy."""
        return PixelData(data=self.data)

    def __getitem__(self, item: tuple) -> PixelData:
        return PixelData(data=self.data)[item]

    def __reduce__(self) -> tuple:
        return _pixel_data, (self.data,)


def _pixel_data(data: Tensor) -> PixelData:
    return PixelData(data=data)


class ImageLogits(NamedTuple):
    """Logits of one image at its original size."""

    rows: LogitRows  #: logits of a few rows at a time, for :func:`replk_mm.heads.class_map.class_map`
    large: Callable[[], Tensor]  #: function that computes all logits at once, ``(K, H, W)``


@MODELS.register_module()
class EncoderDecoder(MMSegEncoderDecoder):
    """mmseg's ``EncoderDecoder``, which computes class maps from the small logits of the head.

    mmseg upsamples the logits of all classes to the size of the network's input, then to the original size, and keeps
    them with the class map. Here the class map is computed from the small logits, a few rows at a time; only the
    sliding windows that contain these rows are kept. ``seg_logits`` are computed at the first access
    (:class:`DeferredLogits`); with sliding windows this runs the network again.

    Args:
        keep_logits: Predict as mmseg does, including ``seg_logits``. This is always the case with one output channel,
            and in subclasses that override the prediction. Defaults to False.
        *args: Arguments of mmseg's class.
        **kwargs: Arguments of mmseg's class.
    """

    def __init__(self, *args: Any, keep_logits: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.keep_logits = keep_logits

    @property
    def predicts_by_rows(self) -> bool:
        """Whether class maps are computed without the large logits."""
        overridden = any(
            getattr(type(self), name) is not getattr(MMSegEncoderDecoder, name)
            for name in ('encode_decode', 'inference', 'whole_inference', 'slide_inference', 'postprocess_result')
        )
        return not (overridden or self.keep_logits or self.out_channels == 1)

    def predict(self, inputs: Tensor, data_samples: list[SegDataSample] | None = None) -> list[SegDataSample]:
        """Predict ``pred_sem_seg`` of each sample at its ``ori_shape``, from images ``(N, C, H, W)``."""
        if not self.predicts_by_rows:
            return super().predict(inputs, data_samples)
        samples = data_samples or [SegDataSample() for _ in inputs]
        for logits, sample in zip(self.iter_logits(inputs, data_samples), samples, strict=True):
            sample.set_data(
                dict(
                    seg_logits=DeferredLogits(logits.large),
                    pred_sem_seg=PixelData(data=class_map([logits.rows]).unsqueeze(0)),
                )
            )
        return samples

    def iter_logits(self, inputs: Tensor, data_samples: list[SegDataSample] | None = None) -> Iterator[ImageLogits]:
        """Yield the logits of each of the images ``(N, C, H, W)``, whole or with sliding windows (``test_cfg.mode``).

        The network processes whole images in a batch, and windows one by one when their rows are needed.

        Raises:
            UserError: If the mode is unknown, or there are gaps between the windows.
        """
        shape, mode = inputs.shape[2:], self.test_cfg.get('mode', 'whole')
        metas = [sample.metainfo for sample in data_samples or []]
        metas = metas or [dict(ori_shape=shape, img_shape=shape, pad_shape=shape)] * len(inputs)
        if mode == 'whole':
            logits, size = self._head_logits(inputs, metas)
            rows, columns = map(Windows.whole, size)
        elif mode == 'slide':
            rows, columns = map(Windows.sliding, shape, self.test_cfg.crop_size, self.test_cfg.stride)
        else:
            raise UserError(f"model.test_cfg.mode={mode!r} is unknown\nSet it to 'whole' or 'slide'.")
        for i, meta in enumerate(metas):
            if mode == 'whole':
                small = logits[i : i + 1]
                compute = partial(_single_window, small[0])
                large = partial(
                    resize, small, size=size, mode='bilinear', align_corners=self.align_corners, warning=False
                )
            else:
                image = inputs[i : i + 1]
                compute = partial(self._windows, image, meta, rows, columns)
                large = partial(self.slide_inference, image, [dict(meta)])
            padding = meta.get('img_padding_size', meta.get('padding_size', (0, 0, 0, 0)))
            flip = meta['flip_direction'] if meta.get('flip') else None
            logit_rows = LogitRows(compute, rows, columns, padding, flip, meta['ori_shape'][:2], self.align_corners)
            yield ImageLogits(logit_rows, partial(self._at_original_size, large, meta))

    def _head_logits(self, inputs: Tensor, metas: list[dict]) -> tuple[Tensor, tuple[int, ...]]:
        """Return the logits of the head for images ``(N, C, H, W)``, and the size to which mmseg would resize them."""
        head = type(self.decode_head)
        if head.predict is BaseDecodeHead.predict and head.predict_by_feat is BaseDecodeHead.predict_by_feat:
            return self.decode_head.forward(self.extract_feat(inputs)), _input_size(metas[0])
        logits = self.encode_decode(inputs, metas)  # the head overrides the prediction
        return logits, tuple(logits.shape[2:])

    def _windows(self, image: Tensor, meta: dict, rows: Windows, columns: Windows, number: int) -> list[Tensor]:
        """Return the logits ``(K, h, w)`` of a row of windows of ``image``, ``(1, C, H, W)``."""
        top, found = rows.starts[number], []
        for left in columns.starts:
            window = image[..., top : top + rows.length, left : left + columns.length]
            found.append(self._head_logits(window, [{**meta, 'img_shape': window.shape[2:]}])[0][0])
        return found

    @torch.no_grad()
    def _at_original_size(self, large: Callable[[], Tensor], meta: dict) -> Tensor:
        return self.postprocess_result(large(), [SegDataSample(metainfo=meta)])[0].seg_logits.data


def _single_window(logits: Tensor, number: int) -> list[Tensor]:
    """Return the only window of the only row of windows."""
    return [logits]


def _input_size(meta: dict) -> tuple[int, int]:
    """Return the size to which ``BaseDecodeHead.predict_by_feat`` resizes the logits."""
    size = meta['img_shape'] if isinstance(meta['img_shape'], torch.Size) else meta.get('pad_shape', meta['img_shape'])
    return int(size[0]), int(size[1])


@MODELS.register_module()
class SegTTAModel(MMSegSegTTAModel):
    """mmseg's ``SegTTAModel``, which averages the probabilities of the views a few rows at a time.

    mmseg keeps the logits of all views at the original size of the image. Here only the small logits are kept or, with
    sliding windows, the images and the windows that contain the current rows. For segmentors other than
    ``replk_mm.EncoderDecoder``, the probabilities of the views are summed in one map.

    The result is the samples of the first view with ``pred_sem_seg``. With one output channel the mean probability of
    the views is compared with the head's threshold. mmseg applies the sigmoid twice there, so that no probability is
    below one half.

    Args:
        module: Segmentor or its config.
        data_preprocessor: As in mmseg's class.
    """

    def test_step(self, data: dict) -> list[SegDataSample]:
        """Predict images from several views.

        Args:
            data: ``inputs`` and ``data_samples``, each a list over views of lists over images.
        """
        views = [{key: value[i] for key, value in data.items()} for i in range(len(data['inputs']))]
        if isinstance(self.module, EncoderDecoder) and self.module.predicts_by_rows:
            logits = [list(self.module.iter_logits(**self.module.data_preprocessor(view, False))) for view in views]
            found = [class_map([view.rows for view in image]).unsqueeze(0) for image in zip(*logits, strict=True)]
        else:
            found = self._sum_views(views)
        for sample, labels in zip(views[0]['data_samples'], found, strict=True):
            sample.set_data(dict(pred_sem_seg=PixelData(data=labels)))
        return views[0]['data_samples']

    @torch.no_grad()
    def _sum_views(self, views: list[dict]) -> list[Tensor]:
        """Return the labels ``(1, H, W)`` of each image from the summed probabilities of its views."""
        binary = self.module.out_channels == 1
        sums: list[Tensor] = []
        for view in views:
            for i, sample in enumerate(self.module.test_step(view)):
                found = sample.seg_logits.data
                share = (
                    found if binary else found.softmax(0)
                )  # with one channel, mmseg's segmentors return the probability
                if i == len(sums):
                    sums.append(share)
                else:
                    sums[i] += share
        if binary:
            return [(x / len(views) > self.module.decode_head.threshold).to(x) for x in sums]
        return [x.argmax(0, keepdim=True) for x in sums]
