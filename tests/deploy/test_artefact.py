"""Folders of exported networks: manifests, damaged files, and numbers and sizes of images."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch

from replk_mm.checkpoints.io import fetch_checkpoint, hash_checkpoint, read_checkpoint
from replk_mm.deploy import artefact
from replk_mm.deploy.artefact import MANIFEST, Artefact, Normalization, TensorInfo, is_artefact, read_manifest
from replk_mm.deploy.export import SUPPORTED, check_format
from replk_mm.errors import UserError
from replk_mm.files import sha256


class Double(torch.nn.Module):
    """A network whose output tells which image it saw."""

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor]:
        return (2 * image.mean((2, 3)),)


def write(folder: Path, batch: int | str = 2) -> Path:
    """An artefact of format ``torch``."""
    folder.mkdir()
    example, change = torch.randn(2, 3, 8, 8), torch.export.Dim.DYNAMIC
    shapes = ({0: change, 2: change, 3: change},) if batch == 'batch' else None
    program = torch.export.export(Double(), (example,), dynamic_shapes=shapes)
    torch.export.save(program, folder / 'network.pt2')
    shape = [batch, 3, *((8, 8) if shapes is None else ('height', 'width'))]
    manifest = artefact.Manifest(
        generator='replk_mm',
        format='torch',
        precision='fp32',
        network='network.pt2',
        files={'network.pt2': sha256(folder / 'network.pt2')},
        opset=None,
        task='classification',
        model='Double',
        inputs=[TensorInfo(name='image', dtype='float32', shape=shape, meaning='')],
        outputs=[TensorInfo(name='logits', dtype='float32', shape=[batch, 3], meaning='')],
        smallest_size=[4, 4] if shapes else [8, 8],
        normalization=Normalization(channel_order='RGB', mean=[0.0], std=[1.0]),
        classes=['a', 'b', 'c'],
        palette=[[0, 0, 0]] * 3,
        config='config.py',
        checkpoint=dict(name='x.pth', sha256='0'),
        reparameterization='',
        comparisons=[],
        postprocessing={},
        weights='0',
        environment={},
    )
    (folder / MANIFEST).write_text(manifest.model_dump_json())
    return folder


@pytest.fixture(autouse=True)
def _trusted(monkeypatch):
    monkeypatch.setenv(artefact.TRUST, '1')


@pytest.fixture(scope='module')
def fixed(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp('fixed') / 'out')


@pytest.mark.parametrize('count', [1, 2, 5])
def test_a_fixed_batch_takes_any_number_of_images(fixed, count) -> None:
    image = torch.randn(count, 3, 8, 8)
    found = Artefact(fixed)(image)['logits']
    torch.testing.assert_close(found, 2 * image.mean((2, 3)))


def test_any_size_if_it_was_exported_for_any(tmp_path) -> None:
    network = Artefact(write(tmp_path / 'out', 'batch'))
    for shape in ((1, 3, 7, 9), (5, 3, 20, 4)):
        image = torch.randn(shape)
        torch.testing.assert_close(network(image)['logits'], 2 * image.mean((2, 3)))


def test_another_size_is_an_error(fixed) -> None:
    with pytest.raises(UserError, match='exported for images of 3x8x8, this one has 3x8x9.*\n.*--dynamic'):
        Artefact(fixed)(torch.randn(1, 3, 8, 9))


def test_a_smaller_image_than_the_fixed_size_is_an_error(fixed) -> None:
    with pytest.raises(UserError, match='exported for images of 3x8x8, this one has 3x4x8'):
        Artefact(fixed)(torch.randn(1, 3, 4, 8))


def test_a_size_that_was_not_traced_is_an_error(tmp_path) -> None:
    with pytest.raises(UserError, match='images of at least 4x4, this one has 7x3'):
        Artefact(write(tmp_path / 'out', 'batch'))(torch.randn(1, 3, 7, 3))


def test_format_torch_needs_trust(fixed, monkeypatch) -> None:
    """``torch.export.load`` unpickles."""
    monkeypatch.delenv(artefact.TRUST)
    monkeypatch.setattr(torch.export, 'load', lambda path: pytest.fail('was loaded'))
    with pytest.raises(UserError, match=f'format torch may contain\n.*set {artefact.TRUST}=1'):
        Artefact(fixed)


def test_manifests_of_other_programs_do_not_hide_weights(tmp_path) -> None:
    (tmp_path / MANIFEST).write_text('{"name": "an app"}')
    (tmp_path / 'model.safetensors').write_bytes(b'')
    assert not is_artefact(tmp_path)
    assert fetch_checkpoint(tmp_path) == tmp_path / 'model.safetensors'


def test_it_stands_for_a_checkpoint_with_its_classes(fixed, tmp_path) -> None:
    assert is_artefact(fixed) and not is_artefact(tmp_path) and not is_artefact('none.pth')
    path = fetch_checkpoint(fixed)
    assert path == fixed / MANIFEST and hash_checkpoint(path) == sha256(path)
    loaded = read_checkpoint(fixed)
    edit(Path(shutil.copytree(fixed, tmp_path / 'copy')), iteration=300)
    assert read_checkpoint(tmp_path / 'copy')['meta']['iter'] == 300
    assert loaded['state_dict'] == {} and loaded['meta']['dataset_meta']['classes'] == ['a', 'b', 'c']


@pytest.mark.parametrize(
    ('damage', 'message'),
    [
        (lambda f: (f / 'network.pt2').write_bytes(b'other'), 'is not the file that was exported'),
        (lambda f: (f / 'network.pt2').unlink(), 'network.pt2: is missing'),
        (lambda f: (f / MANIFEST).write_text('{'), 'manifest.json: cannot be read'),
        (
            lambda f: edit(f, schema_version=2),
            'cannot be read: schema_version: Input should be 1\n.*the release that wrote',
        ),
        (lambda f: edit(f, network='../network.pt2'), 'is missing'),
        (lambda f: edit(f, unknown=1), 'manifest.json: cannot be read: unknown: Extra inputs'),
    ],
)
def test_damaged_folders_are_errors(damage, message, fixed, tmp_path) -> None:
    folder = Path(shutil.copytree(fixed, tmp_path / 'copy'))
    damage(folder)
    with pytest.raises(UserError, match=message):
        read_manifest(folder)


@pytest.mark.parametrize('content', ['{"generator": "replk', '[]', None])
def test_a_damaged_manifest_is_named_where_a_checkpoint_is_expected(content, fixed, tmp_path) -> None:
    folder = Path(shutil.copytree(fixed, tmp_path / 'copy'))
    (folder / MANIFEST).unlink() if content is None else (folder / MANIFEST).write_text(content)
    with pytest.raises(UserError, match='manifest.json: is missing or damaged'):
        read_checkpoint(folder)


def test_the_weights_of_an_openvino_network_are_no_checkpoint(tmp_path) -> None:
    for name in ('network.xml', 'network.bin'):
        (tmp_path / name).write_bytes(b'')
    with pytest.raises(UserError, match='manifest.json: is missing or damaged'):
        fetch_checkpoint(tmp_path)


def edit(folder: Path, **changes) -> None:
    content = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps({**content, **changes}))


def test_a_file_that_no_engine_can_load(fixed, tmp_path) -> None:
    folder = Path(shutil.copytree(fixed, tmp_path / 'copy'))
    (folder / 'network.pt2').write_bytes(b'other')
    edit(folder, files={})
    with pytest.raises(UserError, match='network.pt2: torch cannot load the network'):
        Artefact(folder)


@pytest.mark.parametrize(('format', 'extra'), [('onnx', 'EXTRAS=onnx,'), ('openvino', 'EXTRAS=openvino,onnx,')])
def test_missing_engines_are_named(format, extra, fixed, tmp_path, monkeypatch) -> None:
    for name in ('onnxruntime', 'openvino', 'onnx', 'onnxscript'):
        monkeypatch.setitem(sys.modules, name, None)  # Python's way to forbid an import
    with pytest.raises(UserError, match=f'cannot be imported: .*\n.*{extra}'):
        check_format(format, 'fp32')
    folder = Path(shutil.copytree(fixed, tmp_path / 'copy'))
    edit(folder, format=format)
    with pytest.raises(UserError, match=f'cannot be imported: .*\n.*{extra}'):
        Artefact(folder)


@pytest.mark.parametrize('format', SUPPORTED)
def test_precisions_that_a_format_lacks_are_named(format) -> None:
    for precision in set(artefact.PRECISIONS) - set(SUPPORTED[format]):
        with pytest.raises(UserError, match=f'--format {format} has no {precision}'):
            check_format(format, precision)
