"""The script that tests other versions: counts, table and exit status, with a stand-in for environments."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGE = '# Install\n\n<!-- test_matrix:begin -->\nold\n<!-- test_matrix:end -->\n\nmore\n'
REPORT = """<testsuites><testsuite name="pytest" errors="1" failures="2" skipped="3" tests="10">
<testcase name="a"><failure>x</failure></testcase></testsuite></testsuites>"""


@pytest.fixture
def matrix(tmp_path, monkeypatch):
    """The script, with its files in ``tmp_path``."""
    monkeypatch.syspath_prepend(ROOT / 'scripts')
    spec = importlib.util.spec_from_file_location('matrix_script', ROOT / 'scripts' / 'test_matrix.py')
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, 'RESULTS', tmp_path / 'results.json')
    monkeypatch.setattr(module, 'PAGE', tmp_path / 'install.md')
    module.PAGE.write_text(PAGE)
    return module


def test_counts_of_a_report(matrix, tmp_path):
    (tmp_path / 'tests.xml').write_text(REPORT)
    assert matrix.read_report(tmp_path / 'tests.xml') == {'passed': 4, 'failed': 3, 'skipped': 3}


def test_rows_that_do_not_run_stay_and_failures_set_the_exit_status(matrix, tmp_path, monkeypatch):
    def start(name, failed=0, *options):
        result = {'date': '2026-01-02', 'python': name, 'versions': {'torch': '1.2'}, 'setup_s': 3, 'tests_s': 4}
        counts = {'passed': 5, 'failed': failed, 'skipped': 6} if failed is not None else {'error': 'set-up failed'}
        monkeypatch.setattr(matrix, 'run', lambda *arguments: result | counts)
        monkeypatch.setattr(sys, 'argv', ['test_matrix.py', name, '--venvs', str(tmp_path), *options])
        matrix.main()

    start('newest')
    with pytest.raises(SystemExit, match='failed: oldest'):
        start('oldest', 2)
    with pytest.raises(SystemExit, match='failed: default'):
        start('default', None)
    start('between', 0, '--pytest-args=-x')
    rows = [line.split(' | ') for line in matrix.PAGE.read_text().splitlines() if line.startswith('| ')]
    assert [row[0] for row in rows] == ['| Name', '| ---', '| default', '| newest', '| oldest']
    assert {len(row) for row in rows} == {12}
    assert rows[3][2:] == ['1.2', '-', '-', '-', '5', '0', '6', '3 s', '4 s', '2026-01-02 |']
    assert rows[4][6:9] == ['5', '2', '6'] and rows[2][6:9] == ['set-up failed'] * 3
    assert matrix.PAGE.read_text().startswith('# Install\n\n<!-- test_matrix:begin -->\n| Name')
    assert matrix.PAGE.read_text().endswith('<!-- test_matrix:end -->\n\nmore\n')
    assert json.loads(matrix.RESULTS.read_text()).keys() == {'default', 'newest', 'oldest'}
    with pytest.raises(SystemExit, match='2'):
        start('nonsense')


def test_only_environments_are_removed(matrix, tmp_path, monkeypatch):
    for name in ('newest', 'oldest'):
        (tmp_path / name).mkdir()
        (tmp_path / name / ('pyvenv.cfg' if name == 'newest' else 'thesis.tex')).touch()
    monkeypatch.setattr(matrix, 'set_up', lambda combination, folder: 'set-up failed')
    monkeypatch.setattr(sys, 'argv', ['test_matrix.py', 'newest', 'oldest', '--venvs', str(tmp_path)])
    with pytest.raises(SystemExit, match='failed: newest, oldest'):
        matrix.main()
    assert not (tmp_path / 'newest').exists() and (tmp_path / 'oldest' / 'thesis.tex').exists()
