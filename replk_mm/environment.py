"""What this machine has, what the project needs, and what works: the report behind ``tools/doctor.py``.

Standard library only, so that it can report that torch or mmengine is missing.
"""
import contextlib
import os
import platform
import re
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from replk_mm.install.probes import run_probe
from replk_mm.install.requirements import (
    REQUIREMENTS,
    Requirement,
    build_mmcv,
    fix_for,
    in_range,
    make_setup,
    reinstall,
)

GIB = 2**30


Machine = dict[str, Any]

INSTRUCTION_SETS = ('avx2', 'avx512f', 'avx512_bf16', 'amx_tile', 'amx_bf16')


@dataclass
class Finding:
    """One line of the report: what was looked at, what was found, and the command that mends it."""

    name: str
    status: str
    found: str = ''
    required: str = ''
    fix: str = ''


@dataclass
class Report:
    """Everything the doctor says."""

    python: str
    executable: str
    dependencies: list[Finding]
    operators: list[Finding]
    machine: Machine
    abilities: list[Finding]

    @property
    def healthy(self) -> bool:
        """Whether segmentation and detection both work."""
        return all(a.status == 'ok' for a in self.abilities if a.name in ('segmentation', 'detection'))

    def as_dict(self) -> dict:
        """The report as plain data, ``healthy`` included."""
        return {**asdict(self), 'healthy': self.healthy}


def check_dependency(requirement: Requirement) -> Finding:
    """Look for a distribution without importing it."""
    versions = []
    for name in (requirement.name, *requirement.instead):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions.append(metadata.version(name))
    if find_spec(requirement.module) is None:
        status = 'missing'
    elif versions and not in_range(versions[0], requirement.at_least, requirement.below):
        status = 'outside range'
    else:
        status = 'ok'
    return Finding(requirement.name, status, versions[0] if versions and status != 'missing' else '-',
                   requirement.range or 'any', '' if status == 'ok' else fix_for(requirement))


def examine() -> Report:
    """Look at everything. Takes some seconds: the packages are imported and run, each in a process of its own."""
    names = ('torch', 'ops', 'segmentation', 'detection')
    with ThreadPoolExecutor(max_workers=2) as pool:
        answers = dict(zip(names, pool.map(run_probe, names), strict=True))
    dependencies = [check_dependency(requirement) for requirement in REQUIREMENTS]
    operators = check_operators(answers['ops'], answers['torch'])
    abilities = [check_ability(name, answers[name], dependencies, operators) for name in ('segmentation', 'detection')]
    abilities += [check_gpu(answers['torch'], operators), check_export(dependencies)]
    machine = describe_machine(answers['torch'])
    return Report(platform.python_version(), sys.executable, dependencies, operators, machine, abilities)


def check_operators(ops: dict, torch: dict) -> list[Finding]:
    """One finding a device: whether mmcv's compiled operator ran there."""
    if not ops['ok']:
        if not torch['ok'] and find_spec('torch'):
            return [Finding('cpu', 'no', torch['error'], fix=reinstall('torch'))]
        installed = find_spec('torch') and find_spec('mmcv')
        return [Finding('cpu', 'no', ops['error'], fix=build_mmcv() if installed else make_setup())]
    models = {device['name']: device['model'] for device in torch.get('devices', ())}
    return [Finding(device, 'ok', models.get(device, '')) if answer == 'ok' else
            Finding(device, 'no', answer, fix=build_mmcv())
            for device, answer in ops['devices'].items()]


def check_ability(name: str, answer: dict, dependencies: list[Finding], operators: list[Finding]) -> Finding:
    """Whether the probe of ``name`` ran; if not, the fix is that of the first broken thing it needs."""
    if answer['ok']:
        return Finding(name, 'ok')
    needed = {requirement.name for requirement in REQUIREMENTS if requirement.needed_for in ('everything', name)}
    broken = [finding for finding in dependencies if finding.name in needed and finding.status != 'ok']
    broken += [finding for finding in operators if finding.name == 'cpu' and finding.status != 'ok']
    package = next(requirement.name for requirement in REQUIREMENTS if requirement.needed_for == name)
    return Finding(name, 'no', answer['error'], fix=broken[0].fix if broken else reinstall(package))


def check_gpu(torch: dict, operators: list[Finding]) -> Finding:
    """Whether torch sees a CUDA device and mmcv's operators run on all of them."""
    if not torch['ok']:
        return Finding('gpu', 'no', torch['error'])
    if not torch['devices']:
        blind = f'torch is built for CUDA {torch["cuda"]}, but sees no device'
        # No fix to run: a build for CUDA is several gigabytes, and of use only where there is a GPU.
        release = torch['version'].split('+')[0]
        plain = f'torch {torch["version"]} is a CPU build; for a GPU, make setup TORCH="torch=={release}"'
        return Finding('gpu', 'no', blind if torch['cuda'] else plain)
    failing = [finding for finding in operators if finding.name != 'cpu' and finding.status != 'ok']
    if failing:
        return Finding('gpu', 'no', f"mmcv's operators fail on {failing[0].name}", fix=failing[0].fix)
    return Finding('gpu', 'ok', ', '.join(f'{d["model"]} ({d["memory_gib"]:.0f} GiB)' for d in torch['devices']))


def check_export(dependencies: list[Finding]) -> Finding:
    """Whether what exporting a network needs is installed; it is not part of the set-up."""
    needed = {requirement.name for requirement in REQUIREMENTS if requirement.needed_for == 'export'}
    missing = [finding.name for finding in dependencies if finding.name in needed and finding.status != 'ok']
    if not missing:
        return Finding('export', 'ok')
    return Finding('export', 'no', f'not installed: {", ".join(missing)}',
                   fix=f'{sys.executable} -m pip install {" ".join(missing)}')


def describe_machine(torch: dict) -> Machine:
    """Processors, instruction sets, memory and disk. Values that this system does not tell are None or empty."""
    cpuinfo, meminfo = (_read(f'/proc/{name}') for name in ('cpuinfo', 'meminfo'))
    flags = set((re.search(r'^flags\s*:(.*)$', cpuinfo, re.MULTILINE) or [''] * 2)[1].split())
    amounts = re.findall(r'^(MemTotal|MemAvailable):\s+(\d+) kB', meminfo, re.MULTILINE)
    memory = {name: int(amount) / 2**20 for name, amount in amounts}
    disk = shutil.disk_usage('.')
    return {
        'system': platform.platform(),
        'logical_cpus': os.cpu_count(),
        'usable_cpus': len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count(),
        'torch_threads': torch.get('threads'),
        'torch_capability': torch.get('capability'),
        'instruction_sets': [name for name in INSTRUCTION_SETS if name in flags],
        'memory_gib': memory.get('MemTotal'),
        'memory_available_gib': memory.get('MemAvailable'),
        'disk_free_gib': disk.free / GIB,
        'disk_path': str(Path.cwd()),
    }


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ''


def format_report(report: Report) -> str:
    """The report as aligned text, ending in the commands that mend what does not work."""
    machine = report.machine
    instructions = ' '.join(machine['instruction_sets']) or 'unknown'
    tables: list[list[tuple[str, ...]]] = [
        [('Dependency', 'Status', 'Found', 'Required'),
         *((f.name, f.status, f.found, f.required) for f in report.dependencies)],
        [("mmcv's operators", 'Status', ''), *((f.name, f.status, f.found) for f in report.operators)],
        [('Machine', machine['system']),
         ('processors', f'{machine["logical_cpus"]} logical, {machine["usable_cpus"]} usable, '
                        f'{machine["torch_threads"] or "unknown"} torch threads'),
         ('instructions', f'{instructions}; torch uses {machine["torch_capability"] or "unknown"}'),
         ('memory', f'{_gib(machine["memory_available_gib"])} free of {_gib(machine["memory_gib"])}'),
         ('disk', f'{_gib(machine["disk_free_gib"])} free at {machine["disk_path"]}')],
        [('What works', 'Status', ''), *((f.name, f.status, f.found) for f in report.abilities)],
    ]
    mends: dict[str, list[str]] = {}
    for finding in (*report.dependencies, *report.operators, *report.abilities):
        if finding.fix:
            mends.setdefault(finding.fix, []).append(finding.name)
    if mends:
        tables.append([('Run', 'to mend'), *((fix, ', '.join(dict.fromkeys(names))) for fix, names in mends.items())])
    return '\n\n'.join([f'Python {report.python} ({report.executable})', *map(_table, tables)])


def _table(rows: list[tuple[str, ...]]) -> str:
    """Rows with aligned columns, the first row underlined."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ['  '.join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return '\n'.join([lines[0], '-' * min(100, max(map(len, lines))), *lines[1:]])


def _gib(amount: float | None) -> str:
    return 'unknown' if amount is None else f'{amount:.1f} GiB'
