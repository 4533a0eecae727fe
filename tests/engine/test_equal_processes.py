"""One and two processes with the same images a step train the same network, and score it the same."""

import json
import os
import re
from pathlib import Path

import pytest
from tiny import ROOT, make_data, run_tool, tiny  # noqa: F401
from tiny_detector import detector, trained_detector, write_coco  # noqa: F401

from replk_mm.checkpoints.io import read_checkpoint

pytestmark = pytest.mark.slow

ITERATIONS = 8
#: Six images a step, and nothing random that depends on the process: no drop path, no dropout, no augmentation.
TRAINING = """
_base_ = {base!r}
norm_cfg = dict(type={norm!r}, requires_grad=True)
model = dict(backbone=dict(drop_path_rate=0., norm_cfg=norm_cfg), decode_head=dict(dropout_ratio=0., norm_cfg=norm_cfg),
             auxiliary_head=dict(dropout_ratio=0., norm_cfg=norm_cfg))
train_dataloader = dict(batch_size={batch}, dataset=dict(pipeline=[
    dict(type='LoadImageFromFile'), dict(type='LoadAnnotations'), dict(type='PackSegInputs')]))
custom_imports = dict(imports=['double_precision'])
model['data_preprocessor'] = dict(type='DoublePreprocessor')
"""
#: Rounding differs between one sum and several; in float64 it stays below everything that is wrong.
DOUBLE = """
import torch
from mmseg.models import SegDataPreProcessor
from mmseg.registry import MODELS
torch.set_default_dtype(torch.float64)


@MODELS.register_module()
class DoublePreprocessor(SegDataPreProcessor):
    def forward(self, data, training=False):
        data = super().forward(data, training)
        return dict(data, inputs=data['inputs'].double())
"""


#: Rank 1 is killed at the fifth iteration, as the system kills what takes too much memory.
KILLED = """
_base_ = {base!r}
custom_imports = dict(imports=['killed_hook'])
custom_hooks = [dict(type='KilledHook')]
default_hooks = dict(checkpoint=dict(interval=4))
train_cfg = dict(val_interval=1000)
"""
KILLED_HOOK = """
import os
import signal
from mmengine.dist import get_rank
from mmengine.hooks import Hook
from mmengine.registry import HOOKS


@HOOKS.register_module()
class KilledHook(Hook):
    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if runner.iter == 5 and get_rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
"""


def launch(processes: int, tool: str, *args, folder: Path, modules: Path, status: int = 0) -> str:
    paths = os.pathsep.join([str(ROOT), str(modules)])
    device = () if processes > 1 else ('--device', 'cpu')
    done = run_tool(tool, *args, '--work-dir', folder, *device, processes=processes, PYTHONPATH=paths)
    assert done.returncode == status, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


def logged(work: Path) -> list[dict]:
    return [json.loads(line) for line in next(work.glob('*/vis_data/scalars.json')).read_text().splitlines()]


@pytest.fixture(scope='module')
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp('equal')
    make_data(folder / 'data', train=7, val=5)
    (folder / 'double_precision.py').write_text(DOUBLE)
    (folder / 'killed_hook.py').write_text(KILLED_HOOK)
    return folder


def train(folder: Path, tiny, processes: int, norm: str) -> Path:  # noqa: F811
    config, work = folder / f'{norm}{processes}.py', folder / f'{norm}{processes}'
    config.write_text(TRAINING.format(base=str(tiny.config), norm=norm, batch=6 // processes))
    launch(
        processes,
        'train',
        config,
        '--data-root',
        folder / 'data',
        '--max-iters',
        ITERATIONS,
        '--seed',
        3,
        folder=work,
        modules=folder,
    )
    return work


@pytest.fixture(scope='module')
def trainings(tiny, folder) -> dict[int, Path]:  # noqa: F811
    return {processes: train(folder, tiny, processes, 'SyncBN') for processes in (1, 2)}


def test_losses_and_weights_are_those_of_one_process(trainings):
    ours, one = (logged(trainings[p]) for p in (2, 1))
    losses, expected = ([record['loss'] for record in records if 'loss' in record] for records in (ours, one))
    assert len(losses) == ITERATIONS and max(losses) > 1.01 * min(losses)
    assert losses == pytest.approx(expected, rel=1e-9)
    assert [r['mIoU'] for r in ours if 'mIoU' in r] == pytest.approx([r['mIoU'] for r in one if 'mIoU' in r], abs=1e-6)
    weights, expected = (read_checkpoint(trainings[p] / f'iter_{ITERATIONS}.pth')['state_dict'] for p in (2, 1))
    assert list(weights) == list(expected)
    for name, value in weights.items():
        right = expected[name].double()
        assert (value.double() - right).abs().max() < 1e-6 * right.abs().max().clamp_min(1), name


def scores(folder: Path, config: Path, checkpoint: Path, data: Path, processes: int) -> tuple[dict, dict]:
    """``metrics.json`` and the predictions of a test."""
    out = folder / f'out_{config.stem}_{processes}'
    launch(
        processes, 'test', config, checkpoint, '--data-root', data, '--out', out, folder=folder / 'test', modules=folder
    )
    return json.loads((out / 'metrics.json').read_text()), {
        str(p.relative_to(out)): p.read_bytes() for p in (out / 'predictions').rglob('*.*')
    }


def test_a_segmentor_scores_the_same(trainings, folder):
    checkpoint, config = trainings[1] / f'iter_{ITERATIONS}.pth', folder / 'SyncBN1.py'
    one, two = (scores(folder, config, checkpoint, folder / 'data', processes) for processes in (1, 2))
    assert len(one[1]) == 5
    assert two[0]['metrics']['mIoU'] == one[0]['metrics']['mIoU']
    assert two[0]['per_class'] == one[0]['per_class'] and two[1] == one[1]


def annotate_what_is_found(folder: Path, config: Path, checkpoint: Path) -> None:
    """Make annotations of some detections, moved a little: a network that has seen few images finds no others."""
    scores(folder, config, checkpoint, folder / 'data', 1)
    file = folder / 'data' / 'annotations' / 'instances_val2017.json'
    data, annotations = json.loads(file.read_text()), []
    for image in data['images']:
        found = [
            d
            for d in json.loads((folder / 'out_tiny_1' / 'predictions' / 'instances.bbox.json').read_text())
            if d['image_id'] == image['id'] and min(d['bbox'][2:]) > 8
        ]
        for detection in found[:8:2]:
            left, top, width, height = detection['bbox']
            right, bottom = left + 0.8 * width, top + height
            annotations.append(
                dict(
                    id=len(annotations) + 1,
                    image_id=image['id'],
                    category_id=detection['category_id'],
                    bbox=[left, top, 0.8 * width, height],
                    area=0.8 * width * height,
                    iscrowd=0,
                    segmentation=[[left, top, right, top, right, bottom, left, bottom]],
                )
            )
    file.write_text(json.dumps({**data, 'annotations': annotations}))


def test_a_detector_scores_the_same(detector, trained_detector, tmp_path):  # noqa: F811
    write_coco(tmp_path / 'data', val=5)
    annotate_what_is_found(tmp_path, detector.config, trained_detector)
    one, two = (scores(tmp_path / str(p), detector.config, trained_detector, tmp_path / 'data', p) for p in (1, 2))
    assert 0.01 < one[0]['metrics']['coco/bbox_mAP'] < 0.99
    for name in ('coco/bbox_mAP', 'coco/segm_mAP', 'coco/bbox_mAP_50'):
        assert two[0]['metrics'][name] == one[0]['metrics'][name]
    assert two[1] == one[1]


def test_plain_batch_norm_is_validated_as_it_is_saved(tiny, folder):  # noqa: F811
    work = train(folder, tiny, 2, 'BN')
    found, _ = scores(folder, folder / 'BN2.py', work / f'iter_{ITERATIONS}.pth', folder / 'data', 1)
    assert next(r['mIoU'] for r in logged(work) if 'mIoU' in r) == pytest.approx(found['metrics']['mIoU'], abs=1e-6)


def test_torchrun_names_the_rank_that_was_killed(tiny, folder, tmp_path):  # noqa: F811
    (tmp_path / 'killed.py').write_text(KILLED.format(base=str(tiny.config)))
    said = launch(
        2,
        'train',
        tmp_path / 'killed.py',
        '--data-root',
        folder / 'data',
        folder=tmp_path / 'work',
        modules=folder,
        status=1,
    )
    assert re.search(r'rank +: 1 .*\n +exitcode +: -9 .*\n(.*\n)?.*Signal 9 \(SIGKILL\) received', said), said[-3000:]
    assert (tmp_path / 'work' / 'iter_4.pth').is_file()
