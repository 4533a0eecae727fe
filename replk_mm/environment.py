"""Checks of the environment for the command ``doctor``: dependencies, compiled operators, machine, working tasks.

This module imports the standard library only, so that it can report that torch or mmengine is missing.
:mod:`replk_mm.probes` tells what works.
"""

import contextlib
import os
import platform
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from replk_mm.probes import ROOT, run_probe

INSTRUCTION_SETS = ('avx2', 'avx512f', 'avx512_bf16', 'amx_tile', 'amx_bf16')


@dataclass(frozen=True)
class Requirement:
    """A distribution, its module, and the range of versions that work."""

    name: str
    module: str
    range: str = ''
    needed_for: str = 'everything'


#: The ranges of pyproject.toml, and those of the dependencies that the user installs.
REQUIREMENTS = (
    Requirement('torch', 'torch', '>=2.5,<3'),
    Requirement('numpy', 'numpy', '>=1.22,<3'),
    Requirement('mmengine', 'mmengine', '>=0.10.4,<1'),
    Requirement('mmcv', 'mmcv', '>=2.0.1,<2.2'),
    Requirement('setuptools', 'pkg_resources', '<82'),
    Requirement('opencv-python', 'cv2', '>=3'),
    Requirement('PyYAML', 'yaml'),
    Requirement('Jinja2', 'jinja2'),
    Requirement('filelock', 'filelock'),
    Requirement('matplotlib', 'matplotlib'),
    Requirement('psutil', 'psutil'),
    Requirement('pydantic', 'pydantic', '>=2'),
    Requirement('rich', 'rich'),
    Requirement('safetensors', 'safetensors', '>=0.4.3'),
    Requirement('scipy', 'scipy', '>=1.15'),
    Requirement('mmsegmentation', 'mmseg', '>=1.2,<2', 'segmentation'),
    Requirement('ftfy', 'ftfy', needed_for='segmentation'),
    Requirement('regex', 'regex', needed_for='segmentation'),
    Requirement('mmdet', 'mmdet', '>=3.3,<4', 'detection'),
    Requirement('pycocotools', 'pycocotools', needed_for='detection'),
    Requirement('onnx', 'onnx', needed_for='export'),
    Requirement('onnxruntime', 'onnxruntime', needed_for='export'),
    Requirement('onnxscript', 'onnxscript', needed_for='export'),
)


@dataclass
class CheckResult:
    """One line of the report."""

    name: str  #: the checked item
    status: str  #: ``'ok'``, ``'missing'``, ``'outside range'``, ``'conflict'`` or ``'no'``
    found: str = ''  #: the installed version, or the error
    required: str = ''  #: the required range of versions
    fix: str = ''  #: the command that repairs it


@dataclass
class EnvironmentReport:
    """Results of all checks."""

    python: str
    executable: str
    dependencies: list[CheckResult]
    operators: list[CheckResult]
    machine: dict[str, Any]
    abilities: list[CheckResult]

    @property
    def healthy(self) -> bool:
        """Whether segmentation and detection both work."""
        return all(a.status == 'ok' for a in self.abilities if a.name in ('segmentation', 'detection'))

    def to_dict(self) -> dict:
        """The report as plain data, ``healthy`` included."""
        return {**asdict(self), 'healthy': self.healthy}


def check_environment() -> EnvironmentReport:
    """Run all checks. Takes some seconds, because packages are imported and run."""
    names = ['torch', 'ops', 'segmentation', 'detection', *(['torchvision'] if find_spec('torchvision') else [])]
    with ThreadPoolExecutor(max_workers=2) as pool:
        answers = dict(zip(names, pool.map(run_probe, names), strict=True))
    dependencies = [check_dependency(requirement) for requirement in REQUIREMENTS]
    if answers['torch']['ok'] and 'torchvision' in answers:
        dependencies.insert(1, check_torchvision(answers['torchvision']['ok']))
    operators = check_operators(answers['ops'], answers['torch'])
    abilities = [check_ability(name, answers[name], dependencies, operators) for name in ('segmentation', 'detection')]
    abilities += [check_gpu(answers['torch'], operators), check_export(dependencies)]
    return EnvironmentReport(
        platform.python_version(),
        sys.executable,
        dependencies,
        operators,
        describe_machine(answers['torch']),
        abilities,
    )


# -- dependencies -----------------------------------------------------------------------------------------------------
def in_range(version: str, specifier: str) -> bool:
    """Whether a version satisfies a specifier of ``>=`` and ``<`` parts; every version satisfies an empty one."""

    def release(text: str) -> tuple[int, ...]:
        found = re.match(r'\d+(\.\d+)*', text)
        parts = tuple(map(int, found.group(0).split('.'))) if found else ()
        return (*parts, *(0,) * 8)[:8]

    return all(
        release(version) >= release(part[2:]) if part.startswith('>=') else release(version) < release(part[1:])
        for part in specifier.split(',')
        if part
    )


def check_dependency(requirement: Requirement) -> CheckResult:
    """Check the version of a distribution, or of others with the same module, without importing it."""
    found = {}
    for name in (requirement.name, *metadata.packages_distributions().get(requirement.module, ())):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    version = next(iter(found.values()), '')
    if find_spec(requirement.module) is None:
        status, found = 'missing', {}
    elif requirement.name == 'mmcv' and len(found) > 1:  # the one installed last has overwritten the other
        status = 'conflict'
    else:
        status = 'ok' if not version or in_range(version, requirement.range) else 'outside range'
    return CheckResult(
        requirement.name,
        status,
        ', '.join(v if name == requirement.name else f'{v} ({name})' for name, v in found.items()) or '-',
        requirement.range or 'any',
        '' if status == 'ok' else install_command(requirement, broken=status == 'conflict'),
    )


def check_torchvision(works: bool) -> CheckResult:
    """Whether the installed torchvision fits torch. If not, packages that try to import it fail, such as mmseg."""
    torch, version, pip = metadata.version('torch'), metadata.version('torchvision'), f'{sys.executable} -m pip'
    # pip chooses the release for this torch, but cannot tell builds for a CPU from those for CUDA.
    same_release = f'torch=={torch.partition("+")[0]}' in (metadata.requires('torchvision') or ())
    repair = f'{pip} uninstall -y torchvision' if same_release else f"{pip} install 'torch=={torch}' torchvision"
    return CheckResult(
        'torchvision',
        'ok' if works else 'no',
        version,
        f'built for torch {torch}',
        '' if works else make_command('setup') or repair,
    )


def make_command(*arguments: str) -> str | None:
    """The ``make`` command that repairs this environment; None if ``make setup`` did not create it.

    Outside of any environment, it is the command that creates one.
    """
    folder = Path(sys.prefix)
    bare = sys.prefix == sys.base_prefix and 'CONDA_PREFIX' not in os.environ
    if not (ROOT / 'Makefile').is_file() or not (bare or folder.parent == ROOT):
        return None
    venv = [] if bare or folder.name == '.venv' else [f'VENV={folder.name}']
    return ' '.join(['make', '-C', str(ROOT), *arguments, *venv])


def install_command(requirement: Requirement, broken: bool = False) -> str:
    """The command that installs a requirement into this environment, and keeps the installed torch.

    Args:
        requirement: The distribution. Those for export share a command, see :func:`check_export`.
        broken: Whether it is installed but does not work.
    """
    if requirement.needed_for == 'export':
        return ''
    pip = f'{sys.executable} -m pip'
    if requirement.name == 'mmcv':  # one folder, two distributions: remove both before installing one
        clean = f'{pip} uninstall -y mmcv mmcv-lite && ' if broken else ''
        return make_command('setup', 'MMCV=lite') or f"{clean}{pip} install 'mmcv-lite{requirement.range}'"
    return make_command(*(['distclean'] if broken else []), 'setup') or (
        f"{pip} install {'--force-reinstall --no-deps ' if broken else ''}'{requirement.name}{requirement.range}'"
    )


# -- what works -------------------------------------------------------------------------------------------------------
def check_operators(ops: dict, torch: dict) -> list[CheckResult]:
    """Whether mmcv's operators run, one result per device."""
    mmcv = next(requirement for requirement in REQUIREMENTS if requirement.name == 'mmcv')
    if not ops['ok']:
        cause = mmcv if torch['ok'] else REQUIREMENTS[0]
        return [
            CheckResult(
                'cpu', 'no', ops['error'], fix=install_command(cause, broken=find_spec(cause.module) is not None)
            )
        ]
    models = {device['name']: device['model'] for device in torch.get('devices', ())}
    form = 'compiled' if ops['compiled'] else 'torch code'
    return [
        CheckResult(device, 'ok', ', '.join(filter(None, (form, models.get(device)))))
        if answer == 'ok'
        else CheckResult(device, 'no', answer, fix=install_command(mmcv, broken=True))
        for device, answer in ops['devices'].items()
    ]


def check_ability(
    name: str, answer: dict, dependencies: list[CheckResult], operators: list[CheckResult]
) -> CheckResult:
    """Whether the probe of a task ran. If not, the fix is that of the first broken requirement."""
    if answer['ok']:
        return CheckResult(name, 'ok')
    needed = [requirement for requirement in REQUIREMENTS if requirement.needed_for in ('everything', name)]
    names = {'cpu', 'torchvision', *(requirement.name for requirement in needed)}
    fixes = [finding.fix for finding in (*dependencies, *operators) if finding.name in names and finding.status != 'ok']
    package = next(requirement for requirement in needed if requirement.needed_for == name)
    return CheckResult(name, 'no', answer['error'], fix=fixes[0] if fixes else install_command(package, broken=True))


def check_gpu(torch: dict, operators: list[CheckResult]) -> CheckResult:
    """Whether torch sees a CUDA device, and mmcv's operators run on all devices."""
    if not torch['ok']:
        return CheckResult('gpu', 'no', torch['error'])
    if not torch['devices']:
        # No command: a CUDA build has several gigabytes, and there may be no GPU.
        return CheckResult(
            'gpu',
            'no',
            f'torch is built for CUDA {torch["cuda"]}, but sees no device'
            if torch['cuda']
            else f'torch {torch["version"]} is a CPU build; for a GPU, install a CUDA build',
        )
    failing = [finding for finding in operators if finding.name != 'cpu' and finding.status != 'ok']
    if failing:
        return CheckResult('gpu', 'no', f"mmcv's operators fail on {failing[0].name}", fix=failing[0].fix)
    return CheckResult('gpu', 'ok', ', '.join(f'{d["model"]} ({d["memory_gib"]:.0f} GiB)' for d in torch['devices']))


def check_export(dependencies: list[CheckResult]) -> CheckResult:
    """Whether the requirements of ONNX export are installed; ``make setup`` does not install them."""
    needed = {requirement.name for requirement in REQUIREMENTS if requirement.needed_for == 'export'}
    missing = [finding.name for finding in dependencies if finding.name in needed and finding.status != 'ok']
    if not missing:
        return CheckResult('export', 'ok')
    return CheckResult(
        'export',
        'no',
        f'not installed: {", ".join(missing)}',
        fix=make_command('setup', 'EXTRAS=onnx') or f'{sys.executable} -m pip install {" ".join(missing)}',
    )


def describe_machine(torch: dict[str, Any] | None = None) -> dict[str, Any]:
    """Processors, instruction sets, memory and disk; None for values that the system or a missing psutil hides.

    Args:
        torch: Result of the probe ``'torch'``, for its threads and instruction sets.
    """
    torch = torch or {}
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
        'torch_threads': torch.get('threads'),
        'torch_capability': torch.get('capability'),
        'instruction_sets': [name for name in INSTRUCTION_SETS if name in known],
        'memory_gib': memory and memory.total / 2**30,
        'memory_available_gib': memory and memory.available / 2**30,
        'disk_free_gib': shutil.disk_usage('.').free / 2**30,
        'disk_path': str(Path.cwd()),
    }


def git_state() -> dict[str, Any] | None:
    """Commit of the checkout that this package runs from, and whether files differ from it; None outside of one."""

    def ask(*arguments: str) -> str:
        command = ['git', '--no-optional-locks', '-C', str(ROOT), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        if Path(ask('rev-parse', '--show-toplevel')).resolve() == ROOT:
            return dict(commit=ask('rev-parse', 'HEAD'), dirty=bool(ask('status', '--porcelain')))
    return None


# -- text -------------------------------------------------------------------------------------------------------------
def format_report(report: EnvironmentReport) -> str:
    """Format the report as aligned text that ends with the commands for repair."""
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
            ('memory', f'{_format_gib(machine["memory_available_gib"])} free of {_format_gib(machine["memory_gib"])}'),
            ('disk', f'{_format_gib(machine["disk_free_gib"])} free at {machine["disk_path"]}'),
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
    return '\n\n'.join([f'Python {report.python} ({report.executable})', *map(_format_table, tables)])


def _format_table(rows: list[tuple[str, ...]]) -> str:
    """Format rows with aligned columns and an underlined head, without rich, which may be missing."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ['  '.join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return '\n'.join([lines[0], '-' * min(100, max(map(len, lines))), *lines[1:]])


def _format_gib(amount: float | None) -> str:
    return 'unknown' if amount is None else f'{amount:.1f} GiB'
