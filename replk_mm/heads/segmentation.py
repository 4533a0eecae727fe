"""Drop-ins for mmseg's segmentor and heads that never hold the logits at the size of the image.

``replk_mm.EncoderDecoder``, ``replk_mm.UPerHead`` and ``replk_mm.FCNHead`` take the arguments of mmseg's classes, have
the same parameters and state dicts and log the same names; losses, gradients, accuracies and predictions are the same
up to rounding. See :mod:`replk_mm.heads.upsampling` and :mod:`replk_mm.heads.class_map` for how.
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
from replk_mm.heads.pyramid import conv_of_resized
from replk_mm.heads.upsampling import upsampled_cross_entropy
from replk_mm.ops.depthwise import is_traced
from replk_mm.ops.fused import has_hooks
from replk_mm.registry import MODELS


class UpsampledLoss(BaseDecodeHead):
    """A head whose cross-entropy is taken without its logits at the labels' size.

    For one plain ``CrossEntropyLoss`` (softmax, mean over the pixels, no class weights, no pixel sampler). Any other
    loss is computed by mmseg.
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
class FCNHead(UpsampledLoss, MMSegFCNHead):
    """mmseg's ``FCNHead`` with the loss of :class:`UpsampledLoss`."""


@MODELS.register_module()
class UPerHead(UpsampledLoss, MMSegUPerHead):
    """mmseg's ``UPerHead`` with the loss of :class:`UpsampledLoss`, in the memory layout of the backbone's features.

    On CPUs the two convolutions over concatenated maps run at the maps' own resolutions
    (:mod:`replk_mm.heads.pyramid`): with 512 channels that is half of the head's arithmetic. Everywhere
    else, in half precision, and where a program is recorded or its arithmetic counted, they run as in mmseg.
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
        and not module.with_explicit_padding
        and not module.with_spectral_norm
        and module.order == ('conv', 'norm', 'act')
        and module.efficient_conv_bn_eval_forward is None
    )


class DeferredLogits(PixelData):
    """Logits at the size of the image, which are computed when ``data`` is first read; copies and pickles are plain.

    ``to_dict()``, and so a metric, sees them only if something has read them before.

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
        return PixelData(data=self.data).new(**kwargs)

    def clone(self) -> PixelData:
        """A plain copy."""
        return PixelData(data=self.data)

    def __getitem__(self, item: tuple) -> PixelData:
        return PixelData(data=self.data)[item]

    def __reduce__(self) -> tuple:
        return _pixel_data, (self.data,)


def _pixel_data(data: Tensor) -> PixelData:
    return PixelData(data=data)


class ImageLogits(NamedTuple):
    """Logits of one image at its own size.

    Attributes:
        rows: Some rows at a time, for :func:`replk_mm.heads.class_map.class_map`.
        large: Computes all of them at once, ``(K, H, W)``.
    """

    rows: LogitRows
    large: Callable[[], Tensor]


@MODELS.register_module()
class EncoderDecoder(MMSegEncoderDecoder):
    """mmseg's ``EncoderDecoder``, which predicts from the head's small logits.

    mmseg brings the logits of all classes to the size of the network's input, then to that of the photograph, and keeps
    them beside the class map; sliding windows take that twice. Here the class map comes from the small logits, some
    rows at a time, and of sliding windows those that lie over these rows are kept. ``seg_logits`` are computed if they
    are read (:class:`DeferredLogits`); of sliding windows mmseg's way, in which the network runs again.

    Args:
        keep_logits: Predict as mmseg does, ``seg_logits`` included. Defaults to False. One output channel, which is no
            more than the class map, is predicted so anyway; so does a subclass with a way of its own.
        *args: As for mmseg's class.
        **kwargs: As for mmseg's class.
    """

    def __init__(self, *args: Any, keep_logits: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.keep_logits = keep_logits

    @property
    def in_bands(self) -> bool:
        """Whether class maps are made without the large logits."""
        own = any(
            getattr(type(self), name) is not getattr(MMSegEncoderDecoder, name)
            for name in ('encode_decode', 'inference', 'whole_inference', 'slide_inference', 'postprocess_result')
        )
        return not (own or self.keep_logits or self.out_channels == 1)

    def predict(self, inputs: Tensor, data_samples: list[SegDataSample] | None = None) -> list[SegDataSample]:
        """Class maps of images ``(N, C, H, W)``, as ``pred_sem_seg`` of each sample at its ``ori_shape``."""
        if not self.in_bands:
            return super().predict(inputs, data_samples)
        samples = data_samples or [SegDataSample() for _ in inputs]
        for logits, sample in zip(self.logits_of(inputs, data_samples), samples, strict=True):
            sample.set_data(
                dict(
                    seg_logits=DeferredLogits(logits.large),
                    pred_sem_seg=PixelData(data=class_map([logits.rows]).unsqueeze(0)),
                )
            )
        return samples

    def logits_of(self, inputs: Tensor, data_samples: list[SegDataSample] | None = None) -> Iterator[ImageLogits]:
        """Logits of each of the images ``(N, C, H, W)``, whole or of sliding windows as ``test_cfg`` says.

        Whole images go through the network together; windows one by one, when their rows are asked for.

        Raises:
            UserError: If ``test_cfg`` names another mode, or its windows leave gaps.
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
            raise UserError(f"model.test_cfg.mode={mode!r}: 'whole' or 'slide' is needed")
        for i, meta in enumerate(metas):
            if mode == 'whole':
                small = logits[i : i + 1]
                compute = partial(_only, small[0])
                large = partial(
                    resize, small, size=size, mode='bilinear', align_corners=self.align_corners, warning=False
                )
            else:
                image = inputs[i : i + 1]
                compute = partial(self._windows, image, meta, rows, columns)
                large = partial(self.slide_inference, image, [dict(meta)])
            padding = meta.get('img_padding_size', meta.get('padding_size', (0, 0, 0, 0)))
            flip = meta['flip_direction'] if meta.get('flip') else None
            of_rows = LogitRows(compute, rows, columns, padding, flip, meta['ori_shape'][:2], self.align_corners)
            yield ImageLogits(of_rows, partial(self._at_own_size, large, meta))

    def _head_logits(self, inputs: Tensor, metas: list[dict]) -> tuple[Tensor, tuple[int, ...]]:
        """Logits of images ``(N, C, H, W)`` as the head leaves them, and the size to which it brings them."""
        head = type(self.decode_head)
        if head.predict is BaseDecodeHead.predict and head.predict_by_feat is BaseDecodeHead.predict_by_feat:
            return self.decode_head.forward(self.extract_feat(inputs)), _input_size(metas[0])
        logits = self.encode_decode(inputs, metas)  # a head with a way of its own to predict
        return logits, tuple(logits.shape[2:])

    def _windows(self, image: Tensor, meta: dict, rows: Windows, columns: Windows, number: int) -> list[Tensor]:
        """Logits ``(K, h, w)`` of a row of windows of ``image``, ``(1, C, H, W)``."""
        top, found = rows.starts[number], []
        for left in columns.starts:
            window = image[..., top : top + rows.length, left : left + columns.length]
            found.append(self._head_logits(window, [{**meta, 'img_shape': window.shape[2:]}])[0][0])
        return found

    @torch.no_grad()
    def _at_own_size(self, large: Callable[[], Tensor], meta: dict) -> Tensor:
        return self.postprocess_result(large(), [SegDataSample(metainfo=meta)])[0].seg_logits.data


def _only(logits: Tensor, number: int) -> list[Tensor]:
    """The one window of the one row of windows, which has number 0."""
    return [logits]


def _input_size(meta: dict) -> tuple[int, int]:
    """Height and width to which ``BaseDecodeHead.predict_by_feat`` brings the logits."""
    size = meta['img_shape'] if isinstance(meta['img_shape'], torch.Size) else meta.get('pad_shape', meta['img_shape'])
    return int(size[0]), int(size[1])


@MODELS.register_module()
class SegTTAModel(MMSegSegTTAModel):
    """mmseg's ``SegTTAModel``, which merges the views some rows at a time: the argmax of the mean of their
    probabilities.

    mmseg keeps the logits of all views at the photograph's size. Here all views of ``replk_mm.EncoderDecoder`` are
    brought to the same rows of the photograph and these are merged, so that what is kept are the views' small logits
    or, of sliding windows, the images and the windows over these rows. Other segmentors' views are added up in one map
    of probabilities.

    The samples are those of the first view, with ``pred_sem_seg``. Of one output channel, mmseg takes the sigmoid
    twice, after which no probability is below one half; here it is the mean of the views' probabilities that is
    compared with the head's threshold.

    Args:
        module: Segmentor or its config.
        data_preprocessor: As for mmseg's class.
    """

    def test_step(self, data: dict) -> list[SegDataSample]:
        """Predict images from their views.

        Args:
            data: ``inputs`` and ``data_samples``, each a list of views of lists of images.
        """
        views = [{key: value[i] for key, value in data.items()} for i in range(len(data['inputs']))]
        if isinstance(self.module, EncoderDecoder) and self.module.in_bands:
            logits = [list(self.module.logits_of(**self.module.data_preprocessor(view, False))) for view in views]
            found = [class_map([view.rows for view in image]).unsqueeze(0) for image in zip(*logits, strict=True)]
        else:
            found = self._labels_of_sums(views)
        for sample, labels in zip(views[0]['data_samples'], found, strict=True):
            sample.set_data(dict(pred_sem_seg=PixelData(data=labels)))
        return views[0]['data_samples']

    @torch.no_grad()
    def _labels_of_sums(self, views: list[dict]) -> list[Tensor]:
        """Labels ``(1, H, W)`` of each image, one view of all images at a time."""
        binary = self.module.out_channels == 1
        sums: list[Tensor] = []
        for view in views:
            for i, sample in enumerate(self.module.test_step(view)):
                found = sample.seg_logits.data
                share = found if binary else found.softmax(0)  # of one channel, mmseg's segmentors give the probability
                if i == len(sums):
                    sums.append(share.clone())
                else:
                    sums[i] += share
        if binary:
            return [(x / len(views) > self.module.decode_head.threshold).to(x) for x in sums]
        return [x.argmax(0, keepdim=True) for x in sums]
