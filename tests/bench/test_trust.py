"""Records of other people: fields that name files, files that are no pictures, several folders, and many rows."""

import base64
import io
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from report_records import facts, files_of, metric, record, scenes, speed, write

from replk_mm.bench import records
from replk_mm.bench.report import gallery, load, render
from replk_mm.bench.report.gallery import WIDTH
from replk_mm.bench.report.load import load_report
from replk_mm.bench.report.pictures import MOST_SIDE
from replk_mm.bench.report.render import render_html, render_markdown, render_text
from replk_mm.commands import report as command

#: Color and label of the reader's own pictures.
SECRET, LABEL = (250, 5, 120), 200
RUN, DATA = 'runs/a/0', 'data/scenes'
IMAGES, LABELS = f'{DATA}/images/validation', f'{DATA}/annotations/validation'


def coco(**changes) -> dict:
    thing = dict(id=1, image_id=7, category_id=4, bbox=[10, 20, 50, 30], area=1500)
    return dict(
        images=[dict(id=7, file_name='000.jpg', height=72, width=96)],
        categories=[dict(id=4, name='disc')],
        annotations=[{**thing, **changes}],
    )


def shown_pictures(text: str) -> list[np.ndarray]:
    """RGB of the pictures of a page."""
    found = re.findall('src="data:image/(?:png|jpeg);base64,([^"]*)"', text)
    return [np.array(Image.open(io.BytesIO(base64.b64decode(data))).convert('RGB')).astype(int) for data in found]


def reveals(text: str) -> bool:
    """Whether a page shows one of the reader's images, label maps or annotations."""
    shown = (np.abs(p[p.shape[0] // 2, p.shape[1] // 2] - SECRET).max() < 12 for p in shown_pictures(text))
    return f'label {LABEL}' in text or 'secret' in text.replace(str(Path.home()), '') or any(shown)


@pytest.fixture
def own(tmp_path) -> Path:
    """A data set of the reader in ADE20K's layout, with annotations and detections."""
    root = tmp_path / 'home' / 'own'
    for folder in ('images/validation', 'annotations/validation'):
        (root / folder).mkdir(parents=True)
    for suffix in ('.jpg', '.png'):
        Image.new('RGB', (96, 72), SECRET).save(root / f'images/validation/000{suffix}', quality=95)
    Image.new('L', (96, 72), LABEL).save(root / 'annotations/validation/000.png')
    (root / 'ann.json').write_text(json.dumps(coco()).replace('disc', 'secret'))
    (root / 'instances.bbox.json').write_text(json.dumps([{**coco()['annotations'][0], 'score': 0.9}]))
    return root


def work_dir(folder: Path, objects: bool = False, files: dict | None = None, **data) -> Path:
    """A work dir with data of its own and one row, whose ``files`` and ``facts.data`` are changed."""
    root = scenes(folder / DATA, 1)
    (root / 'ann.json').write_text(json.dumps(coco()))
    names = files_of(folder, 'a', 1, 1) | (files or {})
    (folder / RUN / 'test/predictions/instances.bbox.json').write_text(
        json.dumps([{**coco()['annotations'][0], 'score': 0.9}])
    )
    data = (dict(labels=None, annotations='ann.json') if objects else {}) | data
    found = [
        metric('a', 0, 50.0, files=names, facts=facts(root, **data)),
        record('a', 0, 'erf', dict(areas_of_scores={}), files=names),
    ]
    return write(folder, found)


# -- where files may be -----------------------------------------------------------------------------------------------
#: Fields that name a file: a target in the reader's data set, and the folder that the field's value counts from.
FIELDS = {
    'files.heat_map': ('images/validation/000.png', '.'),
    'files.predictions': ('annotations/validation', '.'),
    'data.root': ('.', '.'),
    'data.images': ('images/validation', DATA),
    'data.labels': ('annotations/validation', DATA),
    'data.image_suffix': ('images/validation/000.jpg', f'{IMAGES}/000.'),
    'data.label_suffix': ('annotations/validation/000.png', f'{LABELS}/000'),
    'data.annotations': ('ann.json', DATA),
    'coco.file_name': ('images/validation/000.jpg', IMAGES),
}


@pytest.mark.parametrize('how', ['link', 'absolute', 'parents'])
@pytest.mark.parametrize('name', FIELDS)
def test_no_field_leads_out_of_the_work_dir(name, how, own, tmp_path) -> None:
    (target, start), (part, field) = FIELDS[name], name.split('.')
    target, start = own / target, tmp_path / 'home/theirs' / start
    value = dict(link='link', absolute=str(target), parents=os.path.relpath(target, start))[how]
    value = {'image_suffix': './', 'label_suffix': '/'}.get(field, '') + value
    changes = dict(files={field: value}) if part == 'files' else {field: value} if part == 'data' else {}
    folder = work_dir(tmp_path / 'home/theirs', name in ('data.annotations', 'coco.file_name'), **changes)
    if how == 'link':
        start.mkdir(exist_ok=True)
        (start / 'link').symlink_to(target)
    if part == 'coco':
        (folder / DATA / 'ann.json').write_text(json.dumps(coco()).replace('000.jpg', value))
    text = render_html(load_report([folder]))
    assert not reveals(text)
    # A suffix follows a name, so that an absolute path is none; of an image's suffix only the last part is used.
    assert 'outside of' in text or (how != 'link' and field.endswith('suffix'))


@pytest.mark.parametrize(
    ('place', 'target'),
    [
        ('runs', '..'),
        (f'{RUN}/erf/erf.png', 'images/validation/000.png'),
        (f'{RUN}/test/predictions', 'annotations/validation'),
        (f'{RUN}/test/predictions/000.png', 'annotations/validation/000.png'),
        (f'{RUN}/test/predictions/instances.bbox.json', 'instances.bbox.json'),
        ('data', '..'),
        (DATA, '.'),
        (f'{DATA}/images', 'images'),
        (f'{IMAGES}/000.jpg', 'images/validation/000.jpg'),
        (f'{LABELS}/000.png', 'annotations/validation/000.png'),
        (f'{DATA}/ann.json', 'ann.json'),
        ('results', '../theirs'),
        ('results/a.0.jsonl', '../theirs.jsonl'),
    ],
)
def test_links_in_the_place_of_files_are_not_followed(place, target, own, tmp_path) -> None:
    folder = work_dir(tmp_path / 'home/theirs', objects=place.endswith('json'))
    write(folder, [metric('b', 0, 40.0)])
    moved = (folder / place).rename(tmp_path / 'home/moved')
    target = own / target
    if place.startswith('results'):
        target = moved
    elif target == own / '..':  # the reader has folders of the same names
        target = own.rename(tmp_path / 'home/scenes').parent
        (target / 'a/0/erf').mkdir(parents=True)
        Image.new('RGB', (96, 72), SECRET).save(target / 'a/0/erf/erf.png')
    (folder / place).symlink_to(target)
    if place == 'results':
        with pytest.raises(Exception, match='outside of'):
            load_report([folder])
        return
    found = load_report([folder])
    text = render_html(found)
    assert not reveals(text) and '1 disc' not in text.partition('Ground truth')[0] and 'outside of' in text
    if place.endswith('jsonl'):
        assert [row.name for row in found.suites[0].rows] == ['b']


@pytest.mark.parametrize('place', ['Downloads/x.jsonl', 'Downloads/results/x.jsonl', 'Downloads/theirs/x.jsonl'])
def test_a_bare_file_shows_no_picture_beside_it(place, tmp_path) -> None:
    Image.new('RGB', (96, 72), SECRET).save(tmp_path / 'photo.png')
    for folder in ('', 'Downloads', 'Downloads/theirs', 'Pictures'):
        (tmp_path / folder).mkdir(exist_ok=True)
        Image.new('RGB', (96, 72), SECRET).save(tmp_path / folder / 'photo.png')
    (tmp_path / place).parent.mkdir(exist_ok=True)
    for i, name in enumerate(['photo.png', 'Pictures/photo.png', 'Downloads/photo.png', 'theirs/photo.png']):
        one = record(f'r{i}', 0, 'erf', dict(areas_of_scores={}), files=dict(heat_map=name))
        with (tmp_path / place).open('a') as file:
            file.write(json.dumps(one) + '\n')
    assert not reveals(render_html(load_report([tmp_path / place])))


def test_data_elsewhere_are_shown_if_the_reader_names_them(own, tmp_path, monkeypatch, capsys) -> None:
    """Not because they are in another work dir of the same report; the command says how."""
    folder = work_dir(tmp_path / 'home/theirs', root=str(own))
    other = write(tmp_path / 'home', [metric('b', 0, 40.0)])
    found = load_report([folder, other])
    assert not reveals(render_html(found)) and found.outside == {own} and found.data_roots() == [str(own)]
    monkeypatch.setattr('sys.argv', ['report.py', str(folder), '--out', str(tmp_path / 'out')])
    assert command.main() == 0
    assert f'--data-root {own}' in capsys.readouterr().out
    assert f'data root {own}: missing, or outside of {folder}/data' in (tmp_path / 'out/index.html').read_text()
    monkeypatch.setattr('sys.argv', [*command.sys.argv, '--data-root', str(own)])
    assert command.main() == 0
    assert '--data-root' not in capsys.readouterr().out and reveals((tmp_path / 'out/index.html').read_text())


# -- files that cost a picture, not the page --------------------------------------------------------------------------
@pytest.fixture
def alarm():
    """Interrupts what waits for a FIFO."""

    def late(*_) -> None:
        raise RuntimeError('still waiting')

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, 2)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize('place', [f'{RUN}/erf/erf.png', f'{IMAGES}/000.jpg', f'{DATA}/ann.json', 'results/b.jsonl'])
@pytest.mark.parametrize('kind', ['FIFO', 'large'])
def test_only_regular_files_of_a_bounded_size_are_read(place, kind, alarm, monkeypatch, tmp_path) -> None:
    folder = work_dir(tmp_path, objects=place.endswith('json'))
    (folder / place).unlink(missing_ok=True)
    if kind == 'FIFO':
        os.mkfifo(folder / place)
    else:
        monkeypatch.setattr(records, 'MAX_FILE_BYTES', 2**20)
        (folder / place).write_bytes(bytes(2**20 + 1))
    found = load_report([folder])
    text = render_html(found)
    assert ('larger than 1 MiB' if kind == 'large' else 'not a regular file') in text
    assert (len(shown_pictures(text)) >= 1 or place.endswith('json')) and found.suites[0].rows[0].figures[
        'metric'
    ].value


@pytest.mark.parametrize('size', [(10, 70_000), (70_000, 10)])
def test_extreme_pictures_cost_themselves_only(size, tmp_path) -> None:
    folder = work_dir(tmp_path)
    for place, mode in ((f'{IMAGES}/000.jpg', 'RGB'), (f'{RUN}/test/predictions/000.png', 'L')):
        Image.new(mode, size).save(folder / place, 'PNG')
    Image.new('RGB', (10, MOST_SIDE)).save(folder / RUN / 'erf/erf.png')
    text = render_html(load_report([folder]))
    assert text.count(f'missing: not a readable picture ({size[0]} x {size[1]} pixels are too many)') == 2
    assert len(shown_pictures(text)) == 2  # the label map, and the receptive field: its sides are just allowed
    assert max(max(pixels.shape) for pixels in shown_pictures(text)) < 4000


def test_pictures_run_no_program(tmp_path, monkeypatch) -> None:
    """Pillow would give PostScript, whatever the name of its file, to Ghostscript."""
    folder = work_dir(tmp_path / 'theirs')
    (folder / RUN / 'erf/erf.png').write_bytes(
        b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n'
    )
    (tmp_path / 'gs').write_text(f'#!/bin/sh\ntouch {tmp_path}/ran\n')
    (tmp_path / 'gs').chmod(0o755)
    monkeypatch.setenv('PATH', str(tmp_path), prepend=os.pathsep)
    tool = Path(__file__).parents[2] / 'tools/report.py'
    subprocess.run([sys.executable, tool, folder, '--out', tmp_path / 'out'], check=True)
    assert 'missing: not a readable picture' in (tmp_path / 'out/index.html').read_text()
    assert not (tmp_path / 'ran').exists()


def test_images_are_chosen_quickly(alarm) -> None:
    names = [f'{i}.jpg' for i in range(60_000)]
    found = gallery.Gallery()
    assert len(gallery._choose(found, [(names, {}), (names, {})])) == gallery.MOST_IMAGES
    assert gallery._choose(found, [([], {}), ([], {})]) == []


def test_objects_that_fail_cost_one_picture(tmp_path) -> None:
    """An empty polygon in the ground truth, an image without a name, and detections of one row that are no list."""
    folder = work_dir(tmp_path, objects=True)
    annotated = coco(segmentation=[[]])
    annotated['images'].append(dict(id=8, height=72, width=96))
    (folder / DATA / 'ann.json').write_text(json.dumps(annotated))
    predictions = folder / RUN / 'test/predictions/instances.bbox.json'
    predictions.write_text(json.dumps([{**coco()['annotations'][0], 'score': 0.9}]))
    of = facts(folder / DATA, labels=None, annotations='ann.json')
    for row in ('b', 'c'):
        (folder / f'runs/{row}').mkdir()
        write(folder, [metric(row, 0, 40.0, files=dict(predictions=f'runs/{row}'), facts=of)])
    (folder / 'runs/b/instances.bbox.json').write_text('7')
    (folder / 'runs/c/instances.bbox.json').write_bytes(predictions.read_bytes())
    text = render_html(load_report([folder]))
    assert 'missing: a polygon of 0 values' in text and text.count(': 1 disc"') == 2
    assert re.search('missing: .int. object is not iterable', text.replace('&#39;', "'"))


def test_large_images_are_drawn_small(tmp_path) -> None:
    """A mask of a 2000 x 1200 image is at the same share of the smaller picture."""
    mask = pytest.importorskip('pycocotools.mask')
    folder = work_dir(tmp_path, objects=True)
    Image.new('RGB', (2000, 1200), (200, 200, 200)).save(folder / IMAGES / '000.jpg')
    square = np.zeros((1200, 2000), np.uint8, order='F')
    square[300:900, 500:1000] = 1
    runs = dict(size=[1200, 2000], counts=mask.encode(square)['counts'].decode())
    outline = [[500, 300, 1000, 300, 1000, 900, 500, 900]]
    (folder / DATA / 'ann.json').write_text(json.dumps(coco(segmentation=outline, bbox=[500, 300, 500, 600])))
    detection = dict(image_id=7, category_id=4, score=0.9, segmentation=runs)
    (folder / RUN / 'test/predictions/instances.segm.json').write_text(json.dumps([detection]))
    drawn = [
        pixels
        for pixels in shown_pictures(render_html(load_report([folder])))
        if pixels.shape[1] == WIDTH and pixels.std() > 1
    ]
    assert len(drawn) == 2
    for pixels in drawn:
        height, width = pixels.shape[:2]
        colored = np.abs(pixels - pixels.mean(-1, keepdims=True)).max(-1) > 20
        expected = np.zeros((height, width), bool)
        expected[round(height / 4) : round(3 * height / 4), round(width / 4) : round(width / 2)] = True
        expected[: height // 4 + 3] = colored[: height // 4 + 3] = False  # the label above the box
        assert (colored != expected).mean() < 0.02


def test_a_line_is_bounded(tmp_path) -> None:
    """A key of 5 MB."""
    folder = write(tmp_path, [metric('a', 0, 50.0), metric('b', 0, 40.0, protocol={'x' * 5_000_000: 1})])
    found = load_report([folder])
    assert [row.name for row in found.suites[0].rows] == ['a'] and 'longer than 4 MiB' in found.complaints[0]


# -- several folders --------------------------------------------------------------------------------------------------
LATE = '2031-01-01T00:00:00+00:00'


def test_records_of_another_folder_do_not_replace_ones_own(tmp_path) -> None:
    """The same key with other values, and another definition of the row, are both reported; equal copies are not."""
    same = speed('a', 0, 9.0)
    mine = write(tmp_path / 'mine', [metric('a', 0, 50.0), metric('b', 0, 40.0), same])
    others = [metric('a', 0, 90.0, started=LATE), metric('b', 0, 95.0, started=LATE, key='other'), same]
    theirs = write(tmp_path / 'theirs', others)
    for order, expected in (([mine, theirs], [50.0, 40.0]), ([theirs, mine], [95.0, 90.0])):
        found = load_report(order)
        assert [row.figures['metric'].value for row in found.suites[0].rows] == expected
        first, second = sorted(found.complaints)
        assert first.startswith(f'{order[1]}/results/a.0.jsonl:1: a, 0, metric: values differ from ')
        assert f' at {order[0]}/results/a.0.jsonl:1' in first
        assert second.startswith(f'{order[1]}/results/b.0.jsonl:1: b, 0, metric: key and values differ')
    failed = write(tmp_path / 'failed', [metric('a', 0, 50.0, status='failed', reason='no memory')])
    found = load_report([failed, mine])
    assert [row.figures['metric'].value for row in found.suites[0].rows] == [50.0, 40.0]
    assert len(found.complaints) == 1 and 'status' in found.complaints[0]


def test_rows_say_which_folders_they_come_from(tmp_path, monkeypatch) -> None:
    mine = write(tmp_path / 'mine', [metric('a', seed, 50.0) for seed in (0, 1)] + [metric('b', 0, 40.0)])
    theirs = write(tmp_path / 'theirs', [metric('a', 2, 60.0), metric('c', 0, 30.0)])
    monkeypatch.chdir(mine)
    found = load_report([mine / 'results/a.0.jsonl', mine, theirs])
    rows = {row.name: row.source for row in found.suites[0].rows}
    assert rows == dict(a='seeds 0, 1 from .; seed 2 from ../theirs', b='seed 0 from .', c='seed 0 from ../theirs')
    for text in (render_html(found), render_markdown(found).replace('\\', ''), render_text(found.suites[0])):
        assert all(source in text for source in rows.values())
    assert ' from ' not in render_text(load_report([mine]).suites[0])


# -- many rows --------------------------------------------------------------------------------------------------------
def test_plots_and_pictures_show_the_best_rows(tmp_path, monkeypatch) -> None:
    most, count = 3, 5
    monkeypatch.setattr(render, 'MOST_ROWS', most)
    data = scenes(tmp_path / DATA, 1)
    files = files_of(tmp_path, 'a', 1, 1)
    found = []
    for i in range(count):
        found.append(metric(f'r{i}', 0, 50.0 - i / 10, files=files, facts=facts(data)))
        found.append(speed(f'r{i}', 0, 9.0 + i))
        found.append(record(f'r{i}', 0, 'erf', dict(areas_of_scores={}), files=files))
        found.append(record(f'r{i}', 0, 'curve', dict(loss=[[1, 2.0], [2, 1.0]])))
    text = render_html(load_report([write(tmp_path, found)]))
    for begin, end in (
        ('<strong>mIoU against time</strong>', '</figure>'),
        ('<h3>Learning curves</h3>', '</section>'),
        ('<h3>Effective receptive fields</h3>', '</section>'),
    ):
        part = text.partition(begin)[2].partition(end)[0]
        assert f'The best {most} of {count} rows.' in part
        assert f' r{most - 1}' in part and f' r{most}' not in part
    assert text.count('<tr data-row=') == count


def test_the_work_per_row_does_not_grow_with_the_number_of_rows(tmp_path, monkeypatch) -> None:
    calls = []
    original = load.protocol_key
    monkeypatch.setattr(load, 'protocol_key', lambda content: calls.append(1) or original(content))

    def work(count: int) -> int:
        folder = write(tmp_path / str(count), [metric(f'r{i}', 0, 50.0, protocol=dict(i=i)) for i in range(count)])
        calls.clear()
        render_html(load_report([folder]))
        return len(calls)

    assert work(60) < 4.5 * work(15)


def test_plots_of_many_protocols_are_bounded(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(render, 'MOST_PLOTS', 2)
    rows = [(f'{i}{k}', dict(i=i)) for i in 'abc' for k in range(2)]
    found = [r for name, of in rows for r in (metric(name, 0, 50.0, protocol=of), speed(name, 0, 9.0))]
    text = render_html(load_report([write(tmp_path, found)]))
    assert text.count('class="plot"') == 2 and 'No more than 2 plots are shown.' in text
