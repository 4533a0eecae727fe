"""Bad checkpoints, full disks and lack of memory: clear errors, and nothing is lost."""

import errno
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from tiny import tiny, trained  # noqa: F401

from replk_mm.engine.train import train
from replk_mm.errors import USER_ERROR_STATUS, UserError, command, user_message

# ruff: noqa: F811 (fixtures that come from another file)
pytestmark = pytest.mark.slow
Usage = namedtuple('Usage', 'total used free')


def first_line(info) -> str:
    return str(info.value).splitlines()[0]


def test_checkpoint_of_another_network_cannot_be_resumed(tiny, trained, tmp_path):
    with pytest.raises(UserError) as info:
        tiny.train(tmp_path, 40, {'model.decode_head.channels': 16}, resume=str(trained))
    assert str(trained) in first_line(info)


# -- disks ------------------------------------------------------------------------------------------------------------
def test_disk_too_full_for_two_checkpoints(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, 'disk_usage', lambda path: Usage(10**9, 10**9, 1000))
    with pytest.raises(UserError, match='GiB free') as info:
        tiny.prepare(tmp_path / 'work')
    assert str(tmp_path / 'work') in first_line(info)


def test_disk_full_on_the_way_keeps_the_former_checkpoint(tiny, tmp_path, monkeypatch):
    from mmengine.fileio import LocalBackend

    put = LocalBackend.put

    def full(self, content, path):
        if 'iter_4' in str(path):
            Path(path).write_bytes(content[:1000])  # what fits
            raise OSError(errno.ENOSPC, 'No space left on device', str(path))
        put(self, content, path)

    monkeypatch.setattr(LocalBackend, 'put', full)
    cfg, notes = tiny.prepare(
        tmp_path, 6, {'default_hooks.checkpoint.max_keep_ckpts': 1, 'default_hooks.checkpoint.interval': 2}
    )
    with pytest.raises(UserError, match='No space left') as info:
        train(cfg, notes)
    assert str(tmp_path) in first_line(info)
    assert '--resume' in str(info.value)
    monkeypatch.undo()
    left = torch.load(tmp_path / 'iter_2.pth', weights_only=False)
    assert left['meta']['iter'] == 2
    assert not (tmp_path / 'iter_4.pth').exists(), 'half a checkpoint was left'
    _, notes = tiny.prepare(tmp_path, 6, resume='auto')
    assert any('iter_2.pth' in n for n in notes)


# -- while training ---------------------------------------------------------------------------------------------------
def failing(monkeypatch, error: Exception) -> None:
    from mmseg.models import EncoderDecoder

    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(EncoderDecoder, 'loss', fail)


@pytest.mark.parametrize(
    ('error', 'preflight'),
    [
        (MemoryError(), True),
        (torch.cuda.OutOfMemoryError('CUDA out of memory. Tried to allocate 2.00 GiB.'), False),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), False),
    ],
)
def test_out_of_memory_names_batch_and_crop(tiny, tmp_path, monkeypatch, error, preflight):
    failing(monkeypatch, error)
    with pytest.raises(UserError, match='out of memory at iteration 0') as info:
        train(*tiny.prepare(tmp_path), preflight=preflight)
    assert 'train_dataloader.batch_size=2 and crops of 64x64 pixels' in first_line(info)
    assert 'model.backbone.with_cp=True' in str(info.value)


def test_other_errors_keep_their_traceback(tiny, tmp_path, monkeypatch):
    failing(monkeypatch, RuntimeError('a mistake in the program'))
    with pytest.raises(RuntimeError, match='a mistake in the program'):
        tiny.train(tmp_path)


@pytest.mark.parametrize(
    ('options', 'named'),
    [
        ({'optim_wrapper.optimizer.lrr': 1}, 'lrr'),
        ({'default_hooks.checkpoint.type': 'CheckpintHook'}, 'CheckpintHook'),
        ({'train_dataloader.dataset.pipeline.2.type': 'RandomCropp'}, 'train_dataloader.dataset.pipeline[2]'),
        ({'optim_wrapper.optimizer.type': 'AdamWW'}, 'optimizer'),
        ({'train_dataloader.dataset.type': 'BaseSegDatset'}, 'BaseSegDatset'),
    ],
)
def test_config_that_cannot_be_built_is_named(tiny, tmp_path, options, named):
    with pytest.raises(UserError) as info:
        tiny.train(tmp_path, None, options)
    assert named in first_line(info)


# -- commands ---------------------------------------------------------------------------------------------------------
def test_command_reports_a_user_error_without_a_traceback(capsys, monkeypatch):
    monkeypatch.delenv('REPLK_MM_TRACEBACK', raising=False)

    @command
    def main():
        raise UserError('x.py: is bad\nMend it.')

    assert main() == USER_ERROR_STATUS == 2
    assert capsys.readouterr().err == 'error: x.py: is bad\nMend it.\n'
    monkeypatch.setenv('REPLK_MM_TRACEBACK', '1')
    with pytest.raises(UserError):
        main()


def test_command_passes_status_and_interruption(capsys):
    def interrupted():
        raise KeyboardInterrupt

    assert command(lambda: None)() == 0
    assert command(lambda: 3)() == 3
    assert command(interrupted)() == 130
    with pytest.raises(ZeroDivisionError):
        command(lambda: 1 / 0)()


def test_message_of_a_worker_is_freed_of_its_traceback():
    wrapped = UserError(
        'Caught UserError in DataLoader worker process 0.\nOriginal Traceback (most recent call '
        'last):\n  File "x", line 1\nreplk_mm.errors.UserError: a.png: is bad\nReplace it.\n'
    )
    assert user_message(wrapped) == 'a.png: is bad\nReplace it.'
    assert user_message(UserError('plain')) == 'plain'


# -- nothing to train -------------------------------------------------------------------------------------------------
def test_epochs_without_a_batch(tiny, tmp_path):
    """mmengine itself trains nothing, and succeeds."""
    sampler = dict(_delete_=True, type='DefaultSampler', shuffle=True)
    changes = {'drop_last': True, 'batch_size': 16, 'sampler': sampler}
    options = {f'train_dataloader.{key}': value for key, value in changes.items()}
    options['train_cfg'] = dict(_delete_=True, type='EpochBasedTrainLoop', max_epochs=1)
    with pytest.raises(UserError, match='train_dataloader: 4 images give no batch'):
        tiny.train(tmp_path, None, options)
