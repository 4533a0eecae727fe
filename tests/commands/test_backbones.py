"""The command ``backbones``."""

import json
import shutil

import pytest
import torch
from tool_cases import tool_main

PAGE = 'before\n<!-- backbones:begin -->\n<!-- backbones:end -->\nafter\n'


def test_json_has_sizes_features_and_published_results(monkeypatch, capsys):
    assert tool_main('backbones', 'convnext-base', '--json', monkeypatch=monkeypatch) == 0
    found = {entry['name']: entry for entry in json.loads(capsys.readouterr().out)}
    assert list(found) == ['convnext-base.in1k', 'convnext-base.in22k']
    entry = found['convnext-base.in22k']
    assert entry['channels'] == [128, 256, 512, 1024] and entry['strides'] == [4, 8, 16, 32]
    (miou,) = [row for row in entry['published'] if row['task'] == 'segmentation']
    assert (miou['miou_ss'], miou['miou_ms'], miou['crop'], miou['recipe']['lr']) == (52.6, 53.1, 640, 1e-4)
    # ConvNeXt paper, table 12: 89 M parameters; 15.4 G at 224x224 with a classifier
    assert entry['parameters'] == pytest.approx(88e6, rel=0.01)
    assert entry['macs'] == pytest.approx(15.35e9 * (512 / 224) ** 2, rel=0.01)


@pytest.mark.parametrize(
    ('args', 'names'),
    [
        (['convnextv2-nano', '--licence', 'permissive'], None),
        (['convnext-base.in22k'], ['convnext-base.in22k']),
        (['replknet-nano', '--licence', 'permissive'], ['replknet-nano']),
    ],
)
def test_choices(args, names, monkeypatch, capsys):
    status = tool_main('backbones', *args, '--json', monkeypatch=monkeypatch)
    printed = capsys.readouterr()
    assert status == (0 if names else 2)
    assert names is None or [entry['name'] for entry in json.loads(printed.out)] == names


def test_a_page_is_written(tmp_path, monkeypatch):
    page = tmp_path / 'page.md'
    page.write_text(PAGE)
    assert tool_main('backbones', 'replknet-31b', '--write', page, monkeypatch=monkeypatch) == 0
    line = next(line for line in page.read_text().splitlines() if line.startswith('| replknet-31b.in1k |'))
    cells = [cell.strip() for cell in line.strip('|').split('|')]
    assert cells[1] == 'ImageNet-1K' and cells[4] == '128, 256, 512, 1024'
    assert cells[6:] == ['49.9 / 50.6 @512', '52.2 / 45.2', 'not stated (code: MIT)']


def test_unknown_names_and_missing_networks_are_errors(tmp_path, monkeypatch, capsys):
    def refuse(*_args, **_):
        raise OSError('no network')

    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, 'download_url_to_file', refuse)
    assert tool_main('backbones', 'convnext-titan', monkeypatch=monkeypatch) == 2
    assert 'no such backbone' in capsys.readouterr().err
    assert tool_main('backbones', 'convnext-tiny', '--download', monkeypatch=monkeypatch) == 2
    assert 'convnext_tiny_1k_224.pth' in (error := capsys.readouterr().err) and f'copy the file to {tmp_path}' in error


def test_downloads_are_verified(tmp_path, monkeypatch, capsys):
    """The name of this file has the first digits of its SHA-256."""
    source = tmp_path / 'source'
    source.write_bytes(b'other bytes')
    asked = {}

    def download(url, to, hash_prefix=None, **_):
        asked[url] = hash_prefix
        shutil.copy(source, to)

    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, 'download_url_to_file', download)
    assert tool_main('backbones', 'replknet-xl', '--download', monkeypatch=monkeypatch) == 2
    assert list(asked.values()) == ['88259b1d'] and 'expected 88259b1d' in capsys.readouterr().err
    assert tool_main('backbones', 'convnext-tiny', '--download', monkeypatch=monkeypatch) == 0
    assert 'no published SHA-256' in capsys.readouterr().out
