"""The demo command with few scenes and iterations, its table and its exit status."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from mmengine.config import Config
from PIL import Image

from replk_mm.analysis.timing import Timing
from replk_mm.commands import demo
from replk_mm.data.scenes.spec import DEMO_CLASSES, DEMO_PALETTE


def make_rows(before: dict[str, float], after: dict[str, float]) -> list[demo.DemoRow]:
    return [
        demo.DemoRow('trained', before, 1100, 2 * 10**9, Timing(20.0, 19.0, 21.0)),
        demo.DemoRow('reparameterized', after, 1090, 10**9, Timing(10.0, 9.0, 11.0)),
    ]


def test_table_shows_both_forms_and_their_difference():
    cells = demo.table_cells(make_rows({'mIoU': 61.25, 'mAcc': 70}, {'mIoU': 61.27, 'mAcc': 69.5}))
    assert cells[0][:4] == ['', 'mIoU', 'mAcc', 'parameters']
    assert cells[1] == ['trained', '61.25', '70.00', '1,100', '2.00 G', '20.0 (19.0-21.0)']
    slow = [replace(row, unreliable='busy') for row in make_rows({}, {})]
    assert demo.table_cells(slow)[1][-1] == '20.0 (19.0-21.0) ?'
    assert cells[3] == ['difference', '+0.02', '-0.50', '-10', '-1.00 G', '2.00 times as fast']


@pytest.mark.parametrize('after, same', [(61.25, True), (61.259, True), (61.27, False), (float('nan'), False)])
def test_metrics_match_within_the_tolerance(after, same):
    rows = make_rows({'mIoU': 61.25, 'mAcc': 70.0}, {'mIoU': after, 'mAcc': 70.0})
    assert demo.metrics_match(rows, 0.01) is same


def test_config_has_the_classes_of_the_scenes(root):
    cfg = Config.fromfile(root / 'configs' / 'upernet_replk-nano_demo.py')
    assert tuple(cfg.metainfo.classes) == DEMO_CLASSES
    assert [tuple(colour) for colour in cfg.metainfo.palette] == [tuple(colour) for colour in DEMO_PALETTE]
    assert cfg.model.decode_head.num_classes == cfg.model.auxiliary_head.num_classes == len(DEMO_CLASSES)


@pytest.mark.slow
@pytest.mark.parametrize(
    'task, metrics, classes',
    [('segmentation', ['mIoU'], 8), ('detection', ['box AP', 'box AP50', 'mask AP', 'mask AP50'], 5)],
)
def test_command_runs_from_scenes_to_report(task, metrics, classes, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, 'TRAIN_SCENES', 8)
    monkeypatch.setattr(demo, 'VAL_SCENES', 2)
    out = tmp_path / 'demo'
    monkeypatch.setattr(sys, 'argv', ['demo.py', '--task', task, '--out', str(out), '--max-iters', '2'])
    assert demo.main() == 0
    figures = json.loads((out / 'demo.json').read_text())
    before, after = figures['rows']
    assert figures['iterations'] == 2 and list(before['metrics']) == metrics
    assert after['metrics'] == pytest.approx(before['metrics'], abs=demo.TASKS[task].tolerance)
    assert after['macs'] < before['macs'] and after['parameters'] < before['parameters']
    assert figures['tests'][1]['reparameterized'] == 'in the checkpoint'
    assert len(json.loads((out / 'data' / 'meta.json').read_text())['classes']) == classes
    width, height = Image.open(out / 'predictions.png').size
    assert width > 3 * 256 and height > 2 * 256
    page = (out / 'report.html').read_text()
    assert all(f'>{cell}<' in page for cell in [*metrics, f'{after["parameters"]:,}']) and 'predictions.png' in page
    last_lines = capsys.readouterr().out.splitlines()[-3:]
    written = [Path(line.split()[-1]) for line in last_lines[1:]]
    assert written == [out / 'predictions.png', out / 'report.html']


def test_command_fails_if_reparameterization_changes_a_metric(tmp_path, monkeypatch):
    rows = make_rows({'mIoU': 61.25}, {'mIoU': 60.25})
    figures = dict(iterations=2, seed=0, tests=[None, dict(per_class={}, environment={})])
    monkeypatch.setattr(demo, 'run_demo', lambda *args: (rows, figures))
    monkeypatch.setattr(sys, 'argv', ['demo.py', '--out', str(tmp_path)])
    assert demo.main() == 2
