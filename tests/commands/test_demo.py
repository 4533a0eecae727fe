"""The demo command with few scenes and iterations, its table and its exit status."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mmdet.structures import DetDataSample
from mmengine.config import Config
from mmengine.structures import InstanceData, PixelData
from mmseg.structures import SegDataSample
from PIL import Image

from replk_mm.analysis.timing import Timing
from replk_mm.commands import demo
from replk_mm.data.scenes.spec import DEMO_CLASSES, DEMO_PALETTE
from replk_mm.data.scenes.writer import write_demo_data
from replk_mm.visualize import make_palette


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


def shown_classes(monkeypatch, data: Path, classes: list[str], prediction: object) -> set[str]:
    """The texts of the legend of a picture of scenes, with the same prediction for each."""
    texts: set[str] = set()

    def legend(entries: list, height: int) -> np.ndarray:
        texts.update(text for _, text in entries)
        return np.zeros((height, 9, 3), np.uint8)

    monkeypatch.setattr('replk_mm.visualize.color_legend', legend)
    found = [(path, np.zeros((64, 64, 3), np.uint8), prediction) for path in demo.find_images(data)]
    monkeypatch.setattr(demo, 'predict', lambda model, paths: found)
    model = SimpleNamespace(dataset_meta=dict(classes=classes, palette=make_palette(len(classes))))
    draw = demo.draw_segmentation if isinstance(prediction, SegDataSample) else demo.draw_detection
    draw(model, data, data / 'picture.png')
    return texts


def test_legend_of_label_maps_shows_only_the_classes_in_the_picture(tmp_path, monkeypatch):
    write_demo_data(tmp_path, 'ade20k', train=1, val=2, size=(64, 64))
    ids = {i for path in tmp_path.glob('annotations/validation/*') for i in np.unique(np.asarray(Image.open(path)))}
    prediction = SegDataSample(pred_sem_seg=PixelData(data=torch.full((1, 64, 64), 70)))
    shown = shown_classes(monkeypatch, tmp_path, [f'class {i}' for i in range(80)], prediction)
    assert shown == {f'class {i - 1}' for i in ids - {0}} | {'class 70'} and len(shown) < 10


def test_legend_of_objects_shows_only_the_classes_in_the_picture(tmp_path, monkeypatch):
    write_demo_data(tmp_path, 'coco', train=1, val=2, size=(64, 64))
    found = json.loads((tmp_path / 'annotations/instances_val2017.json').read_text())
    names = {category['id']: category['name'] for category in found['categories']}
    classes = [f'class {i}' for i in range(80)]
    classes[40 : 40 + len(names)] = names.values()
    things = dict(bboxes=torch.zeros(2, 4), scores=torch.tensor([1.0, 0.01]), labels=torch.tensor([70, 71]))
    shown = shown_classes(monkeypatch, tmp_path, classes, DetDataSample(pred_instances=InstanceData(**things)))
    assert shown == {names[a['category_id']] for a in found['annotations']} | {'class 70'}


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
