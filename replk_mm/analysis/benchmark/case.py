"""A network to measure, as plain data: for this process, and for a process of its own that measures memory."""

import contextlib
import io
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context

import torch
import torch.nn as nn
from mmengine.config import Config

from replk_mm.analysis.benchmark.baseline import build_networks
from replk_mm.analysis.benchmark.synthetic_batch import SyntheticBatch, convert_to_bfloat16
from replk_mm.analysis.timing import memory_growth
from replk_mm.backbones.sync_norm import pooled_norm
from replk_mm.data.datasets import crop_of
from replk_mm.engine.config import fit_to_machine, load_config
from replk_mm.engine.machine import keep_freed_memory
from replk_mm.errors import UserError, first_line


@dataclass(frozen=True)
class BenchmarkCase:
    """A network and what it does."""

    config: str  #: config file
    whole: bool  #: the segmentor or detector, rather than its backbone
    mode: str = 'inference'  #: ``'inference'`` or ``'train'``
    form: str = 'reparameterized'  #: ``'training'`` or ``'reparameterized'``
    batch: int = 0  #: images; 0 for the smallest that the mode allows
    shape: tuple[int, int] = (0, 0)  #: height and width in pixels
    options: dict | None = None  #: overrides of config fields
    checkpoint: str | None = None  #: weights, None for random ones
    device: str = 'cpu'  #: ``'cpu'`` or ``'cuda'``
    threads: int = 1  #: of torch and of other engines


def load_case_config(job: BenchmarkCase) -> tuple[Config, list[str]]:
    """The job's config for this machine, and a line for each change."""
    cfg = load_config(job.config, job.options)
    for split in ('train', 'val', 'test'):
        cfg.pop(f'{split}_dataloader', None)  # no data is read
    return cfg, fit_to_machine(cfg, None, job.device, 1)


def default_shape(config: str, options: dict | None) -> tuple[int, int]:
    """Height and width in pixels of a config's training crop, or of its test pipeline's Resize.

    Raises:
        UserError: If it has neither.
    """
    cfg = load_config(config, options)
    crop = crop_of(cfg)
    if crop:
        return crop
    for step in cfg.test_dataloader.get('dataset', {}).get('pipeline', []):
        scale = step.get('scale')
        if 'Resize' in str(step.get('type')) and isinstance(scale, (tuple, list)) and len(scale) == 2:
            short, long = (-(-side // 32) * 32 for side in sorted(scale))
            return short, long
    raise UserError(
        f'{config}: the config has neither crop_size nor a Resize with a scale\nName a size with --shape H W.'
    )


def set_input_size(nets: Iterable[nn.Module], shape: tuple[int, int]) -> None:
    """Let data preprocessors pad to ``shape`` instead of the config's crop."""
    for net in nets:
        preprocessor = getattr(net, 'data_preprocessor', None)
        if getattr(preprocessor, 'size', None) is not None:
            setattr(preprocessor, 'size', shape)  # noqa: B010 (a module's plain attribute)


def min_batch_size(net: nn.Module, mode: str) -> int:
    """Images that a batch needs at least: two where BatchNorm trains on maps of one pixel."""
    return 2 if mode == 'train' and pooled_norm(net) else 1


def peak_memory(job: BenchmarkCase, network: str, how: str, keep: bool) -> int | None | str:
    """Bytes that a network's first three calls need at their peak beyond the loaded network.

    Measured in a process of its own, because memory that another network has freed would be used again unseen.

    Args:
        job: With batch and shape.
        network: A name among :func:`replk_mm.analysis.benchmark.baseline.build_networks`.
        how: Precision, see :class:`SyntheticBatch`.
        keep: See :func:`replk_mm.engine.machine.keep_freed_memory`.

    Returns:
        None where the system does not tell; a text if the process failed.
    """
    gpu = None if job.device == 'cpu' else torch.cuda.current_device()
    with ProcessPoolExecutor(1, get_context('spawn')) as pool:
        try:
            return pool.submit(_memory, job, network, how, keep, gpu).result()
        except Exception as error:  # of the network, or of a process that the system has ended
            return first_line(error)


def _memory(job: BenchmarkCase, network: str, how: str, keep: bool, gpu: int | None) -> int | None:
    if gpu is not None:
        torch.cuda.set_device(gpu)
    keep_freed_memory(keep)
    torch.set_num_threads(job.threads)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):  # libraries log
        cfg, _ = load_case_config(job)
        net = build_networks(cfg, job.whole, job.form, job.checkpoint)[0][network].to(job.device)
        set_input_size([net], job.shape)
        work = SyntheticBatch(cfg, net, job.batch, job.shape, job.device)
        if how == 'converted':
            convert_to_bfloat16(net)
        call = work.inference_call(net, how) if job.mode == 'inference' else work.training_call(net, how)
        return memory_growth(lambda: [call() for _ in range(3)], job.device)
