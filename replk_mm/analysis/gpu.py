"""Precisions of a benchmark, and the state of the GPU that it runs on."""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

#: Data types of the tensors, by name of the precision.
DTYPES = {'float32': torch.float32, 'tf32': torch.float32, 'float16': torch.float16, 'bfloat16': torch.bfloat16}
#: Precisions that are measured on GPUs only.
GPU_PRECISIONS = ('tf32', 'float16')
#: What the first two mean.
PRECISION_NOTE = 'float32: without TF32, which torch uses for convolutions by default; tf32: with it, for products too'
#: Names in records, and the fields of ``nvidia-smi``: MHz, W and degrees Celsius.
_FIELDS = dict(
    driver='driver_version',
    sm_clock='clocks.sm',
    sm_clock_max='clocks.max.sm',
    memory_clock='clocks.mem',
    memory_clock_max='clocks.max.mem',
    power='power.draw',
    power_limit='power.limit',
    temperature='temperature.gpu',
)


@contextmanager
def matmul_precision(precision: str) -> Iterator[None]:
    """Compute float32 matrix products and convolutions on GPUs in TF32 for ``'tf32'``, in full float32 otherwise.

    By default torch uses TF32 for convolutions alone.
    """
    # The older of torch's two interfaces: it exists in all supported releases, and after the newer one, reading the
    # older one is an error.
    settings: Any = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [setting.allow_tf32 for setting in settings]
    try:
        for setting in settings:
            setting.allow_tf32 = precision == 'tf32'
        yield
    finally:
        for setting, value in zip(settings, before, strict=True):
            setting.allow_tf32 = value


def describe_gpu() -> dict[str, Any]:
    """The current GPU, and its clocks and power at this moment where ``nvidia-smi`` states them."""
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return dict(
        capability=f'{properties.major}.{properties.minor}',
        memory_gib=properties.total_memory / 2**30,
        cudnn=torch.backends.cudnn.version(),
        cudnn_benchmark=torch.backends.cudnn.benchmark,
        **query_nvidia_smi(f'GPU-{properties.uuid}'),
    )


def query_nvidia_smi(gpu: str) -> dict[str, str]:
    """Driver, clocks, power and temperature of a GPU as ``nvidia-smi`` prints them; empty if it is missing or fails.

    Args:
        gpu: UUID, such as ``'GPU-...'``. CUDA and ``nvidia-smi`` may number GPUs differently.
    """
    query = f'--query-gpu={",".join(_FIELDS.values())}'
    command = ['nvidia-smi', f'--id={gpu}', query, '--format=csv,noheader,nounits']
    try:
        line = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(zip(_FIELDS, line.split(', '), strict=True))
