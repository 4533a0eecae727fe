"""scripts/published_complexity.py: its counters, and docs/complexity.md against the published figures."""

import importlib.util
import json
import math
import sys
from pathlib import Path

import pytest
import torch.nn as nn
from tiny import ROOT

from replk_mm import published
from replk_mm.errors import UserError
from replk_mm.ops import DepthwiseConv2d

DOCS = ROOT / 'docs'
_spec = importlib.util.spec_from_file_location('published_complexity', ROOT / 'scripts' / 'published_complexity.py')
published_complexity = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(published_complexity)


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


def test_mmcvs_counter_counts_our_convolution() -> None:
    assert published_complexity.mmcv_macs(DepthwiseConv2d(3, 7, bias=False), (8, 8)) == 64 * 3 * 49


@pytest.fixture(scope='module')
def record() -> dict:
    return json.loads((DOCS / 'complexity.json').read_text(encoding='utf-8'), parse_constant=pytest.fail)


def counted(rows: list[dict]) -> list[dict]:
    """Rows without the operators that have no formula, such as copies: releases of torch differ in them."""
    return [{key: value for key, value in row.items() if key != 'uncounted'} for row in rows]


def test_recount_equals_a_row_of_the_docs(
    capsys: pytest.CaptureFixture, record: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    config = 'upernet_convnext-tiny_ade20k.py'
    monkeypatch.setattr(sys, 'argv', ['x.py', '--rows', f'^{config}$', '--out', str(tmp_path)])
    assert published_complexity.main() == 0
    found = json.loads((tmp_path / 'complexity.json').read_text())
    assert counted(found['rows']) == counted([row for row in record['rows'] if row['config'] == config])
    assert len(found['rows']) == 1
    assert (tmp_path / 'complexity.md').read_text() == published_complexity.render_page(found)
    printed = capsys.readouterr()
    assert '| 939 |' in printed.out and '1/1' in printed.err


@pytest.mark.parametrize('pattern', ['nonsense', '('])
def test_invalid_rows(pattern: str) -> None:
    with pytest.raises(UserError, match='--rows'):
        published_complexity.count_published(pattern)


def test_page_equals_its_record(record: dict) -> None:
    assert (DOCS / 'complexity.md').read_text(encoding='utf-8') == published_complexity.render_page(record)


def test_every_published_row_is_within_tolerance_or_explained(record: dict) -> None:
    results = {result.config: result for result in published.results() if result.config}
    assert [row['config'] for row in record['rows']] == list(results) and len(results) == 31
    for row in record['rows']:
        result = results[row['config']]
        assert row['published'] == dict(parameters_m=result.params_m, macs_g=result.flops_g)
        assert tuple(row['input']) == result.input
        off = {
            name: (
                abs(figures['parameters'] / result.params_m / 1e6 - 1),
                abs(figures['macs'] / result.flops_g / 1e9 - 1),
            )
            for name, figures in (('within', row['counts']['deployed']), ('explained', row['authors']))
        }
        fitting = [name for name, (held, used) in off.items() if held <= 0.02 and used <= 0.01]
        assert row['status'] == (fitting[0] if fitting else 'unexplained'), row['config']
        assert fitting, f'{row["config"]}: {off}'
        deployed = row['counts']['deployed']
        assert deployed['macs'] == sum(part['macs'] for part in row['parts'] if part['runs'] == 'inference')
        assert all(math.isfinite(value) for figures in row['counts'].values() for value in figures.values())


def test_row_that_fits_no_counting_is_unexplained(record: dict) -> None:
    odd = json.loads(json.dumps(record['rows'][0]))
    odd['published']['macs_g'] *= 1.05
    odd['status'] = published_complexity.status_of(odd)
    assert odd['status'] == 'unexplained'
    assert f'Not explained: {odd["config"]}' in published_complexity.render_page({**record, 'rows': [odd]})


@pytest.mark.slow
def test_recount_equals_all_rows_of_the_docs(record: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert counted(published_complexity.count_published()['rows']) == counted(record['rows'])
