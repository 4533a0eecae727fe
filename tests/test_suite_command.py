"""tools/suite.py: what it refuses before anything is written."""
import importlib.util
import json

import pytest
from report_records import record, write
from tiny import ROOT


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Calls tools/suite.py with a suite of one row and arguments; gives its exit status."""
    spec = importlib.util.spec_from_file_location('suite_tool', ROOT / 'tools/suite.py')
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    suite = tmp_path / 'suite.yaml'
    suite.write_text('name: one\nrows: [{name: a, config: config.py, measure: [complexity]}]\n')
    (tmp_path / 'config.py').write_text('model = dict()\ntest_dataloader = dict()\n')

    def call(*args) -> int:
        monkeypatch.setattr('sys.argv', ['suite.py', str(suite), '--work-dir', str(tmp_path / 'w'), *map(str, args)])
        return tool.main()

    return call


@pytest.mark.parametrize('text', ['', ' , '])
def test_only_of_nothing_is_not_everything(run, text, tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:  # a variable that is not set, as of a job array
        run('--only', text, '--list')
    assert caught.value.code == 2 and 'names no row' in capsys.readouterr().err


def test_without_slurm(run, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv('PATH', str(tmp_path))
    assert run('--launcher', 'slurm') == 2 and '--launcher slurm: there is no srun' in capsys.readouterr().err
    assert run('--launcher', 'slurm', '--list') == 0
    assert not (tmp_path / 'w').exists()


def test_a_work_dir_that_cannot_be_written(run, tmp_path, capsys):
    (tmp_path / 'file').touch()
    assert run('--work-dir', tmp_path / 'file' / 'w') == 2
    assert 'file/w: cannot be written to' in capsys.readouterr().err


def test_a_folder_that_says_what_it_never_wrote(run, tmp_path, capsys):
    """A work dir may have been copied: reasons of failures show their characters, and definitions are what they are."""
    folder = tmp_path / 'w' / 'runs' / 'a' / '0'
    folder.mkdir(parents=True)
    for name in ('definition.json', 'stage.json'):
        (folder / name).write_text('[1]')
    failed = record('a', 0, 'complexity', {}, status='failed', reason='\x1b]0;title\x07', suite='one')
    write(tmp_path / 'w', [failed])
    assert run('--list') == 0
    said = capsys.readouterr().out
    assert 'failed: complexity: \\x1b]0;title\\x07' in said and '\x1b' not in said
    assert run('--resume') == 1
    said = capsys.readouterr().out
    assert '1 failed; --resume tries them again' in said and 'Traceback' not in said
    assert json.loads((folder / 'definition.json').read_text())['row'] == 'a'
