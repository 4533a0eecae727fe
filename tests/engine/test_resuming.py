"""Training that is stopped, killed or spread over processes."""

import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import ROOT, tiny, tool_environment, trained  # noqa: F401
from tool_cases import merged, read  # noqa: F401

from replk_mm.engine.resuming import last_checkpoint
from replk_mm.engine.train import train
from replk_mm.errors import UserError

# ruff: noqa: F811 (fixtures that come from another file)


def test_resume_with_nothing_there_starts_anew_and_says_so(tiny, tmp_path):
    _, notes = tiny.prepare(tmp_path / 'new', 2, resume='auto')
    assert any('starting anew' in n and str(tmp_path / 'new') in n for n in notes)


def test_resume_of_a_merged_checkpoint_is_refused(tiny, merged, tmp_path):
    with pytest.raises(UserError, match='for inference') as info:
        tiny.prepare(tmp_path, 2, resume=str(merged))
    assert str(merged) in str(info.value).splitlines()[0]


def test_resume_from_a_missing_checkpoint_is_refused(tiny, tmp_path):
    with pytest.raises(UserError, match='gone.pth: no such checkpoint'):
        tiny.prepare(tmp_path, 2, resume=str(tmp_path / 'gone.pth'))


# -- which checkpoint --------------------------------------------------------------------------------------------------
@pytest.fixture(scope='module')
def checkpoints_of_a_run(tiny, tmp_path_factory):
    """A work directory with the checkpoints of iterations 2, 4 and 6."""
    work = tmp_path_factory.mktemp('run')
    cfg, notes = tiny.prepare(work, 6, {'default_hooks.checkpoint.max_keep_ckpts': 3})
    cfg.default_hooks.checkpoint.interval = 2
    train(cfg, notes, preflight=False)
    return work


def spoil(path: Path, kind: str) -> None:
    content = path.read_bytes()
    if kind == 'cut off':
        path.write_bytes(content[: len(content) // 2])
    elif kind == 'empty':
        path.write_bytes(b'')
    elif kind == 'a changed bit':  # of a weight, which torch reads without a word
        at = content.index(b'PK\x03\x04', len(content) // 3) - 5000
        path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
    elif kind == 'marked as encrypted':
        at = content.index(b'PK\x01\x02') + 8
        path.write_bytes(content[:at] + bytes([content[at] | 1]) + content[at + 1 :])


@pytest.mark.parametrize('kind', ['cut off', 'empty', 'a changed bit', 'marked as encrypted'])
def test_damaged_last_checkpoint_is_passed_over(kind, checkpoints_of_a_run, tiny, tmp_path):
    work = Path(shutil.copytree(checkpoints_of_a_run, tmp_path / 'work'))
    spoil(work / 'iter_6.pth', kind)
    _, notes = tiny.prepare(work, 6, resume='auto')
    passed_over, chosen = [note for note in notes if note.startswith('resume: ')]
    assert passed_over.startswith(f'resume: {work / "iter_6.pth"} is damaged (')
    assert chosen.startswith(f'resume: {work / "iter_4.pth"}, iteration 4')


def test_all_checkpoints_damaged_is_refused(checkpoints_of_a_run, tiny, tmp_path):
    work = Path(shutil.copytree(checkpoints_of_a_run, tmp_path / 'work'))
    for path in work.glob('*.pth'):
        spoil(path, 'cut off')
    with pytest.raises(UserError, match='no checkpoint of this run can be resumed from .3 tried') as info:
        tiny.prepare(work, 6, resume='auto')
    assert all(str(work / f'iter_{i}.pth') in str(info.value) for i in (2, 4, 6))


@pytest.mark.parametrize(('record', 'chosen'), [('', 6), ('iter_2.pth', 2), ('gone.pth', 6), (None, 6)])
def test_the_record_of_the_last_checkpoint_is_believed_if_it_can_be(record, chosen, checkpoints_of_a_run, tmp_path):
    work = Path(shutil.copytree(checkpoints_of_a_run, tmp_path / 'work'))
    if record is None:
        (work / 'last_checkpoint').unlink()
    else:  # written after the checkpoints: an earlier training in this folder went further
        (work / 'last_checkpoint').write_text(record and str(work / record))
    assert last_checkpoint(work) == str(work / f'iter_{chosen}.pth')


@pytest.mark.slow
def test_killed_while_a_checkpoint_is_written_it_goes_on_from_the_former(checkpoints_of_a_run, tiny, tmp_path):
    work = Path(shutil.copytree(checkpoints_of_a_run, tmp_path / 'work'))
    code = """
import os, signal
from pathlib import Path
from runpy import run_path
from mmengine.fileio import LocalBackend
def put(self, content, path):
    Path(path).write_bytes(content[:len(content) // 2])
    os.kill(os.getpid(), signal.SIGKILL)
LocalBackend.put = put
run_path({tool!r}, run_name='__main__')
"""
    ran = subprocess.run(
        [
            sys.executable,
            '-c',
            code.format(tool=str(ROOT / 'tools/train.py')),
            str(tiny.config),
            '--data-root',
            str(tiny.data),
            '--work-dir',
            str(work),
            '--device',
            'cpu',
            '--max-iters',
            '8',
            '--resume',
            '--no-preflight',
        ],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
        env=tool_environment(),
    )
    assert ran.returncode == -signal.SIGKILL, ran.stderr[-2000:]
    left = [p.name for p in work.glob('*.pth*')]
    assert any(name.endswith('.part') for name in left), left
    _, notes = tiny.prepare(work, 8, resume='auto')
    note = next(note for note in notes if note.startswith('resume: '))
    assert 'iter_6.pth, iteration 6' in note
