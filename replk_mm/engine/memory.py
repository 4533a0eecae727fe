"""How much memory a training step needs, known before the first one."""
import math
import os
from pathlib import Path

import torch
import torch.nn as nn
from mmengine.config import Config
from mmengine.dist import all_reduce

from replk_mm.data.datasets import crop_of
from replk_mm.equivalence import network_outputs
from replk_mm.errors import UserError
from replk_mm.models.sync_norm import pooled_norm

#: Weights, gradients and Adam's two moments, in float32.
_BYTES_PER_PARAMETER = 16
#: What the interpreter, the libraries and the data workers take, bytes.
_OVERHEAD = 1.5e9
#: Share of the free memory that a run may plan with.
_SHARE = 0.85


def available_bytes() -> int:
    """Memory this process may still take: what the system has free, within a container's limit."""
    meminfo = Path('/proc/meminfo')
    if meminfo.exists():
        lines = dict(line.split(':', 1) for line in meminfo.read_text().splitlines() if ':' in line)
        free = int(lines['MemAvailable'].split()[0]) * 1024
    else:
        # macOS names no free pages: what its caches hold is given back on demand, so that all of the memory counts.
        pages = 'SC_AVPHYS_PAGES' if 'SC_AVPHYS_PAGES' in os.sysconf_names else 'SC_PHYS_PAGES'
        free = os.sysconf(pages) * os.sysconf('SC_PAGE_SIZE')
    for folder, limit, used in (('/sys/fs/cgroup', 'memory.max', 'memory.current'),
                                ('/sys/fs/cgroup/memory', 'memory.limit_in_bytes', 'memory.usage_in_bytes')):
        free = min(free, _left_in_group(Path(folder), limit, used, free))
    return free


def _left_in_group(folder: Path, limit: str, used: str, otherwise: int) -> int:
    try:
        left = int((folder / limit).read_text()) - int((folder / used).read_text())
        # Files in the cache count as used; the kernel drops them when a program asks for memory.
        stat = dict(line.split() for line in (folder / 'memory.stat').read_text().splitlines())
        return left + int(stat.get('inactive_file', 0))
    except (OSError, ValueError):
        return otherwise


def training_bytes(model: nn.Module, batch: int, crop: tuple[int, int], num_classes: int = 0) -> int:
    """Estimate of the memory of one training step in float32.

    Runs the forward pass on the meta device, where tensors have shapes and no data, and adds up what autograd keeps.

    Args:
        model: Built on the meta device.
        batch: Images of a step.
        crop: Height and width of an image in pixels.
        num_classes: Channels of logits that are brought to full resolution for the loss. Defaults to none.
    """
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage.nbytes()
        return tensor

    model.train()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        outputs = network_outputs(model, torch.empty(batch, 3, *crop, device='meta', requires_grad=True),
                                  *(batch * number for number in _regions(model)))
    parameters = sum(p.numel() for p in model.parameters())
    # Logits at full resolution, their log-softmax, and a gradient of each.
    loss = 4 * 4 * batch * crop[0] * crop[1] * num_classes
    del outputs
    return int(sum(kept.values()) + parameters * (_BYTES_PER_PARAMETER - 4) + loss + _OVERHEAD)


def _regions(model: nn.Module) -> tuple[int, int]:
    """Regions of an image that the box heads and the mask heads of a two-stage detector train on."""
    settings = getattr(getattr(model, 'roi_head', None), 'train_cfg', None)
    stages = settings if isinstance(settings, (list, tuple)) else [settings] if settings else []
    samplers = [stage['sampler'] for stage in stages if stage.get('sampler')]
    boxes = max((s['num'] for s in samplers), default=1)
    return boxes, max((math.ceil(s['num'] * s.get('pos_fraction', 1)) for s in samplers), default=1)


def fit_batch(cfg: Config, model: nn.Module, world_size: int) -> list[str]:
    """Lower the batch of a process until a training step fits this machine's memory.

    Args:
        cfg: Changed in place.
        model: The config's model, built on the meta device.
        world_size: Processes on this machine, which share its memory.

    Returns:
        A line if the batch was changed.

    Raises:
        UserError: If not even the smallest possible batch fits.
    """
    crop = crop_of(cfg)
    if crop is None or not (hasattr(model, 'decode_head') or hasattr(model, 'extract_feat')):
        return []
    wanted = cfg.train_dataloader.batch_size
    head = getattr(model, 'decode_head', None)
    heads = list(head) if isinstance(head, nn.ModuleList) else [head]
    classes = max(int(getattr(head, 'num_classes', 0)) for head in heads)
    smallest = min(wanted, 2 if pooled_norm(model) else 1)
    # One figure for all processes: they must come to the same batch.
    found = torch.tensor(available_bytes(), dtype=torch.int64)
    all_reduce(found, 'min')
    free = int(found.item() * _SHARE / world_size)
    batch = wanted
    while (need := training_bytes(model, batch, crop, classes)) > free and batch > smallest:
        batch -= 1
    if need > free:
        raise UserError(
            f'images of {crop[0]}x{crop[1]} pixels: a training step with {batch} images needs about {need / 2**30:.1f} GiB of '
            f'memory; {free / 2**30:.1f} GiB are free for it\n'
            f'Use a smaller crop (crop_size in the config, or the scales of its pipeline), a smaller backbone, '
            f'backbone.with_cp=True (--cfg-options model.backbone.with_cp=True), or close other programs; --no-memory-check '
            f'trains regardless.')
    cfg.train_dataloader.batch_size = batch
    return [] if batch == wanted else [
        f'batch: {batch} images a process instead of {wanted}: {need / 2**30:.1f} GiB of {free / 2**30:.1f} GiB free memory']


def check_batch(cfg: Config, model: nn.Module) -> None:
    """Refuse a batch that BatchNorm cannot train on.

    Raises:
        UserError: If the batch is smaller than the model needs.
    """
    name = pooled_norm(model)
    if name and cfg.train_dataloader.batch_size < 2:
        head = name.split('.')[0]
        raise UserError(
            f'train_dataloader.batch_size={cfg.train_dataloader.batch_size}: model.{name} pools to 1x1, and BatchNorm has no '
            f'variance over one value; at least 2 images a process are needed\n'
            f'Raise the batch size, or use a norm without batch statistics: '
            f'--cfg-options model.{head}.norm_cfg.type=GN model.{head}.norm_cfg.num_groups=32')
