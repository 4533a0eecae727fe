"""Key names of published RepLKNet and ConvNeXt checkpoints, and their conversion to ours.

Our names are mmpretrain's, which for RepLKNet are also the authors'. timm has no RepLKNet.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from mmengine.logging import print_log
from torch import Tensor

from replk_mm.errors import UserError

#: Keys under which training programs store the weights. At each level, the first one that exists is used.
NESTS = (
    'state_dict',
    'model',
    'module',
    'model_state_dict',
    'model_state',
    'net',
    'network',
    'params',
    'model_ema',
    'ema_state_dict',
    'state_dict_ema',
)
#: Prefixes that wrapper modules add to every key.
WRAPPERS = ('module.', '_orig_mod.', 'model.', 'state_dict.')

#: Counters that averaging wrappers store next to the weights.
COUNTERS = ('n_averaged', 'steps')

# Classifier weights of an ImageNet checkpoint, which a backbone does not use.
_CLASSIFIER = re.compile(r'(head(\.fc|\.l\d|\.layers)?|fc|classifier)\.(weight|bias)$')
_CONVNEXT = {
    'official': [
        (re.compile(r'\.dwconv\.'), '.depthwise_conv.'),
        (re.compile(r'\.pwconv([12])\.'), r'.pointwise_conv\1.'),
    ],
    'timm': [
        (re.compile(r'^stem\.(\d)\.'), r'downsample_layers.0.\1.'),
        (re.compile(r'^stages\.(\d+)\.downsample\.'), r'downsample_layers.\1.'),
        (re.compile(r'^(stages\.\d+)\.blocks\.'), r'\1.'),
        (re.compile(r'\.conv_dw\.'), '.depthwise_conv.'),
        (re.compile(r'\.mlp\.fc([12])\.'), r'.pointwise_conv\1.'),
        (re.compile(r'\.mlp\.grn\.weight$'), '.grn.gamma'),
        (re.compile(r'\.mlp\.grn\.bias$'), '.grn.beta'),
        (re.compile(r'^head\.norm\.'), 'norm.'),
    ],
}


@dataclass
class ConvertedStateDict:
    """State dict with our key names.

    Attributes:
        backbone: Weights of the backbone, without prefix.
        rest: All other weights of a whole model, such as ``decode_head.*``, with their original names.
        family: ``'RepLKNet'``, ``'ConvNeXt'``, or ``''`` if unknown.
        format: ``'official'``, ``'mmpretrain'``, ``'timm'``, or ``''`` if the family is unknown.
        merged: Whether the parallel kernels of a RepLKNet are merged.
        ignored: Keys of an ImageNet classifier, which a backbone does not have.
        whole_model: Whether the keys of the backbone had a prefix.
    """

    backbone: dict[str, Tensor]
    rest: dict[str, Tensor]
    family: str = ''
    format: str = ''
    merged: bool = False
    ignored: list[str] = field(default_factory=list)
    whole_model: bool = False

    def describe(self) -> str:
        """Return a short description for logs."""
        if not self.family:
            return 'weights of an unknown family'
        form = f'{"merged " if self.merged else ""}{self.format} key names'
        aside = f', {len(self.ignored)} classifier keys ignored' if self.ignored else ''
        return f'{self.family}, {form}{aside}'


def unwrap_state_dict(checkpoint: Mapping, where: str = 'checkpoint') -> dict[str, Tensor]:
    """Return the flat state dict in a checkpoint of any training program.

    Args:
        checkpoint: The loaded file.
        where: Name of the file in error messages.

    Raises:
        UserError: If the checkpoint contains no tensors.
    """
    node = checkpoint
    # Search nested dicts first: other tensors, such as the best accuracy, may be next to them.
    while True:
        nest = next((key for key in NESTS if isinstance(node.get(key), Mapping)), None)
        if nest is None and any(isinstance(value, Tensor) for value in node.values()):
            break
        if nest is None:
            found = ', '.join(map(str, list(node)[:6])) or 'nothing'
            raise UserError(
                f'{where}: contains no weights; its keys are: {found}\n'
                f'A checkpoint has tensors at its top level or under one of: {", ".join(NESTS)}.'
            )
        if nest == 'model' and isinstance(node.get('model_ema'), Mapping):
            print_log(f'{where}: loading "model", not "model_ema"', logger='current')
        node = node[nest]
    weights = {str(key): value for key, value in node.items() if isinstance(value, Tensor) and key not in COUNTERS}
    while wrapper := next(
        (wrapper for wrapper in WRAPPERS if weights and all(key.startswith(wrapper) for key in weights)), None
    ):
        weights = {key.removeprefix(wrapper): value for key, value in weights.items()}
    return weights


def convert_state_dict(weights: Mapping[str, Tensor], prefix: str | None = None) -> ConvertedStateDict:
    """Convert a flat state dict to our key names.

    Args:
        weights: The output of :func:`unwrap_state_dict`.
        prefix: Prefix of the backbone's keys. Defaults to ``backbone.`` if any key has it, otherwise none.
    """
    if prefix is None or not any(key.startswith(prefix) for key in weights):
        prefix = 'backbone.' if any(key.startswith('backbone.') for key in weights) else ''
    prefix = prefix if not prefix or prefix.endswith('.') else prefix + '.'
    backbone = {key[len(prefix) :]: value for key, value in weights.items() if key.startswith(prefix)}
    rest = {key: value for key, value in weights.items() if not key.startswith(prefix)}
    out = ConvertedStateDict(backbone, rest, whole_model=bool(prefix))
    # With a prefix, the classifier is outside of it. Dense prediction heads have other names.
    out.ignored = [key for key in (rest if prefix else backbone) if _CLASSIFIER.match(key)]
    for key in out.ignored:
        (rest if prefix else backbone).pop(key)

    if any('.large_kernel.' in key for key in backbone):
        out.family, out.format = 'RepLKNet', 'mmpretrain' if prefix else 'official'
        out.merged = any('.lkb_reparam.' in key for key in backbone)
        # The last norm of the classifier is not part of the backbone.
        for key in [key for key in backbone if re.match(r'norm\.', key)]:
            out.ignored.append(key)
            del backbone[key]
    elif any(re.match(r'stages\.\d+\.\d+\.(depthwise_conv|dwconv)\.', key) for key in backbone):
        out.family = 'ConvNeXt'
        out.format = 'official' if any('.dwconv.' in key for key in backbone) else 'mmpretrain'
    elif any('.conv_dw.' in key for key in backbone):
        out.family, out.format = 'ConvNeXt', 'timm'
    if out.family == 'ConvNeXt':
        out.backbone = _convnext_keys(backbone, out.format)
    return out


def _convnext_keys(weights: dict[str, Tensor], form: str) -> dict[str, Tensor]:
    last = max((int(match[1]) for key in weights if (match := re.match(r'stages\.(\d{1,3})\.', key))), default=0)
    out = {}
    for key, value in weights.items():
        for pattern, replacement in _CONVNEXT.get(form, ()):
            key = pattern.sub(replacement, key)
        # The only norm of a classifier is that of the last stage, as in mmpretrain's converter.
        key = re.sub(r'^norm\.', f'norm{last}.', key)
        if '.grn.' in key and value.shape[:-1].numel() == 1:  # (1, 1, 1, C) in the authors' code
            value = value.reshape(value.shape[-1:])
        out[key] = value
    return out


def to_official(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename ConvNeXt weights to the authors' names for dense prediction; RepLKNet's names are already theirs."""
    names = (('.depthwise_conv.', '.dwconv.'), ('.pointwise_conv1.', '.pwconv1.'), ('.pointwise_conv2.', '.pwconv2.'))
    out = {}
    for key, value in weights.items():
        for ours, theirs in names:
            key = key.replace(ours, theirs)
        out[key] = value.view(1, 1, 1, -1) if '.grn.' in key else value
    return out
