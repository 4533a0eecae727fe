"""Output: atomic writes with the permissions of the umask, and files that commands must not replace."""

import io
import os
import resource
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from replk_mm.engine.process import prepare_work_dir
from replk_mm.engine.record import write_record
from replk_mm.errors import UserError
from replk_mm.files import check_outputs, write_atomic, write_output


@pytest.mark.parametrize(('umask', 'mode'), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_the_umask_sets_the_permissions(umask, mode, tmp_path):
    before = os.umask(umask)
    try:
        path = write_atomic(tmp_path / 'new' / 'a.pth', b'weights')
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == mode


@pytest.mark.parametrize('target', ['thesis.txt', 'not_there'])
def test_links_are_replaced_and_not_followed(target, tmp_path):
    (tmp_path / 'thesis.txt').write_text('my thesis')
    (tmp_path / 'a.md').symlink_to(tmp_path / target)
    (tmp_path / f'a.md.{os.getpid()}.part').symlink_to(tmp_path / target)
    (tmp_path / f'.write-test-{os.getpid()}').symlink_to(tmp_path / target)
    prepare_work_dir(tmp_path)
    write_atomic(tmp_path / 'a.md', 'text')
    assert (tmp_path / 'thesis.txt').read_text() == 'my thesis' and not (tmp_path / 'not_there').exists()
    assert not (tmp_path / 'a.md').is_symlink() and (tmp_path / 'a.md').read_text() == 'text'


def test_a_full_disk_leaves_the_old_file(tmp_path):
    path = write_atomic(tmp_path / 'index.html', 'old')
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))  # the system stops the write in the middle
    try:
        with pytest.raises(UserError, match='index.html: cannot be written'):
            write_output(path, 'n' * 5000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_text() == 'old' and list(tmp_path.iterdir()) == [path]


def make(folder: Path, kind: str) -> Path:
    """A file named ``out.KIND`` that a command has written."""
    path = folder / f'out.{kind}'
    if kind == 'json':
        write_record({'values': [1, 2]}, path)
    else:
        content = {'png': cv2.imencode('.png', np.arange(12, dtype=np.uint8).reshape(3, 4))[1].tobytes()}
        write_output(path, content.get(kind, '# Text\n'))
    return path


@pytest.mark.parametrize('kind', ['html', 'md', 'png', 'json'])
def test_own_files_are_replaced_and_others_are_not(kind, tmp_path):
    path = make(tmp_path, kind)
    check_outputs([path])
    beside = path.with_suffix('.txt')
    beside.write_text('a table')
    check_outputs([path, beside])
    for content in (b'', b'my thesis about replk_mm', b'\x89PNG\r\n\x1a\n' + bytes(200)):
        path.write_bytes(content)
        for paths in ([path], [path, beside], [beside, path]):
            with pytest.raises(UserError, match='not marked as written by .*\n.*--overwrite'):
                check_outputs(paths)
        check_outputs([path], overwrite=True)


def test_a_page_of_ones_own_beside_an_own_file(tmp_path):
    report, page = make(tmp_path, 'md'), tmp_path / 'index.html'
    page.write_text('<h1>my home page</h1>')
    with pytest.raises(UserError, match='index.html: exists'):
        check_outputs([page, report])


@pytest.mark.parametrize('overwrite', [False, True])
@pytest.mark.parametrize('what', ['folder', 'fifo', 'link to a folder', 'input', 'link to an input'])
def test_never_replaced(what, overwrite, tmp_path):
    path, other = tmp_path / 'a.png', tmp_path / 'other'
    {
        'folder': path.mkdir,
        'fifo': lambda: os.mkfifo(path),
        'link to a folder': lambda: (other.mkdir(), path.symlink_to(other)),
        'input': lambda: write_output(path, b'picture'),
        'link to an input': lambda: (other.touch(), path.symlink_to(other)),
    }[what]()
    inputs = [tmp_path / 'x' / '..' / 'a.png', other] if 'input' in what else []
    with pytest.raises(UserError, match='is an input' if inputs else 'is not a regular file'):
        check_outputs([path], inputs=inputs, overwrite=overwrite)


@pytest.mark.parametrize('target', ['own.md', 'not_there'])
def test_links_need_a_permission(target, tmp_path):
    write_output(tmp_path / 'own.md', 'text')
    (tmp_path / 'a.md').symlink_to(target)
    with pytest.raises(UserError, match='a.md: is a link\n.*--overwrite'):
        check_outputs([tmp_path / 'a.md'])
    check_outputs([tmp_path / 'a.md'], overwrite=True)


def test_a_marked_picture_has_the_same_pixels(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (5, 7, 3), dtype=np.uint8)
    plain = io.BytesIO()
    Image.fromarray(pixels).save(plain, 'PNG')
    with Image.open(write_output(tmp_path / 'a.png', plain.getvalue())) as image:
        assert np.array_equal(np.asarray(image), pixels) and image.text == {'Software': 'replk_mm'}
    assert np.array_equal(cv2.imread(str(tmp_path / 'a.png'))[..., ::-1], pixels)
    for kind in ('JPEG', 'WEBP'):
        plain = io.BytesIO()
        Image.fromarray(pixels).save(plain, kind)
        path = write_output(tmp_path / f'a.{kind.lower()}', plain.getvalue())
        check_outputs([path])
        with Image.open(path) as image:
            assert np.array_equal(np.asarray(image), np.asarray(Image.open(plain)))
