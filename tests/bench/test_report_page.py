"""The report's page: what is in it, that nothing gets out of it, its pictures and svg. All records are made up."""

import base64
import hashlib
import html.parser
import io
import json
import math
import re
import statistics

import numpy as np
import pytest
from PIL import Image
from report_records import (
    PALETTE,
    PROTOCOL,
    facts,
    files_of,
    found,  # noqa: F401
    label_map,
    metric,
    page,  # noqa: F401
    record,
    scenes,
    speed,
    suite,  # noqa: F401
    write,
)

from replk_mm.bench.records import StoredRecord
from replk_mm.bench.report import plots
from replk_mm.bench.report.load import load_report
from replk_mm.bench.report.pictures import Album, SplitFiles
from replk_mm.bench.report.render import _over_seeds, render_html, render_markdown

# ruff: noqa: F811 (fixtures that come from another file)


def parsed(text: str) -> list[tuple[str, dict]]:
    """All elements with their attributes."""
    found = []

    class Parser(html.parser.HTMLParser):
        def handle_starttag(self, tag, attrs):
            found.append((tag, {name: value or '' for name, value in attrs}))

    Parser().feed(text)
    return found


HOSTILE = '<script>alert(1)</script>"\'><img src=x onerror=alert(2)>|`#*\ud800\x00\u202e' + 'x' * 5000


def test_texts_of_records_stay_texts(tmp_path) -> None:
    ranked = metric('b', 0, 50.0, suite='t')
    ranked['values'].update(primary=HOSTILE, unit=HOSTILE, metrics={HOSTILE: 50.0})
    folder = write(
        tmp_path / 'work',
        [
            ranked,
            metric(
                'a',
                0,
                50.0,
                label=HOSTILE,
                question=HOSTILE,
                suite='s',
                protocol={**PROTOCOL, HOSTILE: HOSTILE},
                environment={HOSTILE: HOSTILE},
                files=dict(predictions=HOSTILE),
                facts=dict(data=dict(root=HOSTILE)),
            ),
            record('a', 1, 'train', {}, suite='s', label=HOSTILE, status='failed', reason=HOSTILE),
            speed('a', 0, 9.0, suite='s', label=HOSTILE),
            record('a', 0, 'curve', dict(loss=[[1, 2.0], [2, 1.0]], metric=[], name=HOSTILE), suite='s', label=HOSTILE),
        ],
    )
    found = load_report([folder])
    text = render_html(found)
    text.encode()
    elements = parsed(text)
    assert sum(tag == 'script' for tag, _ in elements) == 1
    assert not [tag for tag, given in elements if any(name.startswith('on') for name in given)]
    assert all(given['src'].startswith('data:image/svg+xml;') for tag, given in elements if tag == 'img')
    assert not re.search('[\ud800-\udfff\x00\u202e]', text) and 'x' * 601 not in text
    written = render_markdown(found)
    written.encode()
    assert '<script' not in re.sub(r'\\<', '', written) and not re.search(r'(?<!\\)<', written)
    rows = [line for line in written.splitlines() if line.startswith('| 1 ')]
    assert len(re.findall(r'(?<!\\)\|', rows[0])) == len(found.suites[0].columns) + 3


# -- the page ---------------------------------------------------------------------------------------------------------
def test_page_needs_nothing_else_and_hangs_together(page) -> None:
    elements = parsed(page)
    ids = [given['id'] for _, given in elements if 'id' in given]
    assert len(ids) == len(set(ids)) > 5
    assert {given['href'] for _, given in elements if 'href' in given} <= {f'#{one}' for one in ids}
    assert {given['aria-labelledby'] for _, given in elements if 'aria-labelledby' in given} <= set(ids)
    sources = [given['src'] for _, given in elements if 'src' in given]
    assert len(sources) > 20 and all(source.startswith('data:image/') for source in sources)
    assert not [
        tag for tag, given in elements if 'style' in given or tag in ('link', 'iframe', 'object', 'embed', 'base')
    ]
    assert all(len(given['alt']) > 5 for tag, given in elements if tag == 'img' and given.get('class') != 'sample')
    plotted = [given for tag, given in elements if given.get('class') == 'plot']
    assert len(plotted) == 7 and 'RepLKNet made up, 31x31: Time, ms 24.1' in plotted[0]['alt']
    assert all(given['srcset'].startswith('data:image/') for tag, given in elements if tag == 'source')


def test_policy_allows_this_style_and_script_only(page) -> None:
    policy = next(given['content'] for _, given in parsed(page) if given.get('http-equiv') == 'Content-Security-Policy')
    assert policy.startswith("default-src 'none'; ") and 'unsafe' not in policy
    for name in ('style', 'script'):
        content = re.search(f'<{name}>(.*?)</{name}>', page, re.DOTALL)[1]
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{name}-src 'sha256-{digest}'" in policy


def test_provenance_of_every_row(page) -> None:
    parts = re.findall(r'<details id="s1-row-\d+".*?(?=<details id=|<script>)', page, re.DOTALL)
    assert len(parts) == 5
    for part in parts:
        for said in ('c' * 12, 'e' * 12, 'f' * 12, 'with changes', 'Made-up CPU', '2001-01-01', 'torch'):
            assert said in part


def test_markdown_keeps_protocols_apart(found) -> None:
    text = render_markdown(found)
    tables = [part for part in text.split('\n\n') if part.startswith('| Row')]
    assert [part.count('\n') - 1 for part in tables] == [3, 1, 1]
    assert 'Differs from A, and is not ranked with it' in text and 'S2 (speed) differs from S1' in text
    assert '60.60 ± 0.60 (n = 3)' in tables[0]


def class_rows(page: str) -> list[list[str]]:
    """The cells of the table of classes."""
    table = page.partition('<table class="classes">')[2].partition('</table>')[0]
    return [re.findall('<t[hd][^>]*>(.*?)</t[hd]>', line) for line in re.findall('<tr>(.*?)</tr>', table)]


def test_figures_of_every_class(tmp_path) -> None:
    """The mean over seeds; a class that a row lacks is missing. AP is recorded as a fraction."""
    records = []
    for seed, sky in enumerate((80.0, 90.0)):
        of = dict(ground=dict(IoU=50.0, pixels=25), sky=dict(IoU=sky, pixels=75))
        records += [metric('a', seed, 60.0), metric('b', seed, 50.0)]
        records[-2]['values']['per_class'], records[-1]['values']['per_class'] = of, dict(sky=of['sky'])
    page = render_html(load_report([write(tmp_path / 'a', records)]))
    assert class_rows(page) == [
        ['Class', 'Share', '1 a', '2 b'],
        ['sky', '75.0 %', '85.0', '85.0'],
        ['ground', '25.0 %', '50.0', '–'],
    ]
    values = dict(metrics={'coco/segm_mAP': 31.5}, primary='coco/segm_mAP', unit='AP')
    values['per_class'] = {'<b>': dict(instances=4, bbox_mAP=0.9, segm_mAP=0.25)}
    page = render_html(load_report([write(tmp_path / 'b', [record('a', 0, 'metric', values, protocol=PROTOCOL)])]))
    assert class_rows(page)[1:] == [['&lt;b&gt;', '100.0 %', '25.0']] and 'Mask AP of 1 class, protocol A' in page


def test_the_heading_states_how_a_protocol_trained(tmp_path) -> None:
    protocol = {**PROTOCOL, 'protocol': 'head', 'fraction': 10, 'recipe': dict(origin='common', lr=0.001)}
    notes = ['schedule: 300 iterations instead of 1200 iterations (replk_mm.IterBasedTrainLoop)']
    trained = record('a', 0, 'train', dict(seconds=9.0, iterations=300), facts=dict(notes=notes))
    page = render_html(load_report([write(tmp_path, [metric('a', 0, 50.0, protocol=protocol), trained])]))
    said = 'fixed backbone, 10 % of the training images, 300 iterations, 25 % of the schedule, no pretraining'
    assert f'<strong>Protocol A</strong>: {said}; common recipe, learning rate 0.001</summary>' in page


# -- pictures ---------------------------------------------------------------------------------------------------------
def pictures(text: str, kind: str) -> dict[str, np.ndarray]:
    """RGB of the pictures of a page, by their texts."""
    found = re.findall(f'<img src="data:image/{kind};base64,([^"]*)" alt="([^"]*)"', text)
    return {name: np.array(Image.open(io.BytesIO(base64.b64decode(data))).convert('RGB')) for data, name in found}


def test_predicted_label_maps_have_the_colours_of_their_classes(page) -> None:
    of = pictures(page, 'png')
    assert sum(name.startswith('Ground truth of') for name in of) == 5  # of seven images
    truth = next(pixels for name, pixels in of.items() if name.startswith('Ground truth of 004'))
    predicted, name = next(
        (pixels, name) for name, pixels in of.items() if name.startswith('RepLKNet made up, 13x13, 004')
    )
    colours = np.array([[0, 0, 0], *PALETTE])
    np.testing.assert_array_equal(truth, colours[label_map(4)])
    np.testing.assert_array_equal(predicted, colours[label_map(4, 5)])
    right = 100 * np.mean(label_map(4) == label_map(4, 5))
    assert f'{right:.0f}\u00a0% of the scored pixels right' in name


def test_pixels_that_are_not_scored_do_not_count(tmp_path) -> None:
    data = scenes(tmp_path / 'data', 1)
    truth = label_map(0)
    truth[:60] = 0
    Image.fromarray(truth).save(data / 'annotations/validation/000.png')
    files = files_of(tmp_path, 'a', 5, 1)
    text = render_html(load_report([write(tmp_path, [metric('a', 0, 50.0, files=files, facts=facts(data))])]))
    right = 100 * np.mean(label_map(0)[60:] == label_map(0, 5)[60:])
    assert f'{right:.0f}\u00a0% of the scored pixels right' in text


def test_label_maps_of_cityscapes_are_found(tmp_path) -> None:
    of = facts(
        tmp_path,
        images='i',
        labels='l',
        image_suffix='_leftImg8bit.png',
        label_suffix='_gtFine_labelTrainIds.png',
        ignored=255,
    )
    data = SplitFiles.model_validate(of['data'])
    assert data.image_of('city/x_leftImg8bit.png') == tmp_path / 'i/city/x_leftImg8bit.png'
    assert data.label_of('city/x_leftImg8bit.png') == tmp_path / 'l/city/x_gtFine_labelTrainIds.png'
    assert data.first == 0


def test_data_of_a_copied_work_dir_are_found(tmp_path) -> None:
    data = scenes(tmp_path / 'work/data/scenes')
    one = StoredRecord(metric('a', 0, 50.0, facts=facts('/elsewhere/data/scenes')), tmp_path / 'work')
    assert Album().data_of(one).root == data
    elsewhere = StoredRecord(one, tmp_path)
    with pytest.raises(ValueError, match='missing, or outside of'):
        Album().data_of(elsewhere)
    assert Album([data]).data_of(elsewhere).root == data


def test_profiles_of_robustness_stand_side_by_side(tmp_path) -> None:
    files = dict(profile=files_of(tmp_path, 'a', 0, 1)['heat_map'])
    values = dict(images=16, relative=dict(value=61.4))
    records = [record(row, 0, 'robustness', values, files=files, protocol=dict(seed=0)) for row in 'ab']
    page = render_html(load_report([write(tmp_path, records)]))
    for row in 'ab':
        assert f'alt="Robustness of {row}: R1, 16 images, 61 % of the clean metric"' in page


def test_missing_pictures_are_listed(tmp_path) -> None:
    data = scenes(tmp_path / 'data', 2)
    files = files_of(tmp_path, 'a', 0, 2)
    (data / 'images/validation/000.jpg').write_bytes(b'no picture')
    (data / 'annotations/validation/001.png').unlink()
    (tmp_path / files['heat_map']).unlink()
    records = [
        metric('a', 0, 50.0, files=files, facts=facts(data)),
        metric('b', 0, 49.0, files=dict(predictions='../../etc'), facts=facts(data)),
        record('a', 0, 'erf', dict(areas_of_scores={}), files=dict(heat_map=files['heat_map'])),
    ]
    text = render_html(load_report([write(tmp_path, records)]))
    missing = text[text.index('id="missing-pictures"') :]
    for said in (
        '000.jpg: not a readable picture',
        '001.png: not a readable picture (No such file or directory)',
        'erf.png: not a readable picture',
    ):
        assert said in missing, said
    assert 'Missing from the gallery: Predictions of b: leads outside of' in text
    assert text.count('>missing: ') >= 2


def test_pictures_of_a_page_are_bounded() -> None:
    album = Album(left=2000)
    noise = np.random.default_rng(0).integers(0, 255, (300, 400, 3), dtype=np.uint8)
    assert album.add(noise, '', 'noise', 100).source is None and 'noise: left out' in album.problems[0]
    flat = album.add(np.zeros((300, 400, 3), np.uint8), '', 'flat', 100, 'labels')
    assert (flat.width, flat.height) == (100, 75) and album.left == 2000 - len(flat.source)


@pytest.mark.parametrize(
    'changes',
    [
        dict(bbox=[1e308] * 4),
        dict(bbox=['a'] * 4),
        dict(score='x'),
        dict(category_id=[]),
        dict(segmentation=dict(size=[60, 80], counts=[-5, 9999])),
        dict(segmentation=[[0, 0, 1e12, 0, 1e12, 1e12]]),
    ],
    ids=str,
)
def test_odd_objects_are_drawn_or_reported(changes, tmp_path) -> None:
    data = scenes(tmp_path / 'data', 1)
    thing = dict(id=1, image_id=7, category_id=4, bbox=[10, 20, 50, 30], area=1500, score=0.9)
    for annotated, detected in ((thing, {**thing, **changes}), ({**thing, **changes}, thing)):
        coco = dict(
            images=[dict(id=7, file_name='000.jpg', height=64, width=64)],
            categories=[dict(id=4, name='disc')],
            annotations=[annotated],
        )
        (data / 'ann.json').write_text(json.dumps(coco))
        folder = tmp_path / 'runs/a/0/test/predictions'
        folder.mkdir(parents=True, exist_ok=True)
        (folder / 'instances.segm.json').write_text(json.dumps([detected]))
        one = metric(
            'a',
            0,
            50.0,
            files=dict(predictions='runs/a/0/test/predictions'),
            facts=facts(data, labels=None, annotations='ann.json'),
        )
        text = render_html(load_report([write(tmp_path, [one])]))
        assert '1 disc' in text or 'missing: ' in text


@pytest.mark.parametrize('file_name', ['a.jpg', 'images\\a.jpg'])
@pytest.mark.parametrize('encoding', ['utf-8', 'utf-8-sig'])
def test_detections_are_drawn(tmp_path, file_name, encoding) -> None:
    mask = pytest.importorskip('pycocotools.mask')
    data = tmp_path / 'data'
    (data / 'val2017').mkdir(parents=True)
    Image.fromarray(np.full((60, 80, 3), 200, np.uint8)).save(data / 'val2017/a.jpg')
    square = np.zeros((60, 80), np.uint8, order='F')
    square[20:50, 10:60] = 1
    runs = mask.encode(square)
    outline = [[10, 20, 60, 20, 60, 50, 10, 50]]
    square = dict(id=1, image_id=7, category_id=4, bbox=[10, 20, 50, 30], area=1500, segmentation=outline)
    coco = dict(
        images=[dict(id=7, file_name=file_name, height=60, width=80)],
        categories=[dict(id=4, name='disc')],
        annotations=[square],
    )
    (data / 'ann.json').write_text(json.dumps(coco), encoding=encoding)
    results = tmp_path / 'runs/a/0/test/predictions'
    results.mkdir(parents=True)
    detection = dict(image_id=7, category_id=4, segmentation=dict(size=[60, 80], counts=runs['counts'].decode()))
    (results / 'instances.segm.json').write_text(json.dumps([{**detection, 'score': 0.9}, {**detection, 'score': 0.1}]))
    one = record(
        'a',
        0,
        'metric',
        dict(metrics={'coco/bbox_mAP': 31.5}, primary='coco/bbox_mAP', unit='AP', images=1),
        protocol=dict(task='detection'),
        files=dict(predictions='runs/a/0/test/predictions'),
        facts=facts(data, images='val2017', labels=None, annotations='ann.json', palette=[[255, 0, 0]]),
    )
    text = render_html(load_report([write(tmp_path, [one])]))
    of = pictures(text, 'jpeg')
    assert {'Ground truth of a.jpg: 1 disc', 'a, a.jpg: 1 disc'} <= set(of)
    pixels = of['a, a.jpg: 1 disc']
    red, green, _ = pixels[35, 35].astype(int)
    assert red > green + 40 and abs(int(pixels[5, 70, 0]) - int(pixels[5, 70, 1])) < 15
    assert '>Box AP</button>' in text and 'data-value="31.5"' in text


# -- plots ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    'values', [[5.0], [0.0], [-3.0, 4.0], [0.001, 0.002], [1e9, 1e9 + 1], [1.0, 900.0], [0.0, 900.0]]
)
def test_plots_show_all_points_in_both_schemes(values) -> None:
    points = [plots.Point(i, f'<b>$x_{i}$</b>', v, v, v - 0.1, v + 0.1) for i, v in enumerate(values, 1)]
    lines = [plots.Line(1, '<b>', [(float(i), v, 0.1) for i, v in enumerate(values)])]
    for text in (plots.scatter(points, 'ms', 'mIoU', 'title'), plots.curves(lines, 'iterations', 'loss', 'title')):
        (_, dark), (_, light) = parsed(text)[1:]
        assert '<b>' not in text and light['alt'].startswith('title: ') and light['alt'].count('<b>') <= len(points)
        for source, colour in ((dark['srcset'], '#6bb8f0'), (light['src'], '#0063a3')):
            drawn = base64.b64decode(source.partition(',')[2]).decode()
            assert f'stroke: {colour}' in drawn and '<b>' not in drawn
            places = re.findall(r'<use [^>]*x="(\S+)" y="(\S+)" style="fill', drawn)
            assert all(0 <= float(x) <= plots.WIDTH and 0 <= float(y) <= plots.HEIGHT for x, y in places)


def test_curves_are_means_of_seeds(tmp_path) -> None:
    seeds = [{float(i): math.sin(i) + shift for i in range(7)} for shift in (0.0, 1.0, 3.0)]
    found = _over_seeds(seeds)
    assert [x for x, _, _ in found] == list(range(7))
    assert [y for _, y, _ in found] == pytest.approx([math.sin(i) + 4 / 3 for i in range(7)])
    assert [d for _, _, d in found] == pytest.approx([statistics.stdev([0, 1, 3])] * 7)
    assert _over_seeds([{1.0: 2.0, 2.0: 3.0}, {2.0: 5.0}]) == [(2.0, 4.0, pytest.approx(math.sqrt(2)))]
    long = _over_seeds([{float(i): float(i) for i in range(1000)}])
    assert len(long) <= 120 and all(x == pytest.approx(y) for x, y, _ in long)
    triples = _over_seeds([{float(i): 2.0 * i for i in range(241)}])  # three neighbours each, and the last one alone
    assert triples == [(3.0 * k + 1, 6.0 * k + 2, None) for k in range(80)] + [(240.0, 480.0, None)]
