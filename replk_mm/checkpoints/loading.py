"""Load weights of any known format into a model, and report which ones matched."""

import logging
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from mmengine.logging import print_log
from torch import Tensor

from replk_mm.checkpoints.io import read_checkpoint
from replk_mm.checkpoints.key_formats import FOLDED, MERGED, FoundWeights, find_weights, fits, unwrap_key
from replk_mm.errors import UserError
from replk_mm.logs import announce

#: Top-level modules that only training uses.
TRAINING_ONLY = ('auxiliary_head', 'data_preprocessor')
# Norms of the output features, which classification checkpoints lack. They start as the identity. OverLoCK has one more
# layer for its last feature.
_OUTPUT_NORM = re.compile(r'(?:norm(\d)|stages\.(\d+)\.norm|extra_norm\.(\d)|h_proj)\.')
# Last layers of mmseg's and mmdet's heads, with one output for each class.
_CLASS_LAYER = re.compile(r'\.(conv_seg|fc_cls|retina_cls|conv_cls|conv_logits|atss_cls|gfl_cls)\.(weight|bias)$')
_MAX_SHOWN = 8
#: Ways to fit depthwise kernels of another size, see :func:`resize_kernel`.
RESIZE_KERNELS = ('pad', 'interpolate')


@dataclass
class LoadReport:
    """How the weights of a checkpoint fit a model."""

    total: dict[str, int] = field(default_factory=dict)  #: number of weights in each top-level part of the model
    matched: dict[str, int] = field(default_factory=dict)  #: number of weights in each part that the checkpoint set
    missing: list[str] = field(default_factory=list)  #: keys of the model that the checkpoint lacks
    unexpected: list[str] = field(default_factory=list)  #: keys of the checkpoint that the model lacks
    #: key, the model's shape and the checkpoint's shape
    mismatched: list[tuple[str, tuple, tuple]] = field(default_factory=list)
    #: sizes of depthwise kernels in the checkpoint and in the model, and how they were resized, with counts
    resized: Counter[str] = field(default_factory=Counter)

    def summary(self) -> str:
        """Counts of each part, such as ``'backbone 1164/1164, decode_head 46/46'``, and of resized kernels."""
        counts = [f'{part} {self.matched.get(part, 0)}/{total}' for part, total in self.total.items()]
        return ', '.join([*counts, *(f'{count} kernels {how}' for how, count in self.resized.items())])

    def details(self) -> str:
        """The first keys that did not match, by kind."""
        shapes = [f'{key}: model {ours}, checkpoint {theirs}' for key, ours, theirs in self.mismatched]
        lines = []
        for title, items in (('missing', self.missing), ('unexpected', self.unexpected), ('shape differs', shapes)):
            if items:
                lines += [f'  {title}: {len(items)}', *(f'    {item}' for item in items[:_MAX_SHOWN])]
            if len(items) > _MAX_SHOWN:
                lines.append(f'    ... and {len(items) - _MAX_SHOWN} more')
        return '\n'.join(lines)


def resize_kernel(kernel: Tensor, size: Sequence[int], how: str, key: str = 'kernel') -> Tensor:
    """Fit a depthwise kernel ``(C, 1, h, w)`` to another height and width.

    Args:
        kernel: The weight.
        size: The new height and width, in pixels.
        how: ``'pad'``: zeros on all sides. The convolution computes the same outputs. Smaller sizes are rejected.
            ``'interpolate'``: bicubic interpolation to any size, times the ratio of the areas, so that constant images
            have the same outputs.
        key: Name of the weight in messages.

    Raises:
        UserError: If ``how`` is unknown, or padding cannot reach the size.
    """
    height, width = kernel.shape[2:]
    if how == 'interpolate':
        resized = F.interpolate(kernel.float(), tuple(size), mode='bicubic', antialias=True)
        return (resized * (height * width / (size[0] * size[1]))).to(kernel.dtype)
    if how != 'pad':
        raise UserError(f'resize_kernels={how!r}: unknown\nUse {" or ".join(RESIZE_KERNELS)}.')
    rows, columns = size[0] - height, size[1] - width
    if min(rows, columns) < 0 or rows % 2 or columns % 2:
        raise UserError(
            f'{key}: cannot pad a kernel of {height}x{width} to {size[0]}x{size[1]}\n'
            f'Use --resize-kernels interpolate (in code resize_kernels).'
        )
    return F.pad(kernel, (columns // 2, columns // 2, rows // 2, rows // 2))


def _is_other_kernel(ours: Sequence[int], theirs: Sequence[int]) -> bool:
    """Whether these are the shapes of depthwise kernels of different sizes."""
    return len(ours) == len(theirs) == 4 and ours[:2] == theirs[:2] and ours[1] == 1 and ours[2:] != theirs[2:]


def copy_weights(
    model: nn.Module, weights: Mapping[str, Tensor], parts: bool, resize_kernels: str | None = None
) -> LoadReport:
    """Copy every weight with a matching name and shape. A linear layer's weight fits a 1x1 convolution.

    Args:
        model: The model to fill.
        weights: State dict with the model's key names.
        parts: Count each top-level module by itself; otherwise count everything as ``backbone``.
        resize_kernels: How to fit depthwise kernels of another size, see :func:`resize_kernel`; None does not.
    """
    report = LoadReport()
    own = {unwrap_key(key): value for key, value in model.state_dict().items()}
    with torch.no_grad():
        for key, target in own.items():
            part = key.split('.')[0] if parts else 'backbone'
            report.total[part] = report.total.get(part, 0) + 1
            source = weights.get(key)
            if source is not None and resize_kernels and _is_other_kernel(target.shape, source.shape):
                old, new = ('x'.join(map(str, value.shape[2:])) for value in (source, target))
                source = resize_kernel(source, target.shape[2:], resize_kernels, key)
                report.resized[f'{old} to {new} ({resize_kernels})'] += 1
            if source is None:
                report.missing.append(key)
            elif not fits(target, source):
                report.mismatched.append((key, tuple(target.shape), tuple(source.shape)))
            else:
                target.copy_(source.reshape(target.shape))
                report.matched[part] = report.matched.get(part, 0) + 1
    report.unexpected = [key for key in weights if key not in own]
    return report


def load_pretrained(
    backbone: Any,
    checkpoint: str | Path,
    prefix: str | None = None,
    strict: bool = True,
    map_location: str = 'cpu',
    use_ema: bool = True,
    adapt_input_conv: bool = False,
    resize_kernels: str | None = None,
) -> LoadReport:
    """Load pretrained weights of any known format, as in ``init_cfg=dict(type='Pretrained', checkpoint=...)``.

    Args:
        backbone: A backbone of this package.
        checkpoint: Path or URL.
        prefix: End of the prefix of the backbone's keys in the file, such as ``'encoder.'``. Detected by default.
        strict: Raise unless every weight is set, except norms of the output features. Defaults to True.
        map_location: For compatibility with mmengine's configs. Weights are always read on the CPU and copied.
        use_ema: Of weights and their moving averages, load the averages. Defaults to True.
        adapt_input_conv: Repeat the weights of the first convolution, scaled, for images with another number of
            channels, as timm does. Defaults to False.
        resize_kernels: Fit depthwise kernels of another size, see :func:`resize_kernel`: ``'pad'`` or
            ``'interpolate'``. By default they are an error.

    Raises:
        UserError: If the file cannot be read, does not fit and ``strict`` is True, or contains several networks that
            fit.
    """
    loaded = read_checkpoint(checkpoint)
    found = find_weights(loaded, backbone, str(checkpoint), prefix, use_ema)
    weights = weights_for_training(backbone, found, loaded, str(checkpoint))
    if adapt_input_conv:
        weights = _adapt_input_conv(weights, backbone)
    report = copy_weights(backbone, weights, parts=False, resize_kernels=resize_kernels)
    present = {key.rpartition('.')[0] for key in weights}  # a norm may be absent, but not one of its weights
    report.missing = [
        key
        for key in report.missing
        if not key.endswith('num_batches_tracked')
        and (key.rpartition('.')[0] in present or not _is_output_norm(backbone, key))
    ]
    # The backbone has no norms for stages outside out_indices.
    report.unexpected = [
        key
        for key in report.unexpected
        if not (norm := _OUTPUT_NORM.match(key))
        or int(next(filter(None, norm.groups()), 3)) in getattr(backbone, 'out_indices', range(4))
    ]
    summary = f'pretrained weights {checkpoint}: {found.describe()}; {report.summary()}\n{report.details()}'
    print_log(summary.rstrip(), logger='current')
    misfits = report.missing or report.mismatched or report.unexpected
    if misfits and (strict or not report.matched):
        raise UserError(
            f'{checkpoint}: does not fit {type(backbone).__name__}: {report.summary()}\n'
            f'{report.details()}\n{guess_cause(report, found, whole=False)}'
        )
    return report


def _is_output_norm(backbone: Any, key: str) -> bool:
    """Return whether a weight is that of a norm of an output feature. VAN has norms of such names between stages."""
    locate = getattr(backbone, '_locate_parameter', None)  # other libraries' networks have none
    return bool(_OUTPUT_NORM.match(key)) and (locate is None or locate(key.split('.')) is None)


def _adapt_input_conv(weights: dict[str, Tensor], backbone: nn.Module) -> dict[str, Tensor]:
    """Fit the weights of the first convolution to the number of channels: sum them for one, repeat them for more."""
    key, conv = next((f'{name}.weight', m) for name, m in backbone.named_modules() if isinstance(m, nn.Conv2d))
    weight, channels = weights[key], conv.in_channels
    if channels == weight.shape[1]:
        return weights
    repeated = weight[:, torch.arange(channels) % weight.shape[1]] * (weight.shape[1] / channels)
    return {**weights, key: repeated if channels > 1 else weight.sum(1, keepdim=True)}


def weights_for_training(backbone: nn.Module, found: FoundWeights, loaded: Mapping, where: str) -> dict[str, Tensor]:
    """Return the weights of ``backbone``, in training form if the backbone is. Folded ones raise a ``UserError``."""
    if (get_reparameterization(loaded, found.backbone) or {}).get('fold'):
        raise UserError(
            f'{where}: training cannot start from a network with folded BatchNorm\n'
            f'Start from the checkpoint before reparameterization.'
        )
    if not found.merged or not any(
        part in key for key in backbone.state_dict() for part in ('.lkb_origin.', '.LoRA1.conv.')
    ):
        return found.backbone
    announce(
        f'warning: {where}: merged weights loaded into a network with parallel kernels. Outputs are equal in '
        f'evaluation mode; training replaces the folded statistics with batch statistics. Set norm_eval=True or '
        f'small_kernel_merged=True to keep them.',
        logging.WARNING,
    )
    return _unmerge(found.backbone, backbone)


def _unmerge(weights: dict[str, Tensor], backbone: Any) -> dict[str, Tensor]:
    """Convert merged weights to the training form: large kernels take the weights, small ones start at 0."""
    own, out = backbone.state_dict(), dict(weights)
    for merged in [key for key in weights if '.lkb_reparam.' in key and key.endswith('.weight')]:
        base, _, strip = merged.removesuffix('.weight').partition('.lkb_reparam')
        large, small = base + (strip or '.lkb_origin'), f'{base}.small_conv'
        if f'{large}.bn.weight' not in own:
            continue
        weight = out.pop(merged)
        zeros, ones = torch.zeros(len(weight)), torch.ones(len(weight))
        norm = {'weight': zeros, 'bias': zeros, 'running_mean': zeros, 'running_var': ones}
        out |= {f'{small}.bn.{name}': value for name, value in norm.items()}
        out[f'{small}.conv.weight'] = own.get(f'{small}.conv.weight', zeros)
        # Cancels the norm's division by sqrt(1 + eps).
        norm['weight'] = ones * (1 + backbone.get_submodule(f'{large}.bn').eps) ** 0.5
        norm['bias'] = out.pop(f'{base}.lkb_reparam{strip}.bias', zeros)
        out |= {f'{large}.conv.weight': weight, **{f'{large}.bn.{name}': value for name, value in norm.items()}}
    return {key: value for key, value in out.items() if '.small_conv.' not in key or key in own}


def get_reparameterization(checkpoint: Mapping, weights: Iterable[str]) -> dict | None:
    """Return how the network of a checkpoint was reparameterized.

    Args:
        checkpoint: The loaded file, whose ``meta`` may record it.
        weights: Key names, which show it too.

    Returns:
        ``{'merge': bool, 'fold': bool}``, or None for a network in training form.
    """
    record = (checkpoint.get('meta') or {}).get('replk_mm', {}).get('reparameterized')
    if record:
        return {'merge': record['merge'], 'fold': record['fold']}
    keys = list(weights)
    form = {'merge': any(map(MERGED.search, keys)), 'fold': any(key.split('.')[-1] == FOLDED for key in keys)}
    return form if any(form.values()) else None


def guess_cause(report: LoadReport, found: FoundWeights, whole: bool) -> str:
    """Return the most likely reason why a checkpoint does not fit, and what to do.

    Args:
        report: From :func:`copy_weights`.
        found: The checkpoint's weights.
        whole: Whether the model is a whole segmentor or detector instead of a backbone.
    """
    mismatched = [item for item in report.mismatched if not item[0].startswith(TRAINING_ONLY)]
    in_backbone = [key for key, *_ in mismatched if not whole or key.startswith('backbone.')]
    classes = next((item for item in mismatched if _CLASS_LAYER.search(item[0])), None)
    if not report.matched.get('backbone') and not in_backbone:
        cause = f'another architecture ({found.describe()}). Check that config and checkpoint belong together.'
    elif classes and not in_backbone:
        key, ours, theirs = classes
        cause = (
            f'number of classes: {key} has {ours[0]} outputs in the config, {theirs[0]} in the checkpoint. '
            f"Set num_classes of every head to the checkpoint's."
        )
    elif mismatched and not report.missing and all(_is_other_kernel(a, b) for _, a, b in mismatched):
        (key, ours, theirs), smaller = mismatched[0], any(min(a[2] - b[2], a[3] - b[3]) < 0 for _, a, b in mismatched)
        cause = (
            f'size of depthwise kernels: {key} is {ours[2]}x{ours[3]} in the config, {theirs[2]}x{theirs[3]} in the '
            f'checkpoint. --resize-kernels {"interpolate" if smaller else "pad or interpolate"} (in code '
            f"resize_kernels) fits them; or set the config's kernel size to the checkpoint's."
        )
    elif len(mismatched) == 1 and all(a[:1] + a[2:] == b[:1] + b[2:] and len(a) == 4 for _, a, b in mismatched):
        cause = (
            f'number of image channels: {mismatched[0][0]}. model.backbone.init_cfg.adapt_input_conv=True repeats its '
            f'weights.'
        )
    elif whole and not in_backbone and report.matched.keys() <= {'backbone'}:
        cause = (
            'only a backbone fits: the file has other heads or none, as ImageNet weights. Start a training from the '
            'backbone with --pretrained FILE, and test the checkpoint that it writes.'
        )
    elif whole and not any(key.startswith('backbone.') for key in report.missing + report.unexpected + in_backbone):
        cause = 'an incomplete file: the backbone fits, and a part of the heads is missing.'
    else:
        cause = (
            'another size or other options of the same family. Compare arch, small_kernel_merged, deploy '
            "and norm_intermediate_features with the checkpoint's config."
        )
    return f'Likely cause: {cause}'
