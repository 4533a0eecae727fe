"""Setup of a process: global settings, device, process group and work directory."""

import atexit
import ctypes
import gc
import os
import shutil
import tempfile
import warnings
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import mmengine.device.utils as devices
import torch
from mmengine.config import Config
from mmengine.logging import MMLogger
from PIL import EpsImagePlugin

from replk_mm import mmcv_ops, register_configs
from replk_mm.checkpoints.io import register_safe_loaders
from replk_mm.errors import UserError, command_line
from replk_mm.logs import limit_terminal, log_python_warnings


@dataclass
class RunOptions:
    """Command-line options of a run."""

    data_root: str | None = None  #: folder of the data set; None keeps that of the config
    #: names of the classes, see :func:`replk_mm.data.classes.use_classes`; None keeps those of the config
    classes: str | None = None
    work_dir: str | None = None  #: folder for logs and checkpoints; None means ``work_dirs/CONFIG``
    max_iters: int | None = None  #: number of iterations; None keeps the schedule of the config
    resume: str | None = None  #: ``'auto'`` for the last checkpoint of the work dir, or a path; None starts a new run
    pretrained: str | None = None  #: checkpoint for the backbone, ``'none'`` for random weights, None for the config's
    amp: str | None = None  #: ``'bf16'``, ``'fp16'`` or None
    device: str | None = None  #: ``'cpu'``, ``'cuda'``, ``'cuda:N'``, or None for a GPU if there is one
    seed: int | None = None  #: random seed; None draws and records one
    launcher: str = 'none'  #: ``'none'``, ``'pytorch'``, ``'slurm'`` or ``'mpi'``
    overwrite: bool = False  #: whether a new training replaces the one in ``work_dir``
    fraction: int = 100  #: percentage of the training images, see :func:`replk_mm.data.subsets.use_subset`
    hold_out: bool = False  #: whether to validate on held-out training images instead of the validation images


def select_device(name: str | None) -> str:
    """Make ``name`` the device of this process.

    Returns:
        ``'cpu'`` or ``'cuda'``.

    Raises:
        UserError: If the device does not exist.
    """
    kind, colon, index = (name or '').partition(':')
    if kind not in ('', 'cpu', 'cuda') or (colon and not (kind == 'cuda' and index.isdigit())):
        raise UserError(f'--device {name}: unknown device\nUse cpu, cuda or cuda:N.')
    if kind == 'cuda':
        count = torch.cuda.device_count()
        if int(index or 0) >= count:
            raise UserError(
                f'--device {name}: torch {torch.__version__} finds {count} GPUs\n'
                f'Use --device cpu; {command_line("doctor")} lists the devices.'
            )
        if index:
            torch.cuda.set_device(int(index))
    chosen = kind or ('cuda' if torch.cuda.is_available() else 'cpu')
    devices.DEVICE = chosen  # mmengine chooses it once, when it is imported
    return chosen


def keep_freed_memory(keep: bool = True) -> bool:
    """Let the C library keep freed memory for the next tensor instead of handing it back to the system.

    Otherwise every activation of more than a few MiB is mapped, faulted in page by page and unmapped. On a CPU this
    takes a fifth of an inference. Only commands call this: importing the package does not change a process.

    Args:
        keep: False restores glibc's dynamic limits: it maps blocks beyond 32 MiB and keeps 64 MiB of free heap.

    Returns:
        Whether the C library (glibc) has these settings.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    trim_threshold, mmap_threshold, largest = -1, -3, 2**31 - 1
    return all(
        [
            mallopt(mmap_threshold, largest if keep else 32 * 2**20),
            mallopt(trim_threshold, largest if keep else 64 * 2**20),
        ]
    )


def processes_of(launcher: str) -> tuple[int, int]:
    """Number of processes of the whole run and of this machine, from the environment of torchrun, Slurm or MPI."""

    def announced(*names: str) -> int:
        return next((int(os.environ[name]) for name in names if os.environ.get(name, '').isdigit()), 1)

    if launcher == 'none':
        return 1, 1
    total = announced('WORLD_SIZE', 'SLURM_NTASKS', 'OMPI_COMM_WORLD_SIZE')
    return total, min(total, announced('LOCAL_WORLD_SIZE', 'SLURM_NTASKS_PER_NODE', 'OMPI_COMM_WORLD_LOCAL_SIZE'))


def init_gloo(cfg: Config, device: str) -> None:
    """Initialize the process group of a run on CPUs that torchrun or srun started.

    A collective that takes longer than ``env_cfg.dist_cfg.timeout`` seconds ends the process with an error. The default
    is 10 minutes, as for NCCL.

    Raises:
        UserError: If they did not start this process.
    """
    # mmengine 0.10.7 selects a CUDA device for any backend, but keeps an existing process group.
    starts = dict(pytorch=('RANK', 'torchrun --nproc-per-node N'), slurm=('SLURM_PROCID', 'srun --ntasks N python'))
    if cfg.launcher in starts and device == 'cpu' and not torch.distributed.is_initialized():
        name, start = starts[cfg.launcher]
        if name not in os.environ:
            raise UserError(
                f'--launcher {cfg.launcher}: no {name} in the environment\n'
                f'Start it with: {start} -m replk_mm train CONFIG --launcher {cfg.launcher}'
            )
        if cfg.launcher == 'slurm':
            os.environ.update(RANK=os.environ[name], WORLD_SIZE=os.environ['SLURM_NTASKS'])
            os.environ.setdefault('MASTER_ADDR', os.environ.get('SLURM_LAUNCH_NODE_IPADDR', 'localhost'))
            os.environ.setdefault('MASTER_PORT', '29500')
        seconds = ((cfg.get('env_cfg') or {}).get('dist_cfg') or {}).get('timeout', 600)
        torch.distributed.init_process_group('gloo', timeout=timedelta(seconds=seconds))
        atexit.register(_leave)


def _leave() -> None:
    """Destroy the process group and its threads: one that still holds tensors may abort Python at its exit."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
        gc.collect()  # the runner refers to itself and to the group, whose threads end with the last reference


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch or Python raised ``error`` for lack of memory."""
    return (
        isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError))
        or isinstance(error, RuntimeError)
        and any(words in str(error) for words in ('out of memory', 'not enough memory', "can't allocate memory"))
    )


def prepare_work_dir(path: str | Path, needed: int = 0, option: str = '--work-dir') -> Path:
    """Create a folder, and check that it is writable and has space for ``needed`` bytes.

    Args:
        path: The folder.
        needed: Required free bytes.
        option: The folder's name on the command line, for messages.

    Raises:
        UserError: If the folder cannot be used.
    """
    folder = Path(path)
    what = f'{option} {folder}'
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(b'0')
    except OSError as error:
        raise UserError(f'{what}: cannot be written to ({error.strerror})\nChoose another folder.') from error
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f'{what}: {free / 2**30:.2f} GiB free; a checkpoint takes {needed / 2**30:.2f} GiB\n'
            'Free disk space, or choose another folder.'
        )
    return folder


def setup_process() -> None:
    """Set up the process of a command. Importing this package does none of this.

    mmcv without compiled operators uses those of :mod:`replk_mm.mmcv_ops`, mmengine loads checkpoints without running
    code in them, configs inherit ours as ``replk_mm::NAME.py``, the C library keeps freed memory, and the terminal
    shows less than the log file. Pillow runs no Ghostscript.
    """
    mmcv_ops.install()
    register_safe_loaders()
    EpsImagePlugin.gs_binary = False  # a .png of somebody else may be a PostScript program
    register_configs()
    keep_freed_memory()
    for category in (FutureWarning, DeprecationWarning):
        warnings.filterwarnings('ignore', category=category)
    limit_terminal(MMLogger.get_current_instance())
    log_python_warnings()
