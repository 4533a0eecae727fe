"""The machine a run is on: its device, its processes, its disk."""

import atexit
import ctypes
import os
import shutil
import warnings
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import mmengine.device.utils as devices
import torch
from mmengine.config import Config
from mmengine.logging import MMLogger

from replk_mm import register_configs
from replk_mm.checkpoints.io import register_safe_loaders
from replk_mm.errors import UserError, command_line
from replk_mm.logs import limit_terminal, log_python_warnings


@dataclass
class RunOptions:
    """What a command line may say of a run.

    Attributes:
        data_root: Folder of the data set; None for the config's.
        classes: Names of the classes, see :func:`replk_mm.data.classes.use_classes`; None for the config's.
        work_dir: Where logs and checkpoints go; None for ``work_dirs/CONFIG``.
        max_iters: Train for so many iterations; None for the config's schedule.
        resume: ``'auto'`` for the last checkpoint of the work dir, or a checkpoint; None starts anew.
        pretrained: Checkpoint for the backbone, ``'none'`` for random weights, None for the config's.
        amp: ``'bf16'``, ``'fp16'`` or None.
        device: ``'cpu'``, ``'cuda'``, ``'cuda:N'``, or None for what is there.
        seed: Of all randomness; None draws one and records it.
        launcher: ``'none'``, ``'pytorch'``, ``'slurm'`` or ``'mpi'``.
    """

    data_root: str | None = None
    classes: str | None = None
    work_dir: str | None = None
    max_iters: int | None = None
    resume: str | None = None
    pretrained: str | None = None
    amp: str | None = None
    device: str | None = None
    seed: int | None = None
    launcher: str = 'none'


def select_device(name: str | None) -> str:
    """Make ``name`` the device that everything after uses.

    Returns:
        ``'cpu'`` or ``'cuda'``.

    Raises:
        UserError: If the device does not exist.
    """
    kind, colon, index = (name or '').partition(':')
    if kind not in ('', 'cpu', 'cuda') or (colon and not (kind == 'cuda' and index.isdigit())):
        raise UserError(f'--device {name}: unknown; use cpu, cuda or cuda:N')
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
    devices.DEVICE = chosen  # mmengine has looked for a GPU when it was imported, and asks nobody afterwards
    return chosen


def keep_freed_memory(keep: bool = True) -> bool:
    """Let the C library keep freed memory for the next tensor instead of handing it back to the system.

    Every activation of more than a few MiB is otherwise mapped, faulted in page by page and unmapped again: a fifth of
    an inference on a CPU. For the commands of this project; a library does not change the process that imports it.

    Args:
        keep: False for the state that glibc reaches by itself: blocks beyond 32 MiB are mapped on their own, and 64 MiB
            of free memory at the end of the heap are kept.

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
    """Processes of the whole run, and of this machine, as torchrun or Slurm announce them."""

    def announced(*names: str) -> int:
        return next((int(os.environ[name]) for name in names if os.environ.get(name, '').isdigit()), 1)

    if launcher == 'none':
        return 1, 1
    total = announced('WORLD_SIZE', 'SLURM_NTASKS', 'OMPI_COMM_WORLD_SIZE')
    return total, min(total, announced('LOCAL_WORLD_SIZE', 'SLURM_NTASKS_PER_NODE', 'OMPI_COMM_WORLD_LOCAL_SIZE'))


def init_gloo(cfg: Config, device: str) -> None:
    """Start the process group of a run that torchrun started on CPUs.

    A collective that waits longer than ``env_cfg.dist_cfg.timeout`` seconds (default: 10 minutes, as NCCL's; gloo's own
    is half an hour) ends the process with an error.

    Raises:
        UserError: If torchrun did not start this process.
    """
    # mmengine 0.10.7 selects a CUDA device whatever the backend; a process group that exists is left alone.
    if cfg.launcher == 'pytorch' and device == 'cpu' and not torch.distributed.is_initialized():
        if 'RANK' not in os.environ:
            raise UserError(
                '--launcher pytorch: no RANK in the environment\n'
                'Start it with: torchrun --nproc-per-node N -m replk_mm train CONFIG --launcher pytorch'
            )
        seconds = ((cfg.get('env_cfg') or {}).get('dist_cfg') or {}).get('timeout', 600)
        torch.distributed.init_process_group('gloo', timeout=timedelta(seconds=seconds))
        atexit.register(_leave)  # its threads, still waiting when Python ends, may abort the process


def _leave() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of torch or Python means that there is too little memory."""
    return (
        isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError))
        or isinstance(error, RuntimeError)
        and any(words in str(error) for words in ('out of memory', 'not enough memory', "can't allocate memory"))
    )


def prepare_work_dir(path: str | Path, needed: int = 0, option: str = '--work-dir') -> Path:
    """Create a folder and see that it can be written to and that ``needed`` bytes fit.

    Args:
        path: The folder.
        needed: Bytes that must be free.
        option: What named it on the command line.

    Raises:
        UserError: If not.
    """
    folder = Path(path)
    what = f'{option[2:].replace("-", " ")} {folder}'
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f'.write-test-{os.getpid()}'
        probe.write_bytes(b'0')
        probe.unlink()
    except OSError as error:
        raise UserError(
            f'{what}: cannot be written to ({error.strerror})\nChoose another with {option} DIR.'
        ) from error
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f'{what}: {free / 2**30:.2f} GiB free; a checkpoint takes {needed / 2**30:.2f} GiB\n'
            f'Make room, or choose another place with {option} DIR.'
        )
    return folder


def setup_process() -> None:
    """Settings of a whole process, which every command makes once at its start and importing this package never does.

    mmengine loads checkpoints without running code in them, configs inherit ours as ``replk_mm::NAME.py``, the C
    library keeps freed memory, and the terminal shows less than the log file.
    """
    register_safe_loaders()
    register_configs()
    keep_freed_memory()
    for category in (FutureWarning, DeprecationWarning):
        warnings.filterwarnings('ignore', category=category)
    limit_terminal(MMLogger.get_current_instance())
    log_python_warnings()
