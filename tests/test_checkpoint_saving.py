"""Writing checkpoints: whole or not at all."""
import pickle

import pytest
import torch
from checkpoint_cases import first_line

from replk_mm import checkpoints
from replk_mm.checkpoints import read, save
from replk_mm.errors import UserError


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def fail_halfway(monkeypatch, error) -> None:
    def fails(content, file):
        file.write(b'half of it')
        raise error

    monkeypatch.setattr(torch, 'save', fails)


def test_save_round_trip(tmp_path):
    path = tmp_path / 'deep' / 'er' / 'a.pth'
    save({'state_dict': {'w': torch.arange(3.)}}, path)
    assert read(path)['state_dict']['w'].tolist() == [0, 1, 2]
    assert names(path.parent) == ['a.pth'] and path.stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize('error', [OSError(28, 'No space left on device'), RuntimeError('unexpected pos 64 vs 0')], ids=str)
def test_failed_save_leaves_the_old_file(error, tmp_path, monkeypatch):
    path = tmp_path / 'a.pth'
    save({'state_dict': {'w': torch.ones(1)}}, path)

    fail_halfway(monkeypatch, error)
    with pytest.raises(UserError) as caught:
        save({'state_dict': {'w': torch.zeros(1)}}, path)
    assert first_line(caught).startswith(f'{path}: cannot be written') and str(error) in first_line(caught)
    monkeypatch.undo()
    assert read(path)['state_dict']['w'].item() == 1
    assert names(tmp_path) == ['a.pth']


@pytest.mark.parametrize('error', [KeyboardInterrupt, pickle.PicklingError])
def test_interrupted_save_cleans_up(error, tmp_path, monkeypatch):
    path = tmp_path / 'a.pth'
    save({'state_dict': {'w': torch.ones(1)}}, path)

    fail_halfway(monkeypatch, error)
    with pytest.raises(error):
        save({}, path)
    assert names(tmp_path) == ['a.pth']


def test_unwritable_places(tmp_path):
    (tmp_path / 'file').write_text('in the way')
    (tmp_path / 'folder').mkdir()
    for path in (tmp_path / 'file' / 'a.pth', tmp_path / 'folder'):
        with pytest.raises(UserError) as caught:
            save({'w': torch.ones(1)}, path)
        assert first_line(caught).startswith(f'{path}: cannot be written')
    assert names(tmp_path) == ['file', 'folder']


def test_hash(tmp_path):
    path = tmp_path / 'a'
    path.write_bytes(b'abc')
    assert checkpoints.sha256(path) == 'ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad'
