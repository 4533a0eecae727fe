"""Archives of results: what is in them, and what those of strangers cannot do."""

import shutil
import stat
import tempfile
import zipfile
from pathlib import Path

import pytest
from report_records import facts, files_of, metric, record, scenes, write

from replk_mm.bench import submission
from replk_mm.bench.report.load import load_report
from replk_mm.bench.report.render import render_html
from replk_mm.bench.submission import open_submissions, pack
from replk_mm.errors import UserError

MANIFEST = ('submission.json', b'{"generator": "replk_mm", "format": 1}')


def work_dir(folder: Path, **changes) -> Path:
    """One row with predictions, a training with a checkpoint, and data."""
    files = files_of(folder, 'a', 1, 2)
    train = folder / 'runs/a/0/train'
    train.mkdir(parents=True)
    (train / 'iter_3.pth').write_bytes(b'weights')
    (train / 'upernet.py').write_text('model = dict()\n')
    found = [
        metric('a', 0, 50.0, files=files, **changes),
        record('a', 0, 'train', dict(seconds=1.0), files=dict(work_dir='runs/a/0/train')),
    ]
    return write(folder, found)


@pytest.fixture(autouse=True)
def temporary(tmp_path, monkeypatch) -> Path:
    """The folder for temporary files, which must be empty at the end."""
    folder = tmp_path / 'temporary'
    folder.mkdir()
    monkeypatch.setattr(tempfile, 'tempdir', str(folder))
    yield folder
    assert not list(folder.iterdir())


def test_an_archive_has_all_but_checkpoints_and_data(tmp_path) -> None:
    folder = work_dir(tmp_path / 'w')
    scenes(folder / 'data', 1)
    assert pack([folder], tmp_path / 'a.zip') == 6
    with zipfile.ZipFile(tmp_path / 'a.zip') as file:
        assert file.namelist() == [
            'submission.json',
            'results/a.0.jsonl',
            'runs/a/0/config.txt',
            'runs/a/0/erf/erf.png',
            'runs/a/0/test/predictions/000.png',
            'runs/a/0/test/predictions/001.png',
        ]
        assert file.read('runs/a/0/config.txt') == b'model = dict()\n'
        assert file.read('results/a.0.jsonl') == (folder / 'results/a.0.jsonl').read_bytes()
    other = work_dir(tmp_path / 'same')  # written at another time
    pack([other], tmp_path / 'b.zip')
    assert (tmp_path / 'a.zip').read_bytes() == (tmp_path / 'b.zip').read_bytes()


def test_a_report_reads_archives_beside_folders(tmp_path, monkeypatch) -> None:
    """The row says where it comes from; the folder is first, so that its figure counts."""
    pack([work_dir(tmp_path / 'w')], tmp_path / 'theirs.zip')
    mine = write(tmp_path / 'mine', [metric('a', 0, 60.0), metric('b', 0, 40.0)])
    monkeypatch.chdir(tmp_path)
    with open_submissions(['mine', 'theirs.zip']) as paths:
        report = load_report(paths)
        rows = {row.name: row for row in report.suites[0].rows}
        assert rows['a'].figures['metric'].value == 60.0 and paths[0] == Path(mine.name)
        assert any('values differ from the record of another folder' in text for text in report.complaints)
    with open_submissions(['theirs.zip', 'mine']) as paths:
        rows = {row.name: row for row in load_report(paths).suites[0].rows}
        assert rows['a'].figures['metric'].value == 50.0
        assert (rows['a'].source, rows['b'].source) == ('seed 0 from theirs.zip', 'seed 0 from mine')


@pytest.mark.parametrize('damage', ['missing', 'link', 'two work dirs', 'damaged record', 'nothing'])
def test_what_cannot_be_packed(damage, tmp_path) -> None:
    folder, paths = work_dir(tmp_path / 'w'), [tmp_path / 'w']
    png = folder / 'runs/a/0/test/predictions/000.png'
    if damage in ('missing', 'link'):
        (folder / 'runs/a/0/erf/erf.png').unlink()
    if damage == 'link':
        (tmp_path / 'secret').write_text('secret')
        (folder / 'runs/a/0/erf/erf.png').symlink_to(tmp_path / 'secret')
    if damage == 'two work dirs':
        paths.append(write(tmp_path / 'other', [metric('b', 0, 1.0)]))
    if damage == 'damaged record':
        (folder / 'results/a.0.jsonl').write_text('{')
    if damage == 'nothing':
        paths = [png.parent]
    expected = {'missing': 'erf.png: missing', 'link': 'erf.png: leads outside of'}.get(damage, 'cannot be packed')
    with pytest.raises(UserError, match=expected):
        pack(paths, tmp_path / 'a.zip')
    assert not [path for path in tmp_path.iterdir() if 'a.zip' in path.name]


def test_an_archive_that_cannot_be_written_is_named(tmp_path) -> None:
    with pytest.raises(UserError, match=r'^\S*/missing/\.a\.zip\.part: No such file'):
        pack([work_dir(tmp_path / 'w')], tmp_path / 'missing' / 'a.zip')


# -- archives of strangers --------------------------------------------------------------------------------------------
def archive(path: Path, *entries: tuple) -> Path:
    """An archive of names, contents and changes of their entries."""
    with zipfile.ZipFile(path, 'w') as file:
        for name, content, *changes in entries:
            info = zipfile.ZipInfo(name)
            info.compress_type = zipfile.ZIP_DEFLATED
            for key, value in dict(*changes).items():
                setattr(info, key, value)
            file.writestr(info, content)
    return path


def files_in(folder: Path) -> set[str]:
    return {str(path) for path in folder.rglob('*')}


HOSTILE = {
    'absolute': [('/tmp/replk_mm_hostile', b'x')],
    'parents': [('runs/../../hostile', b'x')],
    'dots at the start': [('../hostile', b'x')],
    'data': [('data/scenes/annotations/validation/000.png', b'x')],
    'config': [('configs/upernet.py', b'x')],
    'file and folder': [('runs/a', b'x'), ('runs/a/b', b'y')],
    'long name': [(f'runs/{"a" * 300}', b'x')],
    'other compression': [('runs/a', b'x', dict(compress_type=zipfile.ZIP_LZMA))],
    'too large': [('runs/a', b'0' * 2**16)],
    'too large together': [(f'runs/{i}', b'0' * 2**14) for i in range(5)],
    'too many': [(f'runs/{i}', b'') for i in range(20)],
}


@pytest.mark.parametrize('what', HOSTILE)
def test_hostile_archives_are_rejected(what, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(submission.records, 'MAX_FILE_BYTES', 2**15)
    monkeypatch.setattr(submission, 'MOST_BYTES', 2**16)
    monkeypatch.setattr(submission, 'MOST_FILES', 10)
    path = archive(tmp_path / 'a.zip', MANIFEST, *HOSTILE[what])
    before = files_in(tmp_path)
    with pytest.raises(UserError, match=f'^{path}: not a submission: '), open_submissions([path]):
        pass
    assert files_in(tmp_path) == before and not Path('/tmp/replk_mm_hostile').exists()


@pytest.mark.parametrize('kind', [stat.S_IFLNK, stat.S_IFIFO])
def test_links_and_special_files_become_plain_ones(kind, tmp_path) -> None:
    entry = ('runs/a', b'/etc/passwd', dict(external_attr=(kind | 0o777) << 16))
    with open_submissions([archive(tmp_path / 'a.zip', MANIFEST, entry, ('runs/..\\b', b'x'))]) as [folder]:
        files = [path for path in folder.rglob('*') if not path.is_dir()]
        assert len(files) == 3 and all(path.is_file() and not path.is_symlink() for path in files)
        assert (folder / 'runs/a').read_bytes() == b'/etc/passwd'


def test_a_size_that_is_too_small_does_not_fill_the_disk(tmp_path, monkeypatch) -> None:
    """The sizes in the archive are the limit, whatever the data would unpack to."""
    path = archive(tmp_path / 'a.zip', MANIFEST, ('runs/a', b'0' * 1_234_567))
    content, size = path.read_bytes(), (1_234_567).to_bytes(4, 'little')
    assert content.count(size) == 2
    path.write_bytes(content.replace(size, (7).to_bytes(4, 'little')))
    written = []
    original = shutil.copyfileobj

    def copy(source, target) -> None:
        try:
            original(source, target)
        finally:
            written.append(target.tell())

    monkeypatch.setattr(shutil, 'copyfileobj', copy)
    with pytest.raises(UserError, match='not a submission: '), open_submissions([path]):
        pass
    assert 0 < max(written) < 100


@pytest.mark.parametrize(
    'content',
    [b'', b'PK', b'not an archive', None, [('results/a.jsonl', b'')], [(MANIFEST[0], b'{"format": 2}')]],
    ids=['empty', 'cut', 'text', 'truncated', 'no manifest', 'of the future'],
)
def test_what_is_no_submission(content, tmp_path) -> None:
    path = tmp_path / 'a.zip'
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        archive(path, *(content or [MANIFEST, ('runs/a', bytes(range(256)) * 99)]))
    if content is None:
        path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(UserError, match='not a submission'), open_submissions([path]):
        pass


def test_the_text_of_an_archive_is_text_and_its_code_is_not_run(tmp_path) -> None:
    ran, own = tmp_path / 'ran', scenes(tmp_path / 'own', 2)
    code = f'open({str(ran)!r}, "w")\n'
    (tmp_path / 'config.py').write_text(code)
    label = '<script>alert(1)</script>'
    config = dict(path=str(tmp_path / 'config.py'), sha256='c' * 64, options={label: label})
    folder = work_dir(tmp_path / 'w', label=label, config=config, facts=facts(own))
    (folder / 'runs/a/0/train/upernet.py').write_text(code)
    pack([folder], tmp_path / 'a.zip')
    with open_submissions([tmp_path / 'a.zip']) as paths:
        report = load_report(paths)
        page = render_html(report)
        assert label not in page and '&lt;script&gt;alert(1)&lt;/script&gt;' in page
        assert report.outside == {own}  # its pictures are not shown
        assert not list(paths[0].rglob('*.py'))
    assert not ran.exists()
