"""What this machine has, what the project needs, and what works: the report of ``tools/doctor.py``.

Imports the standard library only, so that it can report that torch or mmengine is missing. Each probe runs in its own
process: a missing module, a binary that does not fit or a crash becomes a line of the report.
"""

import contextlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
INSTRUCTION_SETS = ('avx2', 'avx512f', 'avx512_bf16', 'amx_tile', 'amx_bf16')


@dataclass(frozen=True)
class Requirement:
    """A distribution, the module it provides, and the versions known to work."""

    name: str
    module: str
    range: str = ''
    needed_for: str = 'everything'


#: The ranges of pyproject.toml, and those of the dependencies that the user installs.
REQUIREMENTS = (
    Requirement('torch', 'torch', '>=2.4,<3'),
    Requirement('numpy', 'numpy', '>=1.22,<3'),
    Requirement('mmengine', 'mmengine', '>=0.10.4,<1'),
    Requirement('mmcv', 'mmcv', '>=2.0.1,<2.2'),
    Requirement('setuptools', 'pkg_resources', '<80'),
    Requirement('opencv-python', 'cv2', '>=3'),
    Requirement('PyYAML', 'yaml'),
    Requirement('Jinja2', 'jinja2'),
    Requirement('matplotlib', 'matplotlib'),
    Requirement('psutil', 'psutil'),
    Requirement('pydantic', 'pydantic', '>=2'),
    Requirement('rich', 'rich'),
    Requirement('safetensors', 'safetensors', '>=0.4.3'),
    Requirement('mmsegmentation', 'mmseg', '>=1.2,<2', 'segmentation'),
    Requirement('ftfy', 'ftfy', needed_for='segmentation'),
    Requirement('regex', 'regex', needed_for='segmentation'),
    Requirement('mmdet', 'mmdet', '>=3.3,<4', 'detection'),
    Requirement('pycocotools', 'pycocotools', needed_for='detection'),
    Requirement('onnx', 'onnx', needed_for='export'),
    Requirement('onnxruntime', 'onnxruntime', needed_for='export'),
)


@dataclass
class Finding:
    """One line of the report: what was checked, what was found, and the command that repairs it."""

    name: str
    status: str
    found: str = ''
    required: str = ''
    fix: str = ''


@dataclass
class Report:
    """Everything the doctor prints."""

    python: str
    executable: str
    dependencies: list[Finding]
    operators: list[Finding]
    machine: dict[str, Any]
    abilities: list[Finding]

    @property
    def healthy(self) -> bool:
        """Whether segmentation and detection both work."""
        return all(a.status == 'ok' for a in self.abilities if a.name in ('segmentation', 'detection'))

    def as_dict(self) -> dict:
        """The report as plain data, ``healthy`` included."""
        return {**asdict(self), 'healthy': self.healthy}


def examine() -> Report:
    """Check everything. Takes some seconds: the packages are imported and run."""
    names = ('torch', 'ops', 'segmentation', 'detection')
    with ThreadPoolExecutor(max_workers=2) as pool:
        answers = dict(zip(names, pool.map(run_probe, names), strict=True))
    dependencies = [check_dependency(requirement) for requirement in REQUIREMENTS]
    operators = check_operators(answers['ops'], answers['torch'])
    abilities = [check_ability(name, answers[name], dependencies, operators) for name in ('segmentation', 'detection')]
    abilities += [check_gpu(answers['torch'], operators), check_export(dependencies)]
    return Report(
        platform.python_version(),
        sys.executable,
        dependencies,
        operators,
        describe_machine(answers['torch']),
        abilities,
    )


# -- dependencies -----------------------------------------------------------------------------------------------------
def in_range(version: str, specifier: str) -> bool:
    """Whether a version satisfies a specifier of ``>=`` and ``<`` parts; an empty one holds always."""

    def number(text: str) -> tuple[int, ...]:
        found = re.match(r'\d+(\.\d+)*', text)
        parts = tuple(map(int, found.group(0).split('.'))) if found else ()
        return (*parts, *(0,) * 8)[:8]

    return all(
        number(version) >= number(part[2:]) if part.startswith('>=') else number(version) < number(part[1:])
        for part in specifier.split(',')
        if part
    )


def check_dependency(requirement: Requirement) -> Finding:
    """Find a distribution, or another one that provides the same module, without importing it."""
    version = ''
    for name in (requirement.name, *metadata.packages_distributions().get(requirement.module, ())):
        with contextlib.suppress(metadata.PackageNotFoundError):
            version = version or metadata.version(name)
    if find_spec(requirement.module) is None:
        status, version = 'missing', ''
    else:
        status = 'ok' if not version or in_range(version, requirement.range) else 'outside range'
    return Finding(
        requirement.name,
        status,
        version or '-',
        requirement.range or 'any',
        '' if status == 'ok' else fix_for(requirement),
    )


def fix_for(requirement: Requirement, broken: bool = False) -> str:
    """The command that installs a requirement into this environment.

    Args:
        requirement: What is missing; those of the export have one command together, see :func:`check_export`.
        broken: Whether it is installed and does not work.
    """
    if requirement.needed_for == 'export':
        return ''
    # The project's own environment, or none. In any other one the user chose the packages, torch above all.
    managed = Path(sys.prefix) == ROOT / '.venv' or sys.prefix == sys.base_prefix and 'CONDA_PREFIX' not in os.environ
    if requirement.name == 'mmcv' and (broken or not managed):
        return f'{sys.executable} {ROOT / "scripts" / "build_mmcv.py"}'
    if managed:
        return f'make -C {ROOT} {"distclean setup" if broken else "setup"}'
    return (
        f'{sys.executable} -m pip install {"--force-reinstall --no-deps " if broken else ""}'
        f"'{requirement.name}{requirement.range}'"
    )


# -- what works -------------------------------------------------------------------------------------------------------
def check_operators(ops: dict, torch: dict) -> list[Finding]:
    """One finding a device: whether mmcv's compiled operator ran there."""
    mmcv = next(requirement for requirement in REQUIREMENTS if requirement.name == 'mmcv')
    if not ops['ok']:
        cause = mmcv if torch['ok'] else REQUIREMENTS[0]
        return [Finding('cpu', 'no', ops['error'], fix=fix_for(cause, broken=find_spec(cause.module) is not None))]
    models = {device['name']: device['model'] for device in torch.get('devices', ())}
    return [
        Finding(device, 'ok', models.get(device, ''))
        if answer == 'ok'
        else Finding(device, 'no', answer, fix=fix_for(mmcv, broken=True))
        for device, answer in ops['devices'].items()
    ]


def check_ability(name: str, answer: dict, dependencies: list[Finding], operators: list[Finding]) -> Finding:
    """Whether the probe of ``name`` ran; if not, the fix is that of the first broken thing it needs."""
    if answer['ok']:
        return Finding(name, 'ok')
    needed = [requirement for requirement in REQUIREMENTS if requirement.needed_for in ('everything', name)]
    names = {'cpu', *(requirement.name for requirement in needed)}
    fixes = [finding.fix for finding in (*dependencies, *operators) if finding.name in names and finding.status != 'ok']
    package = next(requirement for requirement in needed if requirement.needed_for == name)
    return Finding(name, 'no', answer['error'], fix=fixes[0] if fixes else fix_for(package, broken=True))


def check_gpu(torch: dict, operators: list[Finding]) -> Finding:
    """Whether torch sees a CUDA device and mmcv's operators run on all of them."""
    if not torch['ok']:
        return Finding('gpu', 'no', torch['error'])
    if not torch['devices']:
        # No fix to run: a build for CUDA is several gigabytes, and of use only where there is a GPU.
        return Finding(
            'gpu',
            'no',
            f'torch is built for CUDA {torch["cuda"]}, but sees no device'
            if torch['cuda']
            else f'torch {torch["version"]} is a CPU build; for a GPU, '
            f'make setup TORCH="torch=={torch["version"].split("+")[0]}"',
        )
    failing = [finding for finding in operators if finding.name != 'cpu' and finding.status != 'ok']
    if failing:
        return Finding('gpu', 'no', f"mmcv's operators fail on {failing[0].name}", fix=failing[0].fix)
    return Finding('gpu', 'ok', ', '.join(f'{d["model"]} ({d["memory_gib"]:.0f} GiB)' for d in torch['devices']))


def check_export(dependencies: list[Finding]) -> Finding:
    """Whether what exporting a network needs is installed; ``make setup`` does not install it."""
    needed = {requirement.name for requirement in REQUIREMENTS if requirement.needed_for == 'export'}
    missing = [finding.name for finding in dependencies if finding.name in needed and finding.status != 'ok']
    if not missing:
        return Finding('export', 'ok')
    return Finding(
        'export',
        'no',
        f'not installed: {", ".join(missing)}',
        fix=f'{sys.executable} -m pip install {" ".join(missing)}',
    )


def describe_machine(torch: dict[str, Any] | None = None) -> dict[str, Any]:
    """Processors, instruction sets, memory and disk; None where this system or a missing psutil does not tell.

    Args:
        torch: The answer of the probe ``'torch'``, for its threads and instruction sets.
    """
    try:
        import psutil

        memory = psutil.virtual_memory()
    except ImportError:
        memory = None
    cpuinfo = Path('/proc/cpuinfo')
    flags = re.search(r'^flags\s*:(.*)$', cpuinfo.read_text() if cpuinfo.is_file() else '', re.MULTILINE)
    known = set(flags.group(1).split()) if flags else set()
    return {
        'system': platform.platform(),
        'logical_cpus': os.cpu_count(),
        'usable_cpus': len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count(),
        'torch_threads': (torch or {}).get('threads'),
        'torch_capability': (torch or {}).get('capability'),
        'instruction_sets': [name for name in INSTRUCTION_SETS if name in known],
        'memory_gib': memory and memory.total / 2**30,
        'memory_available_gib': memory and memory.available / 2**30,
        'disk_free_gib': shutil.disk_usage('.').free / 2**30,
        'disk_path': str(Path.cwd()),
    }


# -- probes -----------------------------------------------------------------------------------------------------------
def probe_torch() -> dict[str, Any]:
    """Version, threads and devices of torch."""
    import torch

    devices = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        device = torch.cuda.get_device_properties(index)
        devices.append({'name': f'cuda:{index}', 'model': device.name, 'memory_gib': device.total_memory / 2**30})
    return {
        'version': torch.__version__,
        'cuda': torch.version.cuda,
        'threads': torch.get_num_threads(),
        'capability': torch.backends.cpu.get_cpu_capability(),
        'devices': devices,
    }


def probe_ops() -> dict[str, Any]:
    """Suppress one of three boxes by mmcv's compiled operator; ``devices`` maps each device to ``'ok'`` or an error."""
    import torch
    from mmcv.ops import nms

    boxes = torch.tensor([[0.0, 0.0, 10.0, 10.0], [1.0, 1.0, 11.0, 11.0], [20.0, 20.0, 30.0, 30.0]])
    scores = torch.tensor([0.9, 0.8, 0.7])
    devices = ['cpu'] + [f'cuda:{i}' for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0)]
    report = {}
    for device in devices:
        try:
            # The first two overlap by 81 / 119, so the second has to go.
            _, kept = nms(boxes.to(device), scores.to(device), iou_threshold=0.5)
            report[device] = 'ok' if kept.tolist() == [0, 2] else f'nms kept boxes {kept.tolist()} instead of [0, 2]'
        except Exception as error:
            report[device] = _one_line(error)
    return {'devices': report}


def probe_segmentation() -> dict[str, Any]:
    """Import mmseg and run its UperNet head on four feature maps."""
    import mmseg.apis
    import torch
    from mmseg.registry import MODELS
    from mmseg.utils import register_all_modules

    register_all_modules()
    head = MODELS.build(
        {
            'type': 'UPerHead',
            'in_channels': [4] * 4,
            'in_index': [0, 1, 2, 3],
            'channels': 4,
            'num_classes': 3,
            'norm_cfg': {'type': 'BN'},
            'align_corners': False,
        }
    ).eval()
    head([torch.zeros(1, 4, side, side) for side in (16, 8, 4, 2)])
    return {'version': mmseg.__version__}


def probe_detection() -> dict[str, Any]:
    """Import mmdet, pool a region from a feature map, and encode a mask with pycocotools."""
    import mmdet.apis
    import numpy as np
    import torch
    from mmdet.registry import MODELS
    from mmdet.utils import register_all_modules
    from pycocotools import mask

    register_all_modules()
    pool = MODELS.build(
        {
            'type': 'SingleRoIExtractor',
            'roi_layer': {'type': 'RoIAlign', 'output_size': 7},
            'out_channels': 4,
            'featmap_strides': [4],
        }
    )
    pool([torch.zeros(1, 4, 16, 16)], torch.tensor([[0.0, 0.0, 0.0, 20.0, 20.0]]))
    mask.encode(np.asfortranarray(np.ones((3, 5), np.uint8)))
    return {'version': mmdet.__version__}


PROBES: dict[str, Callable[[], dict[str, Any]]] = {
    'torch': probe_torch,
    'ops': probe_ops,
    'segmentation': probe_segmentation,
    'detection': probe_detection,
}


def _one_line(error: BaseException) -> str:
    return f'{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else "no message"}'


def run_probe(name: str, python: str = sys.executable, timeout: float = 300) -> dict[str, Any]:
    """Run a probe in a fresh process of ``python``.

    Args:
        name: A key of :data:`PROBES`.
        python: The interpreter whose packages are probed.
        timeout: Seconds after which the probe counts as failed.

    Returns:
        What the probe found with ``ok=True``, or ``ok=False`` and ``error``, one line.
    """
    paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get('PYTHONPATH'))))
    try:
        done = subprocess.run(
            [python, '-m', 'replk_mm.environment', name],
            env={**os.environ, 'PYTHONPATH': paths},
            capture_output=True,
            text=True,
            timeout=timeout,
        )
    except subprocess.TimeoutExpired:
        return {'ok': False, 'error': f'no answer within {timeout:.0f} seconds'}
    try:
        return json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        last = (done.stderr.strip().splitlines() or ['no output'])[-1]
        ended = f'killed by signal {-done.returncode}' if done.returncode < 0 else f'exit status {done.returncode}'
        return {'ok': False, 'error': f'{ended}: {last}'}


# -- text -------------------------------------------------------------------------------------------------------------
def format_report(report: Report) -> str:
    """The report as aligned text, ending in the commands that repair what does not work."""
    machine = report.machine
    tables: list[list[tuple[str, ...]]] = [
        [
            ('Dependency', 'Status', 'Found', 'Required'),
            *((f.name, f.status, f.found, f.required) for f in report.dependencies),
        ],
        [("mmcv's operators", 'Status', ''), *((f.name, f.status, f.found) for f in report.operators)],
        [
            ('Machine', machine['system']),
            (
                'processors',
                f'{machine["logical_cpus"]} logical, {machine["usable_cpus"]} usable, '
                f'{machine["torch_threads"] or "unknown"} torch threads',
            ),
            (
                'instructions',
                f'{" ".join(machine["instruction_sets"]) or "unknown"}; '
                f'torch uses {machine["torch_capability"] or "unknown"}',
            ),
            ('memory', f'{_gib(machine["memory_available_gib"])} free of {_gib(machine["memory_gib"])}'),
            ('disk', f'{_gib(machine["disk_free_gib"])} free at {machine["disk_path"]}'),
        ],
        [('What works', 'Status', ''), *((f.name, f.status, f.found) for f in report.abilities)],
    ]
    repairs: dict[str, list[str]] = {}
    for finding in (*report.dependencies, *report.operators, *report.abilities):
        if finding.fix:
            repairs.setdefault(finding.fix, []).append(finding.name)
    if repairs:
        tables.append(
            [('Run', 'to repair'), *((fix, ', '.join(dict.fromkeys(names))) for fix, names in repairs.items())]
        )
    return '\n\n'.join([f'Python {report.python} ({report.executable})', *map(_table, tables)])


def _table(rows: list[tuple[str, ...]]) -> str:
    """Rows with aligned columns, the first row underlined; rich may be missing here."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ['  '.join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return '\n'.join([lines[0], '-' * min(100, max(map(len, lines))), *lines[1:]])


def _gib(amount: float | None) -> str:
    return 'unknown' if amount is None else f'{amount:.1f} GiB'


if __name__ == '__main__':  # a probe
    try:
        answer = {'ok': True, **PROBES[sys.argv[1]]()}
    except Exception as caught:
        answer = {'ok': False, 'error': _one_line(caught)}
    print('\n' + json.dumps(answer))
