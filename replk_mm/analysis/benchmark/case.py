"""One case of a benchmark: its config, its networks (ours, and those of plain torch), its peak memory."""

import contextlib
import copy
import io
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any

import torch
import torch.nn as nn
from mmengine.config import Config, ConfigDict
from mmengine.registry import MODELS, init_default_scope

from replk_mm.analysis.benchmark.synthetic_batch import Precision, SyntheticBatch, convert_weights
from replk_mm.analysis.gpu import DTYPES, matmul_precision
from replk_mm.analysis.timing import memory_growth
from replk_mm.backbones.layers import Backbone, LayerNorm2d
from replk_mm.backbones.sync_norm import find_pooled_batch_norm
from replk_mm.data.datasets import crop_of, datasets_of, task_of
from replk_mm.deploy.reparameterize import Changes, reparameterize
from replk_mm.engine.config import build_model, fit_to_machine, load_config
from replk_mm.engine.config_errors import explain_build_errors
from replk_mm.engine.freezing import freeze_backbone
from replk_mm.engine.inference import load_model
from replk_mm.engine.process import keep_freed_memory
from replk_mm.errors import UserError, first_line
from replk_mm.ops import DepthwiseConv2d, prepack
from replk_mm.registry import SCOPE

#: Names of the networks in tables and records.
PLAIN, PLAIN_TRAINING, OURS = 'plain torch', 'plain torch, training form', 'ours'
PLAIN_CHANNELS_LAST = 'plain torch, channels-last'
#: Seed of random weights.
_SEED = 0


def build_networks(
    cfg: Config, whole_model: bool, form: str, checkpoint: str | None = None
) -> tuple[dict[str, nn.Module], Changes | None]:
    """Build the networks that a benchmark compares, all with the same weights.

    Args:
        cfg: The config, fitted to this machine.
        whole_model: Whether to build the segmentor or detector instead of its backbone alone.
        form: ``'training'``, or ``'reparameterized'``: kernels merged and BatchNorm folded in every network except
            :data:`PLAIN_TRAINING`.
        checkpoint: Path of the weights. None for random weights, with random statistics of BatchNorm.

    Returns:
        :data:`PLAIN` (the baseline), :data:`PLAIN_TRAINING` if it differs from the baseline,
        :data:`PLAIN_CHANNELS_LAST`, and :data:`OURS`; and the changes made by the reparameterization.

    Raises:
        UserError: If the config has no backbone, or the checkpoint does not fit or has no training form.
    """
    if whole_model:
        build_model(cfg, 'meta')  # rejects parts that do not fit together
    torch.manual_seed(_SEED)
    ours = build_part(cfg, cfg.model, whole_model)
    plain = build_part(cfg, _with_library_heads(cfg.model, cfg.get('default_scope', 'mmengine')), whole_model)
    if checkpoint:
        resize = cfg.get('resize_kernels')
        meta = load_model(ours, checkpoint, resize_kernels=resize)[1]
        load_model(plain, checkpoint, resize_kernels=resize)
        if form == 'training' and meta.get(SCOPE, {}).get('reparameterized'):
            raise UserError(
                f'{checkpoint}: is reparameterized; it has no training form\n'
                f'Use --mode inference --form reparameterized, or the checkpoint that training wrote.'
            )
    else:
        randomize_constants(ours, _SEED)
        plain.load_state_dict(ours.state_dict())
    networks, changes = {PLAIN: plain}, None
    if form == 'reparameterized':
        before = copy.deepcopy(plain)
        changes = reparameterize(ours, inplace=True)[1]
        reparameterize(plain, inplace=True)
        if changes.merged or changes.folded:
            networks[PLAIN_TRAINING] = use_plain_torch(before)
    networks[PLAIN_CHANNELS_LAST] = use_plain_torch(copy.deepcopy(plain), torch.channels_last)
    networks[OURS] = ours
    use_plain_torch(plain)
    prepack(ours)  # as evaluation does
    for net in networks.values() if whole_model and cfg.get('freeze_backbone') else ():
        freeze_backbone(net)
    return networks, changes


def build_part(cfg: Config, model: ConfigDict, whole_model: bool) -> nn.Module:
    """Build the whole model, or its backbone, with random weights."""
    part = Config(
        dict(model=copy.deepcopy(model), default_scope=cfg.get('default_scope', 'mmengine')), filename=cfg.filename
    )
    backbone = part.model.get('backbone')
    if not backbone:
        raise UserError(f'{cfg.filename}: model {part.model.get("type")} has no backbone')
    backbone.pop('init_cfg', None)
    if whole_model:
        return build_model(part)
    init_default_scope(part.default_scope)
    with explain_build_errors(part, 'model'):
        return MODELS.build(part.model.backbone)


def _with_library_heads(model: Any, scope: str) -> Any:
    """A copy of a model's config with the heads of mmseg or mmdet instead of ours, which have the same weights."""
    if isinstance(model, (list, tuple)):
        return [_with_library_heads(part, scope) for part in model]
    if not isinstance(model, dict):
        return model
    new = ConfigDict(
        {key: value if key == 'backbone' else _with_library_heads(value, scope) for key, value in model.items()}
    )
    prefix, _, name = str(new.get('type', '')).rpartition('.')
    if prefix == SCOPE and MODELS.get(f'{scope}.{name}') is not None:
        new['type'] = f'{scope}.{name}'
    return new


def use_plain_torch(net: nn.Module, memory_format: torch.memory_format = torch.contiguous_format) -> nn.Module:
    """Make a network use torch's own depthwise convolutions in one memory layout, in place.

    In torch's default layout, norms over channels return it too, as those of mmpretrain do. Ours return channels-last
    memory otherwise, and torch's convolutions keep the layout of their input.
    """
    channels_last = memory_format == torch.channels_last
    replaced: dict[int, nn.Conv2d] = {}
    for module in list(net.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, DepthwiseConv2d) and type(child) is not DepthwiseConv2d:
                child.implementation = 'native'  # its forward pass does more than convolve
            elif isinstance(child, DepthwiseConv2d):
                module._modules[name] = replaced.setdefault(id(child), _plain_convolution(child))
        if type(module) is nn.Conv2d:
            module.__class__ = PlainConv2d
        elif isinstance(module, Backbone):
            module.channels_last = channels_last
            if channels_last:  # backbones themselves convert images on CPUs only
                module.register_forward_pre_hook(
                    lambda module, args: (args[0].contiguous(memory_format=memory_format),)
                )
            for part in module.modules():
                if isinstance(part, nn.ReLU):
                    part.inplace = False  # as in the authors' code
        elif isinstance(module, LayerNorm2d) and not channels_last:
            module.register_forward_hook(lambda module, args, output: output.contiguous())
    for parameter in net.parameters():
        if parameter.dim() == 4 or not channels_last:
            parameter.data = parameter.data.contiguous(memory_format=memory_format)
    return net


class PlainConv2d(nn.Conv2d):
    """torch's convolution under another type, which our blocks do not fuse with the layers after it."""


def _plain_convolution(conv: Any) -> nn.Conv2d:
    new: Any = PlainConv2d(
        conv.in_channels,
        conv.out_channels,
        conv.kernel_size,
        conv.stride,
        conv.padding,
        conv.dilation,
        conv.groups,
        conv.bias is not None,
        device='meta',
    )
    new.weight, new.bias = conv.weight, conv.bias
    return new.train(conv.training)


@torch.no_grad()
def randomize_constants(net: nn.Module, seed: int = 0) -> None:
    """Randomize what is constant before training, in place: affine parameters and statistics of norms, layer scales.

    A norm that is the identity, or a block scaled by 1e-6, would hide errors in it.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, values in [*net.named_parameters(), *net.named_buffers()]:
        if values.dim() != 1 or not values.is_floating_point() or values.unique().numel() > 1:
            continue
        noise = 0.3 * torch.randn(values.shape, generator=generator)
        scales = name.endswith(('weight', 'gamma', 'running_var'))
        values.copy_((1 + noise.clamp(-0.9, 2)) if scales else noise)


@dataclass(frozen=True)
class BenchmarkCase:
    """A network, its input, and whether it infers or trains."""

    config: str  #: path or name of the config
    whole_model: bool  #: measure the segmentor or detector instead of its backbone alone
    mode: str = 'inference'  #: ``'inference'`` or ``'train'``
    form: str = 'reparameterized'  #: ``'training'`` or ``'reparameterized'``
    batch: int = 0  #: number of images; 0 for the smallest that the mode allows
    shape: tuple[int, int] = (0, 0)  #: height and width in pixels
    options: dict | None = None  #: overrides of config fields
    image: str | None = None  #: file that inference of a whole model reads; None for random pixels in memory
    checkpoint: str | None = None  #: path of the weights; None for random ones
    device: str = 'cpu'  #: ``'cpu'`` or ``'cuda'``
    threads: int = 1  #: threads of torch and of other engines


def load_case_config(case: BenchmarkCase) -> tuple[Config, list[str]]:
    """The config of a case, fitted to this machine, and one line per change."""
    cfg = load_config(case.config, case.options)
    if case.image:
        steps = next(datasets_of(cfg, ('test',))).get('pipeline', [])
        cfg.image_pipeline = [step for step in steps if 'LoadAnnotations' not in str(step.get('type'))]
    for split in ('train', 'val', 'test'):
        cfg.pop(f'{split}_dataloader', None)  # no data is read
    if task_of(cfg) == 'classification':
        cfg.model.pop('train_cfg', None)  # Mixup and CutMix draw random numbers, which differ between the networks
    return cfg, fit_to_machine(cfg, None, case.device, 1)


def default_shape(config: str, options: dict | None) -> tuple[int, int]:
    """Height and width in pixels of a config's training crop, or of its largest resized image.

    Raises:
        UserError: If the config has neither.
    """
    crop = crop_of(load_config(config, options))
    if not crop:
        raise UserError(f'{config}: the config has no crop_size and no Resize with a scale\nUse --shape H W.')
    return crop


def set_input_size(nets: Iterable[nn.Module], shape: tuple[int, int]) -> None:
    """Make the data preprocessors pad to ``shape`` (height, width) instead of the config's crop."""
    for net in nets:
        preprocessor = getattr(net, 'data_preprocessor', None)
        if getattr(preprocessor, 'size', None) is not None:
            setattr(preprocessor, 'size', shape)  # noqa: B010 (a module's plain attribute)


def min_batch_size(net: nn.Module, mode: str) -> int:
    """Smallest number of images per batch: two where BatchNorm trains on maps of one pixel."""
    return 2 if mode == 'train' and find_pooled_batch_norm(net) else 1


def peak_memory(case: BenchmarkCase, network: str, precision: Precision, keep_freed: bool) -> int | None | str:
    """Peak memory of the first three calls of a network beyond the loaded network, in bytes.

    Runs in a new process, because memory that another network has freed would be reused without being counted.

    Args:
        case: With batch and shape.
        network: A name from :func:`replk_mm.analysis.benchmark.case.build_networks`.
        precision: Of the computation.
        keep_freed: See :func:`replk_mm.engine.process.keep_freed_memory`.

    Returns:
        None where the system does not report memory; the error's first line if the process failed.
    """
    gpu = None if case.device == 'cpu' else torch.cuda.current_device()
    with ProcessPoolExecutor(1, get_context('spawn')) as pool:
        try:
            return pool.submit(_memory_of_three_calls, case, network, precision, keep_freed, gpu).result()
        except Exception as error:  # from the network, or because the system has killed the process
            return first_line(error)


def _memory_of_three_calls(
    case: BenchmarkCase, network: str, precision: Precision, keep_freed: bool, gpu: int | None
) -> int | None:
    if gpu is not None:
        torch.cuda.set_device(gpu)
    keep_freed_memory(keep_freed)
    torch.set_num_threads(case.threads)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):  # libraries log
        cfg, _ = load_case_config(case)
        net = build_networks(cfg, case.whole_model, case.form, case.checkpoint)[0][network].to(case.device)
        set_input_size([net], case.shape)
        batch = SyntheticBatch(cfg, net, case.batch, case.shape, case.device, case.image)
        if precision.how == 'converted':
            convert_weights(net, DTYPES[precision.dtype])
        call = batch.inference_call(net, precision) if case.mode == 'inference' else batch.training_call(net, precision)
        with matmul_precision(precision.dtype):
            return memory_growth(lambda: [call() for _ in range(3)], case.device)
