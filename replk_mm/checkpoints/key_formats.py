"""Find the weights of a network in a checkpoint of any program, and convert their names to ours.

One rule covers nesting and prefixes: the weights are those whose names and shapes fit the network after a common prefix
is removed. :data:`FORMATS` has the names of other libraries. Ours are mmpretrain's, and the authors' for families
that it lacks and for RepLKNet, where both are the same.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
import torch.nn as nn
from torch import Tensor

from replk_mm.errors import UserError, format_list
from replk_mm.logs import announce

#: Parts of a name that wrapper modules add at any place: DistributedDataParallel and averages, torch.compile, FSDP,
#: activation checkpointing.
WRAPPERS = frozenset({'module', '_orig_mod', '_fsdp_wrapped_module', '_checkpoint_wrapped_module'})
COUNTERS = ('n_averaged', 'steps')  #: which averaging wrappers store next to the weights
#: Momentum encoders of self-supervised training (MoCo, BYOL), which is evaluated with the other encoder.
MOMENTUM_ENCODERS = frozenset({'encoder_k', 'momentum_encoder', 'target_net'})
#: Buffer of a reparameterized backbone of this package: BatchNorm is folded in it, its neck or its heads.
FOLDED = 'folded'
#: Weights that only merged networks have: RepLKNet's, OverLoCK's, UniRepLKNet's.
MERGED = re.compile(r'\.(lkb_reparam\.|lk_origin\.bias$|pwconv2\.0\.bias$)')
_VECTORS = re.compile(r'(?<!\.act\.1)\.(gamma|beta)$')  # layer scale and response norm
_EMA = re.compile(r'(^|[._])ema([._]|$)')
_STAGE = re.compile(r'.*stages[._](\d)\.')
# First names of classifiers, which a backbone does not have.
_CLASSIFIER = re.compile(r'((conv_)?head|fc|classifier|norm)\.')


@dataclass(frozen=True)
class KeyFormat:
    """Names that a library gives to the weights of a family."""

    family: str  #: class name of the backbone
    name: str  #: the library
    anchor: str  #: a weight of the first block, whose name occurs in no later format. The prefix is the text before it
    #: regular expressions and replacements, applied in order to each name without its prefix. They give our names;
    #: ``{last}`` in a replacement is the number of the last stage
    rules: tuple[tuple[str, str], ...] = ()

    def rename(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the weights under our names."""
        out: dict[str, Tensor] = {}
        last = max((match[1] for key in weights if (match := _STAGE.match(key))), default='0')
        for key, value in weights.items():
            for pattern, replacement in self.rules:
                key = re.sub(pattern, replacement, key).replace('{last}', last)
            # Vectors here, but for UniRepLKNet's response norm; in some libraries they have dimensions of size 1.
            value = value.flatten() if _VECTORS.search(key) else value
            if (other := out.setdefault(key, value)) is not value and not torch.equal(other, value):
                raise UserError(f'the checkpoint has two different weights for {key}\nKeep one of them.')
        return out


_OWN = KeyFormat('', '', '')
_FINAL_NORM = (r'^norm\.', 'norm{last}.')  # the only norm of a classifier is that of the last stage
_GRN = ((r'\.grn\.weight$', '.grn.gamma'), (r'\.grn\.bias$', '.grn.beta'))
_AUTHORS = ((r'\.dwconv\.', '.depthwise_conv.'), (r'\.pwconv([12])\.', r'.pointwise_conv\1.'))
_TIMM = (
    (r'^stem\.(\d)\.', r'downsample_layers.0.\1.'),
    (r'^stages\.(\d+)\.downsample\.', r'downsample_layers.\1.'),
    (r'^(stages\.\d+)\.blocks\.', r'\1.'),
    (r'\.conv_dw\.', '.depthwise_conv.'),
    (r'\.mlp\.fc([12])\.', r'.pointwise_conv\1.'),
    (r'\.mlp\.grn\.', '.grn.'),
    *_GRN,
    (r'^head\.norm\.', 'norm{last}.'),
)
_TORCHVISION = (
    *((rf'^features\.{2 * i}\.', f'downsample_layers.{i}.') for i in range(4)),
    *((rf'^features\.{2 * i + 1}\.(\d+)\.', rf'stages.{i}.\1.') for i in range(4)),
    (r'\.layer_scale$', '.gamma'),
    (r'\.block\.0\.', '.depthwise_conv.'),
    (r'\.block\.2\.', '.norm.'),
    (r'\.block\.3\.', '.pointwise_conv1.'),
    (r'\.block\.5\.', '.pointwise_conv2.'),
    (r'^classifier\.0\.', 'norm3.'),
)
_TRANSFORMERS = (
    (r'^embeddings\.patch_embeddings\.', 'downsample_layers.0.0.'),
    (r'^embeddings\.layernorm\.', 'downsample_layers.0.1.'),
    (r'^(encoder\.)?stages\.(\d+)\.downsampl(ing_layer|e_layers)\.', r'downsample_layers.\2.'),
    (r'^(encoder\.)?stages\.(\d+)\.layers\.', r'stages.\2.'),
    (r'\.layer_?norm\.', '.norm.'),
    (r'\.layer_scale_parameter$', '.gamma'),
    *_GRN,
    *_AUTHORS,
    (r'^layer_?norm\.', 'norm{last}.'),
    *((rf'^hidden_states_norms\.stage{i + 1}\.', f'norm{i}.') for i in range(4)),
)
_VAN_MMPRETRAIN = (
    (r'^blocks', 'block'),
    (r'^(patch_embed\d)\.projection\.', r'\1.proj.'),
    (r'\.DW_conv\.', '.conv0.'),
    (r'\.DW_D_conv\.', '.conv_spatial.'),
    (r'\.mlp\.dwconv\.', '.mlp.dwconv.dwconv.'),
)
_VAN_TRANSFORMERS = (
    *((rf'^encoder\.stages\.{i}\.layers\.', f'block{i + 1}.') for i in range(4)),
    *((rf'^encoder\.stages\.{i}\.embeddings\.convolution\.', f'patch_embed{i + 1}.proj.') for i in range(4)),
    *((rf'^encoder\.stages\.{i}\.embeddings\.normalization\.', f'patch_embed{i + 1}.norm.') for i in range(4)),
    *((rf'^encoder\.stages\.{i}\.normalization\.', f'norm{i + 1}.') for i in range(4)),
    (r'\.pre_normomalization\.', '.norm1.'),  # as they spell it
    (r'\.post_normalization\.', '.norm2.'),
    (r'\.attention\.pre_projection\.conv\.', '.attn.proj_1.'),
    (r'\.attention\.post_projection\.', '.attn.proj_2.'),
    (r'\.attention\.attention_layer\.attention\.', '.attn.spatial_gating_unit.'),
    (r'\.attention_scaling\.weight$', '.layer_scale_1'),
    (r'\.mlp_scaling\.weight$', '.layer_scale_2'),
    (r'\.mlp\.in_dense\.', '.mlp.fc1.'),
    (r'\.mlp\.out_dense\.', '.mlp.fc2.'),
    (r'\.mlp\.depth_wise\.', '.mlp.dwconv.dwconv.'),
    (r'\.depth_wise\.', '.conv0.'),
    (r'\.depth_wise_dilated\.', '.conv_spatial.'),
    (r'\.point_wise\.', '.conv1.'),
)
# Layer and block of the 17 blocks of MobileNetV2, which torchvision numbers consecutively.
_MOBILENETV2_BLOCKS = [f'layer{i}.{j}.' for i, depth in enumerate((1, 2, 3, 4, 3, 3, 1), 1) for j in range(depth)]
_MOBILENETV2_TORCHVISION = (
    *((rf'^features\.{i}\.(?=conv)', block) for i, block in enumerate(_MOBILENETV2_BLOCKS, 1)),
    (r'^features\.0\.0\.', 'conv1.conv.'),
    (r'^features\.0\.1\.', 'conv1.bn.'),
    (r'^features\.18\.0\.', 'conv2.conv.'),
    (r'^features\.18\.1\.', 'conv2.bn.'),
    (r'\.conv\.(\d)\.0\.', r'.conv.\1.conv.'),
    (r'\.conv\.(\d)\.1\.', r'.conv.\1.bn.'),
    # The last convolution and its norm are not in a module of their own; the first block has no expansion.
    (r'^(layer1\.0\.conv\.)1\.(?=weight)', r'\g<1>1.conv.'),
    (r'^(layer1\.0\.conv\.)2\.', r'\g<1>1.bn.'),
    (r'\.conv\.2\.(?=weight)', '.conv.2.conv.'),
    (r'\.conv\.3\.', '.conv.2.bn.'),
)
_MOBILENETV2_TIMM = (
    (r'^conv_stem\.', 'conv1.conv.'),
    (r'^bn1\.', 'conv1.bn.'),
    (r'^conv_head\.', 'conv2.conv.'),
    (r'^bn2\.', 'conv2.bn.'),
    (r'^blocks\.0\.(\d+)\.conv_dw\.', r'layer1.\1.conv.0.conv.'),
    (r'^blocks\.0\.(\d+)\.conv_pw\.', r'layer1.\1.conv.1.conv.'),
    *((rf'^blocks\.0\.(\d+)\.bn{i + 1}\.', rf'layer1.\1.conv.{i}.bn.') for i in range(2)),
    *((rf'^blocks\.{i}\.', f'layer{i + 1}.') for i in range(1, 7)),
    *((rf'\.{name}\.', f'.conv.{i}.conv.') for i, name in enumerate(('conv_pw', 'conv_dw', 'conv_pwl'))),
    *((rf'^(layer\d\.\d+)\.bn{i + 1}\.', rf'\1.conv.{i}.bn.') for i in range(3)),
)
_RDNET_STEM = (r'^stem\.', 'stem.stem.')
#: Key names in circulation. A new family or library is one entry.
FORMATS = (
    KeyFormat('RepLKNet', 'official', 'stages.0.blocks.0.pw1.conv.weight'),
    KeyFormat('UniRepLKNet', 'official', 'stages.0.0.pwconv1.1.weight'),
    KeyFormat('MogaNet', 'official', 'blocks1.0.attn.value.PW_conv.weight'),
    KeyFormat('RDNet', 'official', 'stem.stem.0.weight'),
    KeyFormat('RDNet', 'timm', 'dense_stages.0.0.dense_block0.gamma', (_RDNET_STEM,)),
    KeyFormat(
        'RDNet',
        'timm features_only',
        'dense_stages_0.0.dense_block0.gamma',
        ((r'^(stem|dense_stages)_', r'\1.'), _RDNET_STEM),
    ),
    *(  # with strips or without, in training form and merged
        KeyFormat('SLaK', 'official', f'stages.0.0.large_kernel.{part}.weight', (_FINAL_NORM,))
        for part in ('LoRA1.conv', 'lkb_origin.conv', 'lkb_reparam.LoRA1', 'lkb_reparam')
    ),
    KeyFormat('OverLoCK', 'official', 'blocks1.0.proj.1.lk_origin.weight'),
    KeyFormat('InceptionNeXt', 'official', 'stages.0.blocks.0.token_mixer.dwconv_hw.weight'),
    KeyFormat('VAN', 'official', 'block1.0.attn.spatial_gating_unit.conv_spatial.weight'),
    KeyFormat('VAN', 'mmpretrain', 'blocks1.0.attn.spatial_gating_unit.DW_D_conv.weight', _VAN_MMPRETRAIN),
    KeyFormat(
        'VAN',
        'transformers',
        'encoder.stages.0.layers.0.attention.attention_layer.attention.depth_wise_dilated.weight',
        _VAN_TRANSFORMERS,
    ),
    KeyFormat('MSCAN', 'mmsegmentation', 'block1.0.mlp.dwconv.weight', ((r'\.mlp\.dwconv\.', '.mlp.dwconv.dwconv.'),)),
    KeyFormat('MSCAN', 'official', 'block1.0.attn.spatial_gating_unit.conv0_1.weight'),
    KeyFormat('MobileNetV2', 'mmpretrain', 'layer1.0.conv.1.conv.weight'),
    KeyFormat('MobileNetV2', 'torchvision', 'features.1.conv.1.weight', _MOBILENETV2_TORCHVISION),
    KeyFormat('MobileNetV2', 'timm', 'blocks.0.0.conv_pw.weight', _MOBILENETV2_TIMM),
    KeyFormat('InternImage', 'official', 'levels.0.blocks.0.dcn.dw_conv.0.weight'),
    KeyFormat('ConvNeXt', 'mmpretrain', 'stages.0.0.depthwise_conv.weight', (_FINAL_NORM,)),
    # DINOv3 stores the final norm as norm and as norms.3.
    KeyFormat('ConvNeXt', 'official', 'stages.0.0.dwconv.weight', (*_AUTHORS, (r'^norms\.', 'norm'), _FINAL_NORM)),
    KeyFormat('ConvNeXt', 'timm', 'stages.0.blocks.0.conv_dw.weight', _TIMM),
    KeyFormat(
        'ConvNeXt', 'timm features_only', 'stages_0.blocks.0.conv_dw.weight', ((r'^(st[a-z]+)_', r'\1.'), *_TIMM)
    ),
    KeyFormat('ConvNeXt', 'torchvision', 'features.1.0.block.0.weight', _TORCHVISION),
    KeyFormat('ConvNeXt', 'transformers', 'encoder.stages.0.layers.0.dwconv.weight', _TRANSFORMERS),
    KeyFormat('ConvNeXt', 'transformers DINOv3', 'stages.0.layers.0.depthwise_conv.weight', _TRANSFORMERS),
)
_BY_ANCHOR = {form.anchor: form for form in FORMATS}
_PRECEDENCE = (*FORMATS, _OWN)


@dataclass
class FoundWeights:
    """Weights of a backbone in a checkpoint."""

    backbone: dict[str, Tensor]  #: weights with our names, without prefix
    #: other weights of a whole model, such as ``decode_head.*``, with their own names
    rest: dict[str, Tensor] = field(default_factory=dict)
    classifier: dict[str, Tensor] = field(default_factory=dict)  #: weights of a classifier beside the backbone
    family: str = ''  #: class name of the backbone, or ``''`` if unknown
    format: str = ''  #: name of the key format, or ``''`` if unknown
    #: what precedes the backbone's names, such as ``'state_dict.backbone.'``, without parts of wrappers
    prefix: str = ''
    #: weights under the prefix that are in no module of the backbone, such as a classifier
    unused: list[str] = field(default_factory=list)
    matched: int = 0  #: number of weights that fit the network

    @property
    def merged(self) -> bool:
        """Whether the parallel kernels are merged."""
        return any(map(MERGED.search, self.backbone))

    def describe(self) -> str:
        """Return a short description for logs."""
        form = f'{self.family}, {"merged " if self.merged else ""}{self.format} key names' if self.family else ''
        under = f', prefix {self.prefix!r}' if self.prefix else ''
        unused = f', not used: {format_list(self.unused)}' if self.unused else ''
        return (form or 'weights of an unknown family') + under + unused


def fits(target: Tensor, source: Tensor) -> bool:
    """Whether a weight fits apart from dimensions of size 1: a linear layer a 1x1 convolution, but no strip another."""
    if source.dim() == target.dim() and source.shape[:2] == target.shape[:2]:
        return source.shape == target.shape
    return source.squeeze().shape == target.squeeze().shape


def find_weights(
    checkpoint: Mapping,
    network: nn.Module | None = None,
    where: str = 'checkpoint',
    prefix: str | None = None,
    use_ema: bool = True,
) -> FoundWeights:
    """Find the weights of a backbone in a checkpoint: those that fit after a common prefix is removed.

    Args:
        checkpoint: The loaded file.
        network: The backbone, or a model without one. By default, any backbone with a format in :data:`FORMATS`.
        where: Name of the file in messages.
        prefix: End of the prefix, such as ``'encoder.'``. By default, any.
        use_ema: Of weights and their moving averages, return the averages, as timm's loader and mmengine's EMA hook do.

    Raises:
        UserError: If the checkpoint contains no tensors, none with this prefix, or several networks that fit.
    """
    nests = dict(_nests(checkpoint))
    if not nests:
        raise UserError(
            f'{where}: contains no weights; its keys are: {format_list(checkpoint) or "none"}\n'
            f'A checkpoint is a dict of tensors, or has one inside, for example under "state_dict".'
        )
    own = {unwrap_key(key): value for key, value in network.state_dict().items()} if network is not None else {}
    found = [one for nest, weights in nests.items() for one in _candidates(nest, weights, own)]
    # If nothing fits, errors name the family in the file.
    found = found or [one for nest, weights in nests.items() for one in _candidates(nest, weights, {})]
    if not found and not prefix:
        nest = max(nests, key=lambda nest: len(nests[nest]))
        return FoundWeights(nests[nest], prefix=nest)
    end = f'.{unwrap_key(prefix or "").strip(".")}.'
    under = [one for one in found if not prefix or f'.{one.prefix}'.endswith(end)]
    if not under:
        raise UserError(
            f'{where}: no weights of the network under prefix={prefix!r}; '
            f'its prefixes are: {format_list(repr(one.prefix) for one in found) or "none"}\n'
            f'Omit prefix to find the weights by name and shape.'
        )
    best = max(one.matched for one in under)
    if own and not best:
        return under[0]
    selected = _select([one for one in under if one.matched == best], checkpoint, use_ema, where)
    others = [one.prefix for one in found if one is not selected and one.matched >= best / 3]
    if others:
        announce(f'{where}: weights {selected.prefix!r}, not {format_list(map(repr, others))} (use_ema={use_ema})')
    return selected


def unwrap_key(key: str) -> str:
    """Remove the parts of a name that wrapper modules add."""
    return '.'.join(part for part in key.split('.') if part not in WRAPPERS)


def _nests(node: Mapping, path: str = '', depth: int = 0) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Every dict in a checkpoint that contains tensors, by its path."""
    weights = {unwrap_key(str(key)): value for key, value in node.items() if isinstance(value, Tensor)}
    if weights := {key: value for key, value in weights.items() if key not in COUNTERS}:
        yield path, weights
    for key, value in node.items():
        if isinstance(value, Mapping) and depth < 5:  # a file may contain itself
            name = unwrap_key(str(key))
            yield from _nests(value, f'{path}{name}.' if name else path, depth + 1)


def _candidates(nest: str, weights: dict[str, Tensor], own: Mapping[str, Tensor]) -> Iterator[FoundWeights]:
    """The weights of each network in a dict: of its own names, or of a format that has its anchor."""
    prefixes: dict[str, KeyFormat] = {}
    for key in weights:
        for start in (0, *(match.end() for match in re.finditer(r'\.', key))):
            if (form := _BY_ANCHOR.get(key[start:])) or key[start:] in own:
                prefixes[key[:start]] = min(form or _OWN, prefixes.get(key[:start], _OWN), key=_PRECEDENCE.index)
    modules = {key.split('.')[0] for key in own} | {FOLDED}
    for prefix, form in prefixes.items():
        theirs = {key.removeprefix(prefix): weights[key] for key in weights if key.startswith(prefix)}
        # The network may itself be another library's.
        options = [(_count(renamed := f.rename(theirs), own), f, renamed) for f in dict.fromkeys((form, _OWN))]
        matched, form, backbone = max(options, key=lambda option: option[0]) if own else options[0]
        if own and not matched:
            continue
        unused = [key for key in backbone if (key.split('.')[0] not in modules if own else _CLASSIFIER.match(key))]
        outer = re.sub(r'(^|\.)backbone\..*', r'\1', prefix)
        others = {key: value for key, value in weights.items() if not key.startswith(prefix)}
        others = {key.removeprefix(outer): value for key, value in others.items() if key.startswith(outer)}
        rest = {key: value for key, value in others.items() if not _CLASSIFIER.match(key)}
        backbone = {key: value for key, value in backbone.items() if key not in unused}
        classifier = {key: value for key, value in others.items() if key not in rest}
        yield FoundWeights(backbone, rest, classifier, form.family, form.name, nest + prefix, unused, matched)


def _count(weights: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> int:
    return sum(key in own and fits(own[key], value) for key, value in weights.items())


def _select(fitting: list[FoundWeights], checkpoint: Mapping, use_ema: bool, where: str) -> FoundWeights:
    """Choose between weights that fit equally well."""
    distinct: list[FoundWeights] = []
    for one in fitting:
        if not any(_equal(one, other) for other in distinct):
            distinct.append(one)
    trained = [one for one in distinct if not MOMENTUM_ENCODERS & set(one.prefix.split('.'))] or distinct
    averages = [one for one in trained if _is_average(one, trained, checkpoint)]
    if len(trained) == 2 and len(averages) == 1:
        return next(one for one in trained if (one is averages[0]) == use_ema)
    if len(trained) > 1:
        raise UserError(
            f'{where}: several networks fit; their prefixes are: {format_list(repr(one.prefix) for one in trained)}\n'
            f"Choose one with prefix=..., in init_cfg or as convert_checkpoint's --prefix."
        )
    return trained[0]


def _equal(one: FoundWeights, other: FoundWeights) -> bool:
    pairs = [(value, other.backbone.get(key)) for key, value in one.backbone.items()]
    return len(one.backbone) == len(other.backbone) and all(b is not None and torch.equal(a, b) for a, b in pairs)


def _is_average(one: FoundWeights, found: list[FoundWeights], checkpoint: Mapping) -> bool:
    stored = checkpoint.get('ema_state_dict')
    if isinstance(stored, Mapping) and 'steps' in stored:  # mmengine's hook stores the averages under 'state_dict'
        return one.prefix.startswith('state_dict.')
    is_pair = any('student' in other.prefix.split('.') for other in found)
    return bool(_EMA.search(one.prefix)) or (is_pair and 'teacher' in one.prefix.split('.'))


def to_official(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename ConvNeXt weights to the authors' names for dense prediction; those of others are already theirs."""
    out = {}
    for key, value in weights.items():
        key = re.sub(r'\.pointwise_conv([12])\.', r'.pwconv\1.', key.replace('.depthwise_conv.', '.dwconv.'))
        out[key] = value.view(1, 1, 1, -1) if '.grn.' in key else value
    return out


#: Names of EfficientNet-PyTorch and timm: Lite, and B0 to B8, which have squeeze and excitation.
_EFFICIENTNET = {
    '_conv_stem': 'conv_stem',
    '_bn0': 'bn1',
    '_bn1': 'bn2',
    '_bn2': 'bn3',
    '_expand_conv': 'conv_pw',
    '_depthwise_conv': 'conv_dw',
    '_se_reduce': 'se.conv_reduce',
    '_se_expand': 'se.conv_expand',
    '_project_conv': 'conv_pwl',
    '_conv_head': 'conv_head',
    '_fc': 'classifier',
}
_EFFICIENTNET_UNEXPANDED = {**_EFFICIENTNET, '_bn1': 'bn1', '_bn2': 'bn2', '_project_conv': 'conv_pw'}


def efficientnet_to_timm(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename weights of EfficientNet-PyTorch to timm's names; others stay as they are.

    EfficientNet-PyTorch numbers all blocks, timm those of each stage. The first block of each stage changes the number
    of channels.
    """
    blocks: dict[str, str] = {}
    stage, block = -1, 0
    while (project := weights.get(f'{(theirs := f"_blocks.{len(blocks)}.")}_project_conv.weight')) is not None:
        expand = weights.get(f'{theirs}_expand_conv.weight')
        channels = len(weights[f'{theirs}_depthwise_conv.weight']) if expand is None else expand.shape[1]
        stage, block = (stage, block + 1) if channels == len(project) else (stage + 1, 0)
        blocks[theirs] = f'blocks.{stage}.{block}.'
    out = {}
    for key, value in weights.items():
        prefix, name, rest = re.findall(r'^(_blocks\.\d+\.|)(\w*)(.*)', key)[0]
        unexpanded = prefix and f'{prefix}_expand_conv.weight' not in weights
        names = _EFFICIENTNET_UNEXPANDED if unexpanded else _EFFICIENTNET
        out[blocks.get(prefix, prefix) + names.get(name, name) + rest] = value
    return out
