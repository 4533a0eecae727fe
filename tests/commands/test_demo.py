"""The demo's chain, shortened, and what its table and exit status say."""

import importlib
import json
import sys
from pathlib import Path

import pytest
from mmengine.config import Config
from PIL import Image

from replk_mm.analysis.timing import Timing
from replk_mm.commands import demo
from replk_mm.data.scenes.spec import DEMO_CLASSES, DEMO_PALETTE


def _rows(before: float, after: float, **others: float) -> list[demo.Row]:
    return [
        demo.Row('trained', {'mIoU': before, **others}, 100, 2 * 10**9, Timing(20.0, 19.0, 21.0)),
        demo.Row('reparameterized', {'mIoU': after, **others}, 90, 10**9, Timing(10.0, 9.0, 11.0)),
    ]


def test_table_says_what_changed() -> None:
    text = demo.table(_rows(61.25, 61.25))
    assert (
        'trained' in text and '61.25' in text and '2.00 times as fast' in text and '-10' in text and '-1.00 G' in text
    )


@pytest.mark.parametrize('after, same', [(61.25, True), (61.259, True), (61.27, False), (float('nan'), False)])
def test_equal_is_to_a_hundredth(after: float, same: bool) -> None:
    assert demo.equal(_rows(61.25, after)) is same


def test_every_metric_has_a_column_and_must_be_equal() -> None:
    rows = _rows(61.25, 61.25, **{'mask AP50': 30.5})
    heading, first, *_ = demo.table(rows).strip('\n').splitlines()
    assert heading.index('mask AP50') + len('mask AP50') == first.index('30.50') + len('30.50')
    rows[1].metrics['mask AP50'] = 30.65
    assert demo.equal(rows, 0.2) and not demo.equal(rows, 0.1)


def test_config_names_the_classes_of_the_scenes(root: Path) -> None:
    cfg = Config.fromfile(root / 'configs' / 'upernet_replk-nano_demo.py')
    assert tuple(cfg.metainfo.classes) == DEMO_CLASSES
    assert [tuple(colour) for colour in cfg.metainfo.palette] == [tuple(colour) for colour in DEMO_PALETTE]
    assert cfg.model.decode_head.num_classes == cfg.model.auxiliary_head.num_classes == len(DEMO_CLASSES)


@pytest.mark.slow
@pytest.mark.parametrize(
    'task, metrics, classes',
    [('segmentation', ['mIoU'], 8), ('detection', ['box AP', 'box AP50', 'mask AP', 'mask AP50'], 5)],
)
def test_the_command_runs_the_whole_chain(
    task: str,
    metrics: list[str],
    classes: int,
    root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    monkeypatch.setattr(demo, 'TRAIN_SCENES', 8)
    monkeypatch.setattr(demo, 'VAL_SCENES', 2)
    out = tmp_path / 'demo'
    monkeypatch.setattr(sys, 'argv', ['demo.py', '--task', task, '--out', str(out), '--max-iters', '2'])
    command = importlib.import_module('replk_mm.commands.demo')
    assert command.main() == 0
    printed = capsys.readouterr().out
    assert 'parallel kernels merged' in printed and 'times as fast' in printed and ', '.join(metrics) in printed
    found = json.loads((out / 'demo.json').read_text())
    before, after = found['rows']
    assert found['iterations'] == 2 and list(before['metrics']) == metrics
    assert after['metrics'] == pytest.approx(before['metrics'], abs=demo.STORIES[task].tolerance)
    assert after['macs'] < before['macs'] and after['parameters'] < before['parameters']
    assert found['tests'][1]['reparameterized'] == 'in the checkpoint'
    assert len(json.loads((out / 'data' / 'meta.json').read_text())['classes']) == classes
    width, height = Image.open(out / 'predictions.png').size
    assert width > 3 * 256 and height > 2 * 256
