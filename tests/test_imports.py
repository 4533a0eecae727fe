"""Imports go down only: a package imports those below it, inside functions too, and files form no cycles."""

import ast
import importlib
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
#: Top to bottom. Entries of one line do not import each other.
FLOORS = (
    ('__main__',),
    ('commands',),
    ('cli',),
    ('bench',),
    ('analysis',),
    ('engine',),
    ('evaluation', 'reparam', 'equivalence', 'models'),
    ('data', 'deploy'),
    ('heads',),
    ('backbones',),
    ('ops', 'checkpoints'),
    ('visualize', 'published', 'text'),
    ('registry', 'files', 'logs', 'environment', 'wrappers'),
    ('probes',),
    ('mmcv_ops',),
    ('compat',),
    ('errors', '__init__'),
)


def modules() -> dict[str, Path]:
    found = {}
    for path in (ROOT / 'replk_mm').rglob('*.py'):
        name = '.'.join(path.relative_to(ROOT).with_suffix('').parts)
        found[name.removesuffix('.__init__')] = path
    return found


def imports_of(path: Path, known: dict[str, Path]) -> set[str]:
    """Modules of ours that a file imports anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            inner = {f'{node.module}.{alias.name}' for alias in node.names}
            found |= inner & known.keys() or {node.module} & known.keys()
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names} & known.keys()
    return found


def floor_of(name: str) -> int:
    part = name.split('.')[1] if '.' in name else '__init__'
    part = '__main__' if name.endswith('.__main__') else part  # a program, which nothing imports
    return next(height for height, names in enumerate(reversed(FLOORS)) if part in names)


KNOWN = modules()
IMPORTS = {name: imports_of(path, KNOWN) for name, path in KNOWN.items()}


def test_a_file_imports_lower_floors_or_its_own_package():
    upward = [
        f'{name} -> {other}'
        for name, others in IMPORTS.items()
        for other in others
        if name.split('.')[1:2] != other.split('.')[1:2] and floor_of(other) >= floor_of(name)
    ]
    assert not upward


def test_files_form_no_cycle():
    left = {name: set(others) - {name} for name, others in IMPORTS.items()}
    while free := {name for name, others in left.items() if not others & left.keys()}:
        left = {name: others for name, others in left.items() if name not in free}
    assert not left, f'in a cycle or above one: {sorted(left)}'


def test_the_check_sees_imports_inside_functions(tmp_path):
    path = tmp_path / 'x.py'
    path.write_text('def f():\n    from replk_mm.engine import runner\n    import replk_mm.errors\n')
    assert imports_of(path, KNOWN) == {'replk_mm.engine.runner', 'replk_mm.errors'}


@pytest.mark.parametrize(
    ('module', 'name', 'current'),
    [
        ('models', 'RepLKNet', 'backbones.RepLKNet'),
        ('equivalence', 'compare', 'deploy.equivalence.compare_networks'),
        ('ops', 'convolve', 'ops.fused_conv2d'),
        ('ops', 'pack', 'ops.prepack'),
        ('ops', 'implementation', 'ops.force_implementation'),
    ],
)
def test_names_of_the_first_version_warn_and_work(module, name, current):
    package, _, attribute = current.rpartition('.')
    expected = getattr(importlib.import_module(f'replk_mm.{package}'), attribute)
    if module != 'ops':
        sys.modules.pop(f'replk_mm.{module}', None)  # a module warns when it is imported first
    with pytest.warns(DeprecationWarning, match=current.rpartition('.')[0]):
        assert getattr(importlib.import_module(f'replk_mm.{module}'), name) is expected
