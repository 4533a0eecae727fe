"""One case of a benchmark as plain data, and its peak memory in a process of its own."""

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
from replk_mm.backbones.sync_norm import find_pooled_batch_norm
from replk_mm.data.datasets import crop_of
from replk_mm.engine.config import fit_to_machine, load_config
from replk_mm.engine.process import keep_freed_memory
from replk_mm.errors import UserError, first_line


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
    checkpoint: str | None = None  #: path of the weights; None for random ones
    device: str = 'cpu'  #: ``'cpu'`` or ``'cuda'``
    threads: int = 1  #: threads of torch and of other engines


def load_case_config(case: BenchmarkCase) -> tuple[Config, list[str]]:
    """The config of a case, fitted to this machine, and one line per change."""
    cfg = load_config(case.config, case.options)
    for split in ('train', 'val', 'test'):
        cfg.pop(f'{split}_dataloader', None)  # no data is read
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


def peak_memory(case: BenchmarkCase, network: str, precision: str, keep_freed: bool) -> int | None | str:
    """Peak memory of the first three calls of a network beyond the loaded network, in bytes.

    Runs in a new process, because memory that another network has freed would be reused without being counted.

    Args:
        case: With batch and shape.
        network: A name from :func:`replk_mm.analysis.benchmark.baseline.build_networks`.
        precision: See :class:`SyntheticBatch`.
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
    case: BenchmarkCase, network: str, precision: str, keep_freed: bool, gpu: int | None
) -> int | None:
    if gpu is not None:
        torch.cuda.set_device(gpu)
    keep_freed_memory(keep_freed)
    torch.set_num_threads(case.threads)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):  # libraries log
        cfg, _ = load_case_config(case)
        net = build_networks(cfg, case.whole_model, case.form, case.checkpoint)[0][network].to(case.device)
        set_input_size([net], case.shape)
        batch = SyntheticBatch(cfg, net, case.batch, case.shape, case.device)
        if precision == 'converted':
            convert_to_bfloat16(net)
        call = batch.inference_call(net, precision) if case.mode == 'inference' else batch.training_call(net, precision)
        return memory_growth(lambda: [call() for _ in range(3)], case.device)
