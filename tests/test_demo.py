"""The demo's chain, shortened, and what its table and exit status say."""
import json
import sys
from pathlib import Path

import pytest
from mmengine.config import Config
from PIL import Image

from replk_mm import demo
from replk_mm.analysis.speed import Timing
from replk_mm.data.demo_scenes import DEMO_CLASSES, DEMO_PALETTE


def _rows(before: float, after: float) -> list[demo.Row]:
    return [demo.Row('trained', before, 100, 2 * 10**9, Timing(20., 19., 21.)),
            demo.Row('reparameterized', after, 90, 10**9, Timing(10., 9., 11.))]


def test_table_says_what_changed() -> None:
    text = demo.table(_rows(61.25, 61.25))
    assert 'trained' in text and '61.25' in text and '2.00 times as fast' in text and '-10' in text and '-1.00 G' in text


@pytest.mark.parametrize('after, same', [(61.25, True), (61.259, True), (61.27, False), (float('nan'), False)])
def test_equal_is_to_a_hundredth(after: float, same: bool) -> None:
    assert demo.equal(_rows(61.25, after)) is same


def test_config_names_the_classes_of_the_scenes(root: Path) -> None:
    cfg = Config.fromfile(root / 'configs' / 'upernet_replk-nano_demo.py')
    assert tuple(cfg.metainfo.classes) == DEMO_CLASSES
    assert [tuple(colour) for colour in cfg.metainfo.palette] == [tuple(colour) for colour in DEMO_PALETTE]
    assert cfg.model.decode_head.num_classes == cfg.model.auxiliary_head.num_classes == len(DEMO_CLASSES)


@pytest.mark.slow
def test_the_command_runs_the_whole_chain(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                          capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(demo, 'TRAIN_SCENES', 8)
    monkeypatch.setattr(demo, 'VAL_SCENES', 2)
    monkeypatch.setattr(sys, 'argv', ['demo.py', '--out', str(tmp_path / 'demo'), '--max-iters', '2'])
    monkeypatch.syspath_prepend(str(root / 'tools'))
    import importlib.util
    spec = importlib.util.spec_from_file_location('demo_command', root / 'tools' / 'demo.py')
    command = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(command)
    assert command.main() == 0
    printed = capsys.readouterr().out
    assert 'parallel kernels merged' in printed and 'times as fast' in printed
    found = json.loads((tmp_path / 'demo' / 'demo.json').read_text())
    assert found['iterations'] == 2 and found['rows'][0]['miou'] == pytest.approx(found['rows'][1]['miou'], abs=0.01)
    assert found['rows'][1]['macs'] < found['rows'][0]['macs']
    assert found['tests'][1]['reparameterized'] == 'in the checkpoint'
    width, height = Image.open(tmp_path / 'demo' / 'predictions.png').size
    assert width > 4 * 256 and height > 2 * 256
