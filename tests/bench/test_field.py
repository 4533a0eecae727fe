"""The picture of the field: what shares a plot, values, links, licences and latencies."""

import json
import re

import pytest

from replk_mm import published
from replk_mm.bench.report import field
from replk_mm.commands.backbones import write_field
from replk_mm.errors import UserError

KEYS = ('backbone', 'pretraining', 'dataset', 'method', 'schedule', 'crop')


@pytest.fixture(scope='module')
def record() -> dict:
    """Counts that tell rows apart: the number of the row."""
    counts = [dict(deployed=dict(macs=n * 1e9, parameters=n * 1e6)) for n in range(1, 143)]
    counts[0] = None
    dense = [row for row in published.results() if row.task != 'classification']
    rows = [
        dict({key: getattr(row, key) for key in KEYS}, input=[512, 2048], counts=found)
        for row, found in zip(dense, counts, strict=True)
    ]
    return dict(rows=[*rows, dict(method='classification')])  # whose accuracy the page does not show


@pytest.fixture(scope='module')
def rows(record) -> list[field.FieldRow]:
    return field.read_rows(
        record, {'ConvNeXtV2-B': ('CC-BY-NC-4.0', False), 'VAN-B0': ('none', True)}, {'VAN-B0': 12.5, 'VAN-B1': 20.0}
    )


def test_a_plot_never_mixes_protocols(rows):
    facets = field.facets_of(rows)
    assert sum(len(group) for _, group in facets) == 142
    for _, group in facets:
        found = {
            (
                r.result.dataset,
                r.result.method,
                r.result.crop,
                r.result.schedule,
                r.result.pretraining.split(' (300')[0].removesuffix(' supervised'),
            )
            for r in group
        }
        assert len(found) == 1
    by_facet = {facet: [row.result.backbone for row in group] for facet, group in facets}
    jittered = by_facet['COCO', 'Mask R-CNN', 'ImageNet-1K', '', '36 epochs, batch 32']
    assert jittered == ['ConvNeXtV2-B', 'ConvNeXtV2-L', 'ConvNeXt-B', 'ConvNeXt-L']
    assert 'SLaK-T' in by_facet['ADE20K', 'UperNet', 'ImageNet-1K', 'crop 512', '160k iterations']


def test_rows_have_their_own_figures(rows):
    assert rows[0].macs is None and [row.macs for row in rows[1:]] == list(range(2, 143))
    assert {row.result.backbone for row in rows if row.milliseconds} == {'VAN-B0', 'VAN-B1'}
    assert {row.result.backbone for row in rows if row.licence == 'CC-BY-NC-4.0'} == {'ConvNeXtV2-B'}
    assert not any(row.permissive for row in rows if row.result.backbone != 'VAN-B0')


def test_points_of_a_plot(rows):
    van = [row for row in rows if row.result.family == 'VAN' and 'miou_ms' in row.result.metrics][:2]
    figure = field.draw(van, 'miou_ms', 'macs', {'VAN': 1})
    _, *markers = figure.axes[0].lines
    assert [(*line.get_xdata(), *line.get_ydata()) for line in markers] == [(van[0].macs, 41.1), (van[1].macs, 44.9)]
    assert [line.get_markerfacecolor() == 'none' for line in markers] == [False, True]  # B1 has no known licence
    assert [text.get_text() for text in figure.axes[0].texts] == ['B0', 'B1']


def test_page(rows):
    chosen = [row for row in rows if row.result.family == 'VAN' or row.number == 1]
    page = field.render_field(chosen, 'a machine', 'a command')
    ids, links = (set(re.findall(pattern, page)) for pattern in (r'id="(row-\d+)"', r'href="#(row-\d+)"'))
    assert len(ids) == len(chosen) and links == ids - {'row-1'}
    assert all(f'href="{row.result.link}"' in page for row in chosen)
    assert 'a machine' in page and 'src="http' not in page
    assert 'latency of the backbone' in page and '<title>VAN-B0</title>' in page and '#0000' not in page


def test_record_of_other_rows_is_rejected(record):
    with pytest.raises(UserError, match='other rows'):
        field.read_rows(dict(rows=record['rows'][1:]), {}, {})


def benchmark(name: str, cpu: str = 'a CPU') -> dict:
    row = dict(name='ours', milliseconds=dict(median=7.25))
    points = [dict(mode='inference', height=512, width=512, rows=[row])]
    return dict(what='backbone', cfg_options=dict(backbone=name), points=points, environment=dict(cpu=cpu, cores=2))


@pytest.mark.parametrize(
    ('measured', 'message'),
    [
        ([benchmark('convnext-tiny'), benchmark('convnext-base', 'another')], 'different conditions'),
        ([{**benchmark('convnext-tiny'), 'what': 'op'}], 'not a record'),
        ([benchmark('nonsense')], 'not a record'),
        (None, 'No such file'),
        ([benchmark('convnext-tiny.in22k')], None),
    ],
)
def test_latencies(tmp_path, record, monkeypatch, measured, message):
    monkeypatch.setattr(field, 'METRICS', {})  # no plots
    (tmp_path / 'complexity.json').write_text(json.dumps(record))
    files = [tmp_path / f'{i}.json' for i in range(len(measured or 'x'))]
    for file, content in zip(files, measured or (), strict=False):
        file.write_text(json.dumps(content))
    page = tmp_path / 'field.html'
    if message:
        with pytest.raises(UserError, match=message):
            write_field(page, tmp_path / 'complexity.json', files)
        assert not page.exists()
        return
    write_field(page, tmp_path / 'complexity.json', files)
    text = page.read_text()
    assert 'a CPU, 2 cores, 1x3x512x512' in text and '<td>7.2</td>' in text
