"""Arguments that several commands share."""

import argparse
import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

import replk_mm
from replk_mm import __main__, cli
from replk_mm.errors import BROKEN_PIPE_STATUS, USER_ERROR_STATUS, UserError, command, command_line


def parse(*words: str) -> dict:
    p = cli.parser('A command.', 'a')
    cli.add_config_options(p)
    return p.parse_args(['--cfg-options', *words]).cfg_options


def test_values():
    assert parse('a.b=1', 'c=text', 'd=[1,2]', 'e=(0.5,1)', 'f=x=y') == {
        'a.b': 1,
        'c': 'text',
        'd': [1, 2],
        'e': (0.5, 1),
        'f': 'x=y',
    }


def test_share_is_a_number_from_0_to_1():
    assert [cli.share(text) for text in ('0', '0.3', '1')] == [0, 0.3, 1]
    for text in ('2', '-0.1', 'nan'):
        with pytest.raises(argparse.ArgumentTypeError, match='not in 0..1'):
            cli.share(text)


def test_dict_in_braces():
    assert parse("model.backbone={'_delete_': True, 'type': 'mmseg.ResNet', 'strides': (1, 2)}") == {
        'model.backbone': {'_delete_': True, 'type': 'mmseg.ResNet', 'strides': (1, 2)}
    }


def test_lists_of_dicts():
    hooks = [{'type': 'EMAHook', 'momentum': 0.5}, {'type': 'EarlyStoppingHook', 'monitor': 'mIoU'}]
    assert parse(f'custom_hooks={hooks}', "a=({'b': [1]},)") == {'custom_hooks': hooks, 'a': ({'b': [1]},)}


@pytest.mark.parametrize(
    'word, told',
    [
        ('a', "'a' is not KEY=VALUE"),
        ("a={'b': ", 'cannot parse the value of a'),
        ('a={b: 1}', 'cannot parse the value of a'),
        ('a=[{type:EMAHook}]', 'quoted for the shell'),
        ('a=' + '{' * 5000, 'cannot parse the value of a'),
        ('a={[1]}', 'cannot parse the value of a'),
        ('a={__import__("os").system("true"): 1}', 'cannot parse the value of a'),
        ('a={9**9**9: 1}', 'cannot parse the value of a'),
    ],
    ids=range(8),
)
def test_unreadable(word, told, capsys):
    with pytest.raises(SystemExit) as stopped:
        parse(word)
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and told in said and len(said) < 1000


@pytest.mark.parametrize(
    'program, expected',
    [
        ('tools/train.py', "python tools/test.py CONFIG 'a b'"),
        ('/code/tools/train.py', "python /code/tools/test.py CONFIG 'a b'"),
        ('replk train', "replk test CONFIG 'a b'"),
        ('/usr/bin/pytest', "replk test CONFIG 'a b'"),
    ],
)
def test_command_line(program, expected, monkeypatch):
    monkeypatch.setattr(sys, 'argv', [program])
    assert command_line('test', 'CONFIG', 'a b') == expected


def test_shipped_configs_are_named_by_their_package_outside_the_repository(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, 'argv', ['replk train'])
    monkeypatch.chdir(tmp_path)
    assert command_line('test', 'configs/a.py', 'x.pth') == 'replk test replk_mm::a.py x.pth'
    (tmp_path / 'configs').mkdir()
    assert command_line('test', 'configs/a.py', 'x.pth') == 'replk test configs/a.py x.pth'


@pytest.mark.parametrize('missing', ['torch', 'mmengine'])
def test_a_missing_package_is_no_traceback(missing, capsys, monkeypatch):
    monkeypatch.setattr(replk_mm, 'engine', importlib.import_module('replk_mm.engine'))  # restored with the modules
    for name in [name for name in sys.modules if name.startswith('replk_mm.engine')]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)  # its import fails
    monkeypatch.setattr('sys.argv', ['replk', 'train'])
    assert __main__.main() == USER_ERROR_STATUS
    shown = capsys.readouterr().err
    assert missing in shown.splitlines()[0] and 'replk doctor' in shown


def test_messages_hold_nothing_that_a_terminal_obeys():
    error = UserError('a class called \x1b]0;owned\x07\x9b2J \u202egnp.exe\nnext line\t\ud800')
    assert str(error) == 'a class called \\x1b]0;owned\\x07\\x9b2J \\u202egnp.exe\nnext line\t\\ud800'


def test_an_unknown_command_is_an_error(capsys, monkeypatch):
    monkeypatch.setattr('sys.argv', ['replk', 'trian'])
    assert __main__.main() == USER_ERROR_STATUS
    assert 'train' in capsys.readouterr().err
    monkeypatch.setattr('sys.argv', ['replk', '--help'])
    assert __main__.main() == 0
    assert {'train', 'suite', 'report'} <= {line.split()[0] for line in capsys.readouterr().out.splitlines()[3:]}


@pytest.mark.slow
def test_a_closed_output_is_no_traceback():
    program = (
        'from replk_mm.errors import command; import sys; sys.exit(command(lambda: print("x" * 10**6, flush=True))())'
    )
    ran = subprocess.Popen([sys.executable, '-c', program], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    ran.stdout.close()
    assert ran.stderr.read() == b'' and ran.wait(60) == BROKEN_PIPE_STATUS


def test_a_broken_pipe_of_a_data_worker_is_an_error():
    @command
    def main() -> None:
        raise BrokenPipeError(32, 'Broken pipe')

    with pytest.raises(BrokenPipeError):
        main()


def test_failed_import_names_the_package_and_the_doctor(capsys):
    @command
    def main() -> None:
        import no_such_package_at_all  # noqa: F401

    assert main() == USER_ERROR_STATUS
    said = capsys.readouterr().err
    assert "No module named 'no_such_package_at_all'" in said and 'doctor' in said and 'Traceback' not in said


def test_advice_names_options_that_exist():
    """In messages, and in command lines that they show."""
    package = Path(cli.__file__).parent
    options = {
        path.stem: set(re.findall(r"'(--[a-z][\w-]+)'", path.read_text()))
        for path in (package / 'cli.py', *package.glob('commands/*.py'))
    }
    # Of git, pip, torchrun, Slurm and nvidia-smi.
    others = {'--help', '--no-optional-locks', '--force-reinstall', '--no-deps', '--show-toplevel', '--porcelain'}
    others |= {
        '--nproc-per-node',
        '--standalone',
        '--ntasks',
        '--kill-on-bad-exit',
        '--no-use-ema',
        '--id',
        '--query-gpu',
    }
    known, strange = set().union(others, *options.values(), {'--kernels'}), []
    for path in package.rglob('*.py'):
        for node in ast.walk(ast.parse(path.read_text())):
            text, takes = getattr(node, 'value', None), known
            if isinstance(node, ast.Call) and getattr(node.func, 'id', '') == 'command_line':
                words = [str(word.value) for word in node.args if isinstance(word, ast.Constant)]
                text, takes = ' '.join(words), options['cli'] | options.get(words[0] if words else '', known)
            if isinstance(text, str):
                found = re.findall(r'(?<![\w-])--[a-z][\w-]+', text)
                strange += [(path.name, option) for option in found if option not in takes]
    assert strange == []
