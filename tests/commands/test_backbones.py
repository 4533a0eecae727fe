"""The command ``backbones``."""

import hashlib
import http.server
import json
import socket
import threading
from dataclasses import replace

import pytest
import torch
from tool_cases import tool_main

from replk_mm.backbones.catalogue import Weights, find_backbone
from replk_mm.checkpoints.io import DownloadError, fetch_checkpoint

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
        (['replknet-31b.in1k'], ['replknet-31b.in1k']),  # not the tags that end with it
        (['replknet-31b.in22k-*'], ['replknet-31b.in22k-in1k', 'replknet-31b.in22k-in1k-384']),
    ],
)
def test_choices(args, names, monkeypatch, capsys):
    status = tool_main('backbones', *args, '--json', monkeypatch=monkeypatch)
    printed = capsys.readouterr()
    assert status == (0 if names else 2)
    assert names is None or [entry['name'] for entry in json.loads(printed.out)] == names


@pytest.mark.parametrize(
    ('args', 'hint'),
    [
        (['RepLKNet-31B'], 'Did you mean replknet-31b?'),
        (['convnext_tiny'], 'Did you mean convnext-tiny?'),
        (['resnet50'], 'timm/resnet50'),
        (['replknet-31b.in99'], 'replknet-31b.in22k-in1k'),
        (['convnextv2-na', '--licence', 'permissive'], 'Omit --licence'),
    ],
)
def test_names_that_match_nothing(args, hint, monkeypatch, capsys):
    assert tool_main('backbones', *args, monkeypatch=monkeypatch) == 2
    assert hint in capsys.readouterr().err


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


FILE = b'weights'
DIGITS = hashlib.sha256(FILE).hexdigest()[:8]
PAGE_OF_DRIVE = b'\n<!DOCTYPE html><html lang="en-US"><title>Google Drive</title>'


@pytest.fixture
def address():
    """A server on this machine with files of good and of wrong names, and pages for browsers."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            found = PAGE_OF_DRIVE if 'drive' in self.path else FILE if self.path.endswith('.pth') else None
            self.send_response(200 if found else 404)
            self.end_headers()
            self.wfile.write(found or b'')

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f'http://127.0.0.1:{server.server_port}'
        server.shutdown()


@pytest.mark.parametrize(
    ('path', 'status', 'text'),
    [
        (f'/a-{DIGITS}.pth', 0, f'SHA-256 {hashlib.sha256(FILE).hexdigest()}, verified'),
        ('/a.pth', 0, 'no published SHA-256'),
        ('/a-0123abcd.pth', 2, 'invalid hash value'),
        ('/missing', 2, 'HTTP Error 404'),
        ('/drive/folders/1a2b', 2, 'the address is a web page'),
        (None, 2, 'refused'),
    ],
)
def test_downloads(path, status, text, address, tmp_path, monkeypatch, capsys):
    if path is None:  # no server
        with socket.socket() as unused:
            unused.bind(('127.0.0.1', 0))
            url = f'http://127.0.0.1:{unused.getsockname()[1]}/a.pth'
    else:
        url = f'{address}{path}'
    entry = replace(find_backbone('convnext-tiny')[0], weights=(Weights('in1k', 'ImageNet-1K', url),))
    monkeypatch.setattr('replk_mm.commands.backbones.find_backbone', lambda _: (entry, None))
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path))
    assert tool_main('backbones', 'convnext-tiny', '--download', monkeypatch=monkeypatch) == status
    printed = capsys.readouterr()
    files = [file.name for file in (tmp_path / 'checkpoints').iterdir()]
    if status:
        assert text in printed.err and f'{url}: the checkpoint could not be downloaded' in printed.err
        assert f'copy the file to {tmp_path}' in printed.err and files == []
    else:
        assert text in printed.out and len(files) == 1
        assert tool_main('backbones', 'convnext-tiny', '--download', monkeypatch=monkeypatch) == 0  # from the cache


def test_a_server_that_does_not_answer_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr('replk_mm.checkpoints.io._TIMEOUT', 0.2)
    before = socket.getdefaulttimeout()
    with socket.create_server(('127.0.0.1', 0)) as silent, pytest.raises(DownloadError, match='timed out'):
        fetch_checkpoint(f'http://127.0.0.1:{silent.getsockname()[1]}/a.pth', tmp_path)
    assert socket.getdefaulttimeout() == before and not list(tmp_path.iterdir())


def test_a_damaged_copy_is_not_accepted(address, tmp_path, monkeypatch, capsys):
    url = f'{address}/a-{DIGITS}.pth'
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path))
    fetch_checkpoint(url).write_bytes(b'other bytes')
    entry = replace(find_backbone('convnext-tiny')[0], weights=(Weights('in1k', 'ImageNet-1K', url),))
    monkeypatch.setattr('replk_mm.commands.backbones.find_backbone', lambda _: (entry, None))
    assert tool_main('backbones', 'convnext-tiny', '--download', monkeypatch=monkeypatch) == 2
    assert f'expected {DIGITS}' in capsys.readouterr().err
