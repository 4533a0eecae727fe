"""Which checkpoint a run resumes from, and what is rejected."""

import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from checkpoint_cases import Exploit
from mmengine.fileio import LocalBackend
from resume_cases import forked
from tiny import tiny, trained  # noqa: F401
from tool_cases import merged, read  # noqa: F401

from replk_mm.engine.resuming import last_checkpoint
from replk_mm.engine.train import train
from replk_mm.errors import UserError

# ruff: noqa: F811 (fixtures that come from another file)
pytestmark = pytest.mark.slow


def test_resume_with_nothing_there_starts_anew_and_says_so(tiny, tmp_path):
    _, notes = tiny.prepare(tmp_path / 'new', 2, resume='auto')
    assert any('starting a new run' in n and str(tmp_path / 'new') in n for n in notes)


def test_resume_of_a_merged_checkpoint_is_rejected(tiny, merged, tmp_path):
    with pytest.raises(UserError, match='for inference') as info:
        tiny.prepare(tmp_path, 2, resume=str(merged))
    assert str(merged) in str(info.value).splitlines()[0]


def test_resume_from_a_missing_checkpoint_is_rejected(tiny, tmp_path):
    with pytest.raises(UserError, match='gone.pth: no such checkpoint'):
        tiny.prepare(tmp_path, 2, resume=str(tmp_path / 'gone.pth'))


# -- which checkpoint --------------------------------------------------------------------------------------------------
@pytest.fixture(scope='module')
def checkpoints_of_a_run(tiny, tmp_path_factory):
    """A work directory with the checkpoints of iterations 2, 4 and 6."""
    work = tmp_path_factory.mktemp('run')
    cfg, notes = tiny.prepare(work, 6, {'default_hooks.checkpoint.max_keep_ckpts': 3, 'param_scheduler': None})
    cfg.default_hooks.checkpoint.interval = 2
    train(cfg, notes, preflight=False)
    return work


def spoil(path: Path, kind: str) -> None:
    content = path.read_bytes()
    if kind == 'cut off':
        path.write_bytes(content[: len(content) // 2])
    elif kind == 'a changed bit':  # of a weight, which torch reads without a word
        at = content.index(b'PK\x03\x04', len(content) // 3) - 5000
        path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])


@pytest.mark.parametrize('kind', ['cut off', 'a changed bit'])
def test_damaged_last_checkpoint_is_skipped(kind, checkpoints_of_a_run, tiny, tmp_path):
    work = Path(shutil.copytree(checkpoints_of_a_run, tmp_path / 'work'))
    spoil(work / 'iter_6.pth', kind)
    _, notes = tiny.prepare(work, 6, resume='auto')
    passed_over, chosen = [note for note in notes if note.startswith('resume: ')]
    assert passed_over.startswith(f'resume: {work / "iter_6.pth"} is damaged (')
    assert chosen.startswith(f'resume: {work / "iter_4.pth"}, iteration 4')


def test_all_checkpoints_damaged_is_rejected(checkpoints_of_a_run, tiny, tmp_path):
    work = Path(shutil.copytree(checkpoints_of_a_run, tmp_path / 'work'))
    for path in work.glob('*.pth'):
        spoil(path, 'cut off')
    with pytest.raises(UserError, match='no checkpoint of this run can be resumed from .3 tried') as info:
        tiny.prepare(work, 6, resume='auto')
    assert all(str(work / f'iter_{i}.pth') in str(info.value) for i in (2, 4, 6))


@pytest.mark.parametrize(
    ('record', 'chosen'),
    [('', 'iter_6.pth'), ('iter_2.pth', 'iter_2.pth'), ('gone.pth', 'iter_6.pth'), (None, 'iter_6.pth')],
)
def test_the_record_of_the_last_checkpoint_counts_if_it_is_valid(record, chosen, checkpoints_of_a_run, tmp_path):
    work = Path(shutil.copytree(checkpoints_of_a_run, tmp_path / 'work'))
    if record is None:
        (work / 'last_checkpoint').unlink()
    else:  # written after the checkpoints: an earlier training in this folder went further
        (work / 'last_checkpoint').write_text(record and str(work / record))
    assert last_checkpoint(work) == str(work / chosen)


def test_a_checkpoint_of_another_name_is_found_by_its_record(checkpoints_of_a_run, tmp_path):
    work = Path(shutil.copytree(checkpoints_of_a_run, tmp_path / 'work'))
    (work / 'iter_2.pth').rename(work / 'step2.pth')
    (work / 'last_checkpoint').write_text(str(work / 'step2.pth'))
    assert last_checkpoint(work) == str(work / 'step2.pth')


def test_a_kill_while_a_checkpoint_is_written_leaves_the_former(checkpoints_of_a_run, tiny, tmp_path):
    work = Path(shutil.copytree(checkpoints_of_a_run, tmp_path / 'work'))

    def put(self, content, path):
        Path(path).write_bytes(content[: len(content) // 2])
        os.kill(os.getpid(), signal.SIGKILL)

    def train_and_die():
        LocalBackend.put = put
        tiny.train(work, 8, {'param_scheduler': None}, resume='auto')

    assert forked(train_and_die) == -signal.SIGKILL
    assert list(work.glob('*.part'))
    _, notes = tiny.prepare(work, 8, resume='auto')
    assert 'iter_6.pth, iteration 6' in next(note for note in notes if note.startswith('resume: '))


# -- states that do not fit --------------------------------------------------------------------------------------------
def spoiled(trained, path, change) -> str:
    checkpoint = read(trained)
    change(checkpoint)
    torch.save(checkpoint, path)
    return str(path)


def test_the_config_in_a_checkpoint_is_not_run(tiny, tmp_path):
    """mmengine compares it with the run's own, and to read it runs it."""
    proof = tmp_path / 'proof'
    hostile = f'open({str(proof)!r}, "w").close()\nmodel = dict()\n'
    constant: dict = {'param_scheduler': None}
    trained = tiny.train(tmp_path / 'run', 2, constant)
    path = spoiled(trained, tmp_path / 'hostile.pth', lambda c: c['meta'].update(config=hostile, cfg=hostile))
    last = tiny.train(tmp_path / 'work', 4, constant, resume=path)
    assert not proof.exists()
    assert read(last)['meta']['iter'] == 4


@pytest.mark.parametrize('resume', [True, False])
def test_code_in_a_checkpoint_is_rejected(resume, tiny, trained, tmp_path):
    proof = tmp_path / 'proof'
    exploit = Exploit(os.mkdir, str(proof))
    path = spoiled(trained, tmp_path / 'hostile.pth', lambda c: c['message_hub']['runtime_info'].update(x=exploit))
    with pytest.raises(UserError, match='rejected') as info:
        tiny.train(tmp_path / 'work', 2, **({'resume': path} if resume else {'options': {'load_from': path}}))
    assert not proof.exists() and str(info.value).startswith(path)


STATES = {
    'a log that is a list': lambda c: c.update(message_hub=[1]),
    'a log without its parts': lambda c: c.update(message_hub={}),
    'an optimizer that is a text': lambda c: c.update(optimizer='x'),
    'parameter groups without parameters': lambda c: c['optimizer'].update(param_groups=[{}]),
    'moments that are a list': lambda c: c['optimizer'].update(state=[1]),
    'the state of another optimizer': lambda c: [g.pop('betas') for g in c['optimizer']['param_groups']],
    'no iteration': lambda c: c['meta'].pop('iter'),
}


@pytest.mark.parametrize('name', STATES)
def test_states_that_no_training_leaves_are_a_user_error(name, tiny, trained, tmp_path):
    path = spoiled(trained, tmp_path / 'hostile.pth', STATES[name])
    with pytest.raises(UserError, match='cannot be resumed') as info:
        tiny.train(tmp_path / 'work', 32, resume=path)
    assert str(info.value).startswith(path)


def test_a_checkpoint_beyond_the_end_of_the_training_is_rejected(tiny, trained, tmp_path):
    with pytest.raises(UserError, match=r'at iteration \d+, and the training ends at 2'):
        tiny.prepare(tmp_path, 2, resume=str(trained))
