"""Training that is stopped, killed or spread over processes."""
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny import ROOT, tiny, tool_environment, trained  # noqa: F401
from tool_cases import merged, read  # noqa: F401

from replk_mm.engine import runner
from replk_mm.engine.prepare import prepare_training
from replk_mm.engine.resuming import last_checkpoint
from replk_mm.engine.train import train
from replk_mm.errors import INTERRUPTED_STATUS, UserError

# ruff: noqa: F811 (fixtures that come from another file)


def watched(tiny, work_dir, monkeypatch, **changes):
    """Train up to the end of a schedule of 6; the images and the rate of every step, and the last checkpoint."""
    from mmengine.hooks import Hook
    steps = []

    class Watch(Hook):
        def before_train_iter(self, runner, batch_idx, data_batch=None):
            rate = runner.optim_wrapper.get_lr()['lr'][0]
            steps.append((runner.iter, [Path(s.img_path).name for s in data_batch['data_samples']], rate))

    stop = changes.pop('stop', None)
    cfg, notes = tiny.prepare(work_dir, 6, **changes)
    cfg.default_hooks.checkpoint.interval = 3
    cfg.train_cfg.val_interval = 6

    class Stop(Hook):
        def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
            if runner.iter + 1 == stop:
                runner.train_loop.stop_training = True

    build = runner.Runner.from_cfg

    def with_hooks(cfg):
        made = build(cfg)
        made.register_hook(Watch(), 'LOW')
        made.register_hook(Stop(), 'LOWEST')
        return made

    monkeypatch.setattr(runner.Runner, 'from_cfg', with_hooks)
    last = train(cfg, notes)
    monkeypatch.undo()
    return steps, last, notes


def test_resumed_run_goes_on_as_if_it_had_not_stopped(tiny, tmp_path, monkeypatch):
    straight, last, _ = watched(tiny, tmp_path / 'straight', monkeypatch, seed=3)
    first, middle, _ = watched(tiny, tmp_path / 'halves', monkeypatch, seed=3, stop=3)
    assert [s[0] for s in first] == [0, 1, 2]
    assert middle.name == 'iter_3.pth'
    second, end, notes = watched(tiny, tmp_path / 'halves', monkeypatch, resume='auto')
    assert any('iter_3.pth' in n and 'iteration 3' in n for n in notes)
    assert [s[0] for s in second] == [3, 4, 5]
    assert len({name for s in straight for name in s[1]}) > 2
    for a, b in zip(straight, first + second, strict=True):
        assert a[1] == b[1]
        assert a[2] == pytest.approx(b[2], rel=1e-9)
    assert (last.name, end.name) == ('iter_6.pth', 'iter_6.pth')
    one, other = read(last), read(end)
    assert one['meta']['iter'] == other['meta']['iter'] == 6
    assert one['meta']['seed'] == other['meta']['seed'] == 3
    for a, b in zip(one['optimizer']['state'].values(), other['optimizer']['state'].values(), strict=True):
        assert a['step'] == b['step'] == 6
    assert [s['last_step'] for s in one['param_schedulers']] == [s['last_step'] for s in other['param_schedulers']]


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
        path.write_bytes(content[:len(content) // 2])
    elif kind == 'empty':
        path.write_bytes(b'')
    elif kind == 'a changed bit':  # of a weight, which torch reads without a word
        at = content.index(b'PK\x03\x04', len(content) // 3) - 5000
        path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1:])
    elif kind == 'marked as encrypted':
        at = content.index(b'PK\x01\x02') + 8
        path.write_bytes(content[:at] + bytes([content[at] | 1]) + content[at + 1:])
    elif kind == 'no checkpoint':
        path.write_bytes(b'x' * 1000)


@pytest.mark.parametrize('kind', ['cut off', 'empty', 'a changed bit', 'marked as encrypted', 'no checkpoint'])
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
    with pytest.raises(UserError, match='none of the 3 checkpoints of this run can be resumed') as info:
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


def test_a_checkpoint_that_was_not_yet_recorded_counts(checkpoints_of_a_run, tmp_path):
    work = Path(shutil.copytree(checkpoints_of_a_run, tmp_path / 'work'))
    (work / 'last_checkpoint').write_text(str(work / 'iter_4.pth'))
    later = (work / 'last_checkpoint').stat().st_mtime + 1
    os.utime(work / 'iter_6.pth', (later, later))
    assert last_checkpoint(work) == str(work / 'iter_6.pth')
    assert last_checkpoint(tmp_path) is None


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
        [sys.executable, '-c', code.format(tool=str(ROOT / 'tools/train.py')), str(tiny.config), '--data-root', str(tiny.data),
         '--work-dir', str(work), '--device', 'cpu', '--max-iters', '8', '--resume', '--no-preflight'],
        capture_output=True, text=True, timeout=200, check=False, env=tool_environment())
    assert ran.returncode == -signal.SIGKILL, ran.stderr[-2000:]
    left = [p.name for p in work.glob('*.pth*')]
    assert any(name.endswith('.part') for name in left), left
    _, notes = tiny.prepare(work, 8, resume='auto')
    note = next(note for note in notes if note.startswith('resume: '))
    assert 'iter_6.pth, iteration 6' in note


def start_training(tiny, work: Path, *args) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, str(ROOT / 'tools/train.py'), str(tiny.config), '--data-root', str(tiny.data),
         '--work-dir', str(work), '--cfg-options', 'default_hooks.checkpoint.interval=5',
         'default_hooks.checkpoint.max_keep_ckpts=2',
         'train_cfg.val_interval=2000', *args],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=tool_environment())


def wait_for(path: Path, process: subprocess.Popen, seconds: float = 90) -> None:
    end = time.monotonic() + seconds
    while not path.exists():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < end, f'{path} did not appear'
        time.sleep(0.05)


@pytest.mark.slow
def test_killed_training_goes_on_from_its_last_checkpoint(tiny, tmp_path):
    process = start_training(tiny, tmp_path)
    wait_for(tmp_path / 'iter_10.pth', process)
    process.kill()
    process.communicate()
    cfg = tiny.cfg({'train_cfg.max_iters': 40, 'default_hooks.checkpoint.interval': 40})
    notes = prepare_training(cfg, tiny.options(tmp_path, resume='auto'))
    resumed = next(n for n in notes if n.startswith('resume: '))
    iteration = int(resumed.split('iteration ')[1].split(',')[0])
    assert iteration >= 5
    assert f'iter_{iteration}.pth' in resumed
    assert train(cfg, notes) == tmp_path / 'iter_40.pth'
    assert next(iter(read(tmp_path / 'iter_40.pth')['optimizer']['state'].values()))['step'] == 40


@pytest.mark.slow
def test_interrupted_training_saves_its_state_and_says_how_to_go_on(tiny, tmp_path):
    process = start_training(tiny, tmp_path)
    wait_for(tmp_path / 'last_checkpoint', process)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == INTERRUPTED_STATUS, error
    assert 'Traceback' not in error
    assert 'stopped by SIGINT; --resume goes on from' in error
    assert (tmp_path / 'last_checkpoint').read_text().strip() in error
    assert Path((tmp_path / 'last_checkpoint').read_text()).is_file()


DISTRIBUTED_CONFIG = """
_base_ = {base!r}
custom_imports = dict(imports=['tiny_record'], allow_failed_imports=False)
custom_hooks = [dict(type='RecordHook', out={out!r})]
"""
RECORD_HOOK = """
import json, pathlib
from mmengine.dist import get_rank
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
@HOOKS.register_module()
class RecordHook(Hook):
    def __init__(self, out):
        self.out, self.images = out, []
    def before_train_iter(self, runner, batch_idx, data_batch=None):
        self.images += [pathlib.Path(s.img_path).name for s in data_batch['data_samples']]
    def after_train(self, runner):
        weights = [float(p.double().sum()) for p in runner.model.parameters()]
        rate = runner.optim_wrapper.get_lr()['lr']
        text = json.dumps(dict(images=self.images, weights=weights, rate=rate))
        pathlib.Path(self.out, f'rank{get_rank()}.json').write_text(text)
"""


@pytest.mark.slow
def test_two_processes_train_one_network(tiny, tmp_path):
    (tmp_path / 'tiny_record.py').write_text(RECORD_HOOK)
    (tmp_path / 'two.py').write_text(DISTRIBUTED_CONFIG.format(base=str(tiny.config), out=str(tmp_path)))
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]

    def launch(tool, *args):
        return subprocess.run(
            [sys.executable, '-m', 'torch.distributed.run', '--nproc-per-node', '2', '--master-port', str(port),
             str(ROOT / 'tools' / f'{tool}.py'), str(tmp_path / 'two.py'), *map(str, args), '--data-root', str(tiny.data),
             '--work-dir', str(tmp_path / 'work'), '--device', 'cpu', '--launcher', 'pytorch'],
            capture_output=True, text=True, timeout=170, check=False,
            env=tool_environment(PYTHONPATH=f'{ROOT}:{tmp_path}'))

    found = launch('train', '--max-iters', 2)
    assert found.returncode == 0, found.stderr[-3000:]
    ranks = [json.loads((tmp_path / f'rank{r}.json').read_text()) for r in range(2)]
    assert ranks[0]['weights'] == ranks[1]['weights']
    assert ranks[0]['rate'] == ranks[1]['rate']
    assert len(ranks[0]['images']) == len(ranks[1]['images']) == 4
    assert set(ranks[0]['images'][:2]).isdisjoint(ranks[1]['images'][:2]), 'the first four images are one pass'
    found = launch('test', tmp_path / 'work' / 'iter_2.pth')
    assert found.returncode == 0, found.stderr[-3000:]
    assert found.stdout.count('2 images in') == 1
    assert 'mIoU' in found.stdout
