"""Counters of the published networks; docs/complexity.md and docs/errata.md against the published figures."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch
import torch.nn as nn
from tiny import ROOT

from replk_mm import published
from replk_mm.analysis import published_complexity
from replk_mm.analysis.complexity import count_complexity
from replk_mm.backbones import ConvNeXtRoadmap, build_backbone
from replk_mm.commands import complexity
from replk_mm.errors import UserError
from replk_mm.ops import DepthwiseConv2d

DOCS = ROOT / 'docs'
RECORD = json.loads((DOCS / 'complexity.json').read_text(encoding='utf-8'), parse_constant=pytest.fail)
KEYS = ('task', 'backbone', 'pretraining', 'dataset', 'method', 'schedule', 'crop', 'config')


def identity(row) -> tuple:
    return tuple(row[key] if isinstance(row, dict) else getattr(row, key) for key in KEYS[:-1])


@pytest.mark.parametrize(
    ('layer', 'macs'),
    [
        (nn.Conv2d(3, 8, 3, padding=1), 30 * 8 * (27 + 1)),
        (nn.ReLU(), 90),
        (nn.BatchNorm2d(3), 180),
        (nn.GELU(), 0),
        (nn.SyncBatchNorm(3), 0),
        (nn.GroupNorm(1, 3), 180),
    ],
)
def test_mmcvs_counter_by_layer(layer: nn.Module, macs: int) -> None:
    # The counter takes the dtype of its input from a parameter.
    first = nn.Conv2d(3, 3, 1, bias=False)
    assert published_complexity.mmcv_macs(nn.Sequential(first, layer), (5, 6)) == 30 * 9 + macs


@pytest.mark.parametrize(('depthwise', 'macs'), [(True, 64 * 3 * 49), (False, 0)])
def test_mmcvs_counter_counts_our_convolution(depthwise: bool, macs: int) -> None:
    layer = DepthwiseConv2d(3, 7, bias=False)
    assert published_complexity.mmcv_macs(layer, (8, 8), depthwise) == macs


def test_sparse_count_leaves_strips_dense() -> None:
    """Closed form for one stage of SLaK: 40 % of everything but depthwise layers is zero."""

    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            arch = dict(depths=[1], channels=[8])
            self.backbone = build_backbone('slak-tiny', arch=arch, kernel_size=7, out_indices=(0,))

        def forward(self, image):
            return self.backbone(image)

    strips, stem, linear, norms = 8 * (7 * 5 * 2 + 25), 8 * 48 + 8, 8 * 32 * 2 + 32 + 8, 3 * 16 + 16 + 16 + 16 + 8
    found = published_complexity._count_as_authors(Whole(), 'mmcv_sparse', (16, 16))
    assert found['parameters'] == int(strips + 0.6 * (stem + linear + norms))


def counted(row: dict) -> dict:
    """A row without the operators that have no formula, such as copies: releases of torch differ in them."""
    return {key: value for key, value in row.items() if key != 'uncounted'}


def test_recount_equals_rows_of_the_docs(capsys: pytest.CaptureFixture, tmp_path: Path, monkeypatch) -> None:
    arguments = ['x.py', '--published', '--rows', '^ConvNeXtV2-B Mask', '--out', str(tmp_path)]
    monkeypatch.setattr(sys, 'argv', arguments)
    assert complexity.main() == 0
    found = json.loads((tmp_path / 'complexity.json').read_text())
    theirs = {identity(row): row for row in RECORD['rows']}
    assert len(found['rows']) == 2
    assert all(counted(row) == counted(theirs[identity(row)]) for row in found['rows'])
    assert (tmp_path / 'complexity.md').read_text() == published_complexity.render_page(found)
    printed = capsys.readouterr()
    assert '| 486 |' in printed.out and '2/2' in printed.err and not (tmp_path / 'errata.md').exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    'pattern',
    [
        'RepLKNet-31B Mask|_replk31b_cityscapes',
        'UniRepLKNet-T Casc',
        'SLaK-T UperNet',
        'MogaNet-XT Sem',
        'RDNet-T Mask',
        'OverLoCK-T UperNet',
        'InceptionNeXt-T Sem',
        'VAN-B0 Sem',
        'MSCAN-T',
        'InternImage-T UperNet',
        'ConvNeXt-T Mask',
    ],
)
def test_recount_of_each_family_equals_the_docs(pattern: str) -> None:
    theirs = {identity(row): row for row in RECORD['rows']}
    for row in published_complexity.count_published(pattern)['rows']:
        assert counted(row) == counted(theirs[identity(row)])


@pytest.mark.parametrize('pattern', ['nonsense', '('])
def test_invalid_rows(pattern: str) -> None:
    with pytest.raises(UserError, match='--rows'):
        published_complexity.count_published(pattern)


def test_a_config_or_the_published_rows_are_needed(capsys, monkeypatch) -> None:
    monkeypatch.setattr(sys, 'argv', ['x.py'])
    assert complexity.main() != 0
    assert '--published' in capsys.readouterr().err


@pytest.mark.parametrize('page', ['complexity', 'errata'])
def test_pages_equal_their_record(page: str) -> None:
    assert (DOCS / f'{page}.md').read_text(encoding='utf-8') == published_complexity.render_page(RECORD, page)


def test_every_published_row_is_counted_and_explained() -> None:
    results = {identity(result): result for result in published.results()}
    assert [identity(row) for row in RECORD['rows']] == list(results) and len(results) == 164
    for row in RECORD['rows']:
        result = results[identity(row)]
        assert row['published'] == dict(parameters_m=result.params_m, macs_g=result.flops_g)
        assert (tuple(row['input']) == result.input) if row['input_stated'] else result.input is None
        if row['counts'] is None:
            assert row['status'] == 'not counted' and row['reason'] == 'no such backbone here'
            continue
        stated = [
            (name, unit, figure)
            for name, unit, figure in (('parameters', 1e6, result.params_m), ('macs', 1e9, result.flops_g))
            if figure is not None
        ]

        def fits(figures: dict, stated: list = stated) -> bool:
            # An integer stands for everything that rounds to it.
            limits = dict(parameters=0.02, macs=0.01)
            slack = [0.5 if figure == int(figure) else 0.05 for _, _, figure in stated]
            return all(
                abs(figures[name] / unit - figure) <= max(limits[name] * figure, by)
                for (name, unit, figure), by in zip(stated, slack, strict=True)
            )

        fitting = [
            s for s, figures in (('within', row['counts']['deployed']), ('explained', row['authors'])) if fits(figures)
        ]
        expected = fitting[0] if fitting else 'erratum'
        assert row['status'] == (expected if stated else 'not stated'), row
        assert all(math.isfinite(value) for figures in row['counts'].values() for value in figures.values())


def test_row_that_fits_no_counting_is_unexplained() -> None:
    odd = json.loads(json.dumps(RECORD['rows'][0]))
    odd['published']['macs_g'] *= 1.05
    odd['status'] = published_complexity.status_of(odd)
    assert odd['status'] == 'unexplained'
    page = published_complexity.render_page({**RECORD, 'rows': [odd]})
    assert f'Not explained: {odd["backbone"]}, {odd["method"]}' in page


def test_errata_contradict_the_recomputed_figures() -> None:
    """Each erratum with networks has one that its printed figures do not fit."""
    assert len(RECORD['errata']) == len(published.table('errata'))
    for entry in RECORD['errata']:
        off = [
            abs(row['counts'][name] / unit / row[key] - 1)
            for row in entry['rows']
            if row['counts']
            for name, unit, key in (('parameters', 1e6, 'parameters_m'), ('macs', 1e9, 'macs_g'))
            if row[key]
        ]
        assert not off or max(off) > 0.03, entry['title']


def test_roadmap_has_the_printed_macs() -> None:
    """Convolutions and the classifier; the last digit is from a sum over layers by hand."""
    steps = {row['arch']: row for row in RECORD['roadmap']}
    known = {
        '50': '4.089 4.526 4.418 2.350 5.268 4.644 4.065 4.097 4.146 4.210 4.291' + 4 * ' 4.146' + ' 4.456',
        '200': '15.007 14.518 14.376 7.234 16.764 15.679 14.627 14.699 14.807 14.950 15.130'
        + 4 * ' 14.807'
        + ' 15.355',
    }
    for regime, macs in known.items():
        archs = [arch for arch in ConvNeXtRoadmap.arch_settings if arch.startswith(f'{regime}-')]
        for arch, expected in zip(archs, macs.split(), strict=True):
            assert f'{steps[arch]["macs"] / 1e9:.3f}' == expected, arch
    printed = [row for regime in published.table('convnext_modernization').values() for row in regime if 'arch' in row]
    assert len(printed) == len(RECORD['roadmap']) == 34
    differing = [row['arch'] for row in RECORD['roadmap'] if abs(row['macs'] / 1e9 - row['gflops']) > 0.005]
    assert differing == ['50-layernorm', '50-separate-downsampling']
    assert differing == [row['arch'] for row in RECORD['roadmap'] if not row['agrees']]
    # ConvNeXt-T and -B have 28.589 and 88.591 million parameters, of which the layer scales are not in the last step.
    scales = [
        sum(n * c for n, c in zip((3, 3, third, 3), widths, strict=True))
        for third, widths in ((9, (96, 192, 384, 768)), (27, (128, 256, 512, 1024)))
    ]
    for arch, published_count, scale in zip(('50', '200'), (28_589_128, 88_591_464), scales, strict=True):
        assert steps[f'{arch}-separate-downsampling']['parameters'] == published_count - scale
    assert steps['50-resnet']['parameters'] == 25_557_032


def test_recount_of_the_roadmap_equals_the_docs(capsys, monkeypatch) -> None:
    monkeypatch.setattr(sys, 'argv', ['x.py', '--roadmap', '--rows', '^50-(resnet|inv|layer|sep)'])
    assert complexity.main() == 0
    rows = [row for row in RECORD['roadmap'] if row['arch'].startswith(('50-resnet', '50-inv', '50-layer', '50-sep'))]
    assert capsys.readouterr().out == published_complexity.format_roadmap(rows) and len(rows) == 5
    assert published_complexity.format_roadmap(RECORD['roadmap']) in (DOCS / 'complexity.md').read_text()


def test_elementwise_operations_do_not_explain_the_roadmap() -> None:
    """The numbers of the erratum."""
    elements = []
    for arch in ('50-layernorm', '50-separate-downsampling', '200-separate-downsampling'):
        with torch.device('meta'):
            found = count_complexity(ConvNeXtRoadmap(arch, out_indices=(3,)), (224, 224)).uncounted
        elements.append({operator.name: operator.elements for operator in found})
    layernorm, tiny, base = elements
    (norm,) = (name for name in tiny if 'layer_norm' in name)
    # A block that downsamples normalizes its incoming width.
    assert layernorm[norm] == 3136 * 96 * (3 + (3 - 0.5) / 2 + (9 - 0.5) / 4 + (3 - 0.5) / 8)
    assert (4.46e9 - RECORD['roadmap'][14]['macs']) / layernorm[norm] == pytest.approx(156, abs=0.5)
    assert tiny.keys() == base.keys() and all(base[name] / tiny[name] >= 4 / 3 - 0.01 for name in tiny)
