"""Made-up results of a suite, for tests of the report: nothing in them was measured."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from replk_mm.bench.report.load import load_report
from replk_mm.bench.report.render import render_html
from replk_mm.bench.report.structures import Report
from replk_mm.evaluation.per_image import SegmentationCounts
from replk_mm.files import sha256

CLASSES, PALETTE = ['sky', 'ground', 'water'], [[135, 190, 235], [125, 150, 75], [40, 85, 165]]
PROTOCOL = dict(
    task='segmentation',
    data=dict(root='scenes', sha256='d' * 64, images=80),
    crop=[96, 96],
    mode='whole',
    scales=[dict(scale=[96, 96])],
    tta=False,
    iterations=300,
    batch=8,
    samples_seen=2400,
    pretraining='none',
    precision='float32',
)
SPEED = dict(device='cpu', cpu='Made-up CPU', threads=2, shape=[96, 96], batch=1, precision='float32', torch='0.0')


def record(row: str, seed: int, measurement: str, values: dict, **changes) -> dict:
    """A record; ``changes`` replace its fields."""
    return {
        **dict(
            version=1,
            suite='made_up',
            question='Is anything in this fixture measured? No.',
            row=row,
            label=row,
            seed=seed,
            measurement=measurement,
            status='done',
            reason=None,
            values=values,
            protocol={},
            facts={},
            config=dict(path='configs/upernet_replk-nano_demo.py', sha256='c' * 64, options={}),
            checkpoint=dict(
                path='runs/x.pth',
                sha256='e' * 12 + hashlib.sha256(f'{row}.{seed}'.encode()).hexdigest()[12:],
                iteration=300,
                trained=True,
            ),
            published=None,
            git=dict(commit='f' * 40, dirty=True),
            environment=dict(torch='0.0', cpu='Made-up CPU', threads=2),
            started=f'2001-01-0{1 + seed}T00:00:00+00:00',
            seconds=1.5,
            files={},
            key=f'{row}.{seed}.{measurement}',
        ),
        **changes,
    }


def write(folder: Path, records: list[dict]) -> Path:
    """Write records as a suite does, a file for each row and seed."""
    (folder / 'results').mkdir(parents=True, exist_ok=True)
    for one in records:
        with (folder / 'results' / f'{one["row"]}.{one["seed"]}.jsonl').open('a') as file:
            file.write(json.dumps(one) + '\n')
    return folder


def metric(row: str, seed: int, miou: float, **changes) -> dict:
    """A metric's record."""
    return record(
        row,
        seed,
        'metric',
        dict(metrics=dict(mIoU=miou), per_class={}, images=80, primary='mIoU', unit='%'),
        **{'protocol': PROTOCOL, **changes},
    )


def counted(folder, row: str, seed: int, quality: float, images: int = 40, **changes) -> dict:
    """A metric's record with counts per image, of two classes with 100 pixels in each image."""
    correct = np.random.default_rng([seed, *row.encode()]).binomial(100, quality, (images, 2))
    predicted, label = correct + 100 - correct[:, ::-1], np.full((images, 2), 100)
    path = folder / 'runs' / row / str(seed) / 'test' / 'statistics.npz'
    names = tuple(f'{i}.jpg' for i in range(images))
    SegmentationCounts(images=names, classes=('a', 'b'), intersection=correct, predicted=predicted, label=label).save(
        path
    )
    total = correct.sum(0)
    miou = float((100 * total / (predicted.sum(0) + 100 * images - total)).mean())
    stated = dict(mIoU=dict(file='statistics.npz', sha256=sha256(path)))
    files = dict(statistics=str(path.relative_to(folder)))
    return metric(row, seed, miou, **{'files': files, 'facts': dict(statistics=stated), **changes})


def speed(row: str, seed: int, ms: float, **changes) -> dict:
    """A speed's record; the quartiles are a twentieth off."""
    form = dict(median_ms=ms, low_ms=0.95 * ms, high_ms=1.05 * ms, throughput=1000 / ms)
    return record(
        row,
        seed,
        'speed',
        dict(forms=dict(reparameterized=form, training={**form, 'median_ms': 2 * ms}), batch=1),
        **{'protocol': SPEED, **changes},
    )


def complete(row: str, label: str, seed: int, quality: float, cost: float, files: dict, **changes) -> list[dict]:
    """Every measurement of a row and seed."""
    wave = [[i, 2.5 / (1 + i / 40) + 0.05 * np.sin(i + seed)] for i in range(0, 301, 5)]
    rise = [[i, quality * (1 - np.exp(-i / 90)) + seed] for i in range(30, 301, 30)]
    size = dict(shape=[96, 96], counter='torch')
    found = [
        metric(row, seed, quality + 0.6 * seed, files=dict(predictions=files['predictions'])),
        record(
            row,
            seed,
            'complexity',
            dict(
                parameters=int(4e6 * cost),
                inference_parameters=int(3.6e6 * cost),
                macs=int(2e9 * cost),
                merged_parameters=int(3.5e6 * cost),
                merged_macs=int(1.9e9 * cost),
            ),
            protocol=size,
        ),
        speed(row, seed, 12.0 * cost + 0.1 * seed),
        record(row, seed, 'memory', dict(inference_bytes=int(80e6 * cost), training_bytes=None), protocol=SPEED),
        record(
            row,
            seed,
            'erf',
            dict(
                areas_of_scores={
                    str(t): dict(side=round(20 * cost * s), ratio=0.1 * s)
                    for t, s in ((0.2, 1), (0.3, 1.4), (0.5, 2), (0.99, 5))
                },
                size=192,
                images=8,
                trained=True,
            ),
            files=dict(heat_map=files['heat_map']),
            protocol=dict(size=192, images=8, stage=3, trained=True),
        ),
        record(
            row,
            seed,
            'shape_bias',
            dict(shape_bias=0.3 + 0.1 * cost, shape_decisions=30, texture_decisions=50, other=0),
            protocol=dict(scenes=dict(count=80)),
        ),
        record(row, seed, 'curve', dict(loss=wave, metric=rise, name='mIoU'), protocol=PROTOCOL),
        record(row, seed, 'train', dict(seconds=100.0, iterations=300, samples_seen=2400)),
    ]
    return [{**one, 'label': label, **changes} for one in found]


def facts(data: Path, **changes) -> dict:
    """What a record of a metric says of its data."""
    return dict(
        data={
            **dict(
                root=str(data),
                images='images/validation',
                labels='annotations/validation',
                image_suffix='.jpg',
                label_suffix='.png',
                annotations=None,
                classes=CLASSES,
                palette=PALETTE,
                ignored=0,
            ),
            **changes,
        }
    )


def scenes(folder: Path, count: int = 7) -> Path:
    """Images and label maps in ADE20K's layout."""
    generator = np.random.default_rng(0)
    for name in ('images/validation', 'annotations/validation'):
        (folder / name).mkdir(parents=True)
    for i in range(count):
        labels = label_map(i)
        image = np.array([[0, 0, 0], *PALETTE], np.uint8)[labels].astype(int) + generator.integers(-25, 25, (72, 96, 3))
        Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(folder / f'images/validation/{i:03}.jpg')
        Image.fromarray(labels).save(folder / f'annotations/validation/{i:03}.png')
    return folder


def label_map(index: int, shift: int = 0) -> np.ndarray:
    """Sky over ground with water in it, ``(72, 96)``; ``shift`` moves the horizon."""
    labels = np.full((72, 96), 2, np.uint8)
    labels[: 25 + 3 * index + shift] = 1
    labels[50 + shift :, 20 + 5 * index : 50 + 6 * index] = 3
    return labels


def files_of(folder: Path, row: str, shift: int, count: int = 7) -> dict[str, str]:
    """Predictions and a heat map of a row, in a work dir."""
    predictions, heat_map = f'runs/{row}/0/test/predictions', f'runs/{row}/0/erf/erf.png'
    for name in (predictions, Path(heat_map).parent):
        (folder / name).mkdir(parents=True)
    for i in range(count):
        Image.fromarray(label_map(i, shift)).save(folder / predictions / f'{i:03}.png')
    y, x = np.mgrid[-1:1:192j, -1:1:192j]
    warmth = np.exp(-(x**2 + y**2) * 18 / (1 + shift))
    Image.fromarray((np.stack([warmth, warmth**2, warmth**4], -1) * 255).astype(np.uint8)).save(folder / heat_map)
    return dict(predictions=predictions, heat_map=heat_map)


def made_up_suite(folder: Path) -> Path:
    """A work dir with three rows of one protocol, one of another, one measured on another CPU, and one that failed."""
    data = scenes(folder / 'data')
    found = []
    for place, (row, label, quality, cost, seeds) in enumerate(
        (
            ('replk-31', 'RepLKNet made up, 31x31', 60.0, 2.0, 3),
            ('replk-13', 'RepLKNet made up, 13x13', 55.0, 1.5, 3),
            ('convnext', 'ConvNeXt made up', 54.7, 1.0, 3),
        )
    ):
        files = files_of(folder, row, 2 + 3 * place)
        for seed in range(seeds):
            found += [{**one, 'facts': facts(data)} for one in complete(row, label, seed, quality, cost, files)]
    longer = {**PROTOCOL, 'iterations': 600, 'samples_seen': 4800}
    found += [
        metric('longer', 0, 70.0, label='Longer, made up', protocol=longer),
        speed('longer', 0, 9.0, label='Longer, made up', protocol={**SPEED, 'cpu': 'Another made-up CPU'}),
        record(
            'broken',
            0,
            'train',
            {},
            status='failed',
            reason='loss is NaN at iteration 12',
            label='<script>document.title = "broken out"</script>',
        ),
    ]
    return write(folder, found)


@pytest.fixture(scope='module')
def suite(tmp_path_factory) -> Path:
    """The made-up suite's work dir."""
    return made_up_suite(tmp_path_factory.mktemp('made_up'))


@pytest.fixture(scope='module')
def found(suite) -> Report:
    return load_report([suite])


@pytest.fixture(scope='module')
def page(found) -> str:
    return render_html(found)
