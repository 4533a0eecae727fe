"""See a large-kernel network train, get reparameterized and be evaluated, in minutes on a CPU."""

import functools
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from PIL import Image

from replk_mm import cli
from replk_mm.analysis import complexity
from replk_mm.analysis.complexity import MASK_REGIONS, PROPOSALS
from replk_mm.analysis.timing import Call, Timing, time_interleaved
from replk_mm.checkpoints.io import read_checkpoint
from replk_mm.data.scenes.layouts import LAYOUTS
from replk_mm.data.scenes.writer import META, write_demo_data
from replk_mm.engine.config import load_config
from replk_mm.engine.evaluate import Evaluation, evaluate
from replk_mm.engine.inference import reparameterize_checkpoint
from replk_mm.engine.predict import label_map, load_for_prediction, predict, select_instances
from replk_mm.engine.prepare import prepare_training
from replk_mm.engine.process import RunOptions, prepare_work_dir
from replk_mm.engine.record import evaluation_record, write_record
from replk_mm.engine.train import train
from replk_mm.errors import UserError, command
from replk_mm.visualize import class_legend, colorize, draw_instances, image_grid

_SHOWN = 6
_LEAST_SCORE = 0.5


def scenes_of(data: Path) -> list[Path]:
    """Images of the validation scenes, in the layout of ADE20K or COCO."""
    return sorted(
        path
        for layout in LAYOUTS.values()
        for path in data.glob(layout.image.format(folder=layout.folders['val'], stem='*'))
    )


def draw_label_maps(model: Any, data: Path, out: Path) -> Path:
    """A sheet of validation scenes, their labels and the predicted ones, with a legend."""
    classes, palette = model.dataset_meta['classes'], model.dataset_meta['palette']
    rows = []
    for path, image, found in predict(model, [str(p) for p in scenes_of(data)[:_SHOWN]]):
        labels = label_map(found)
        written = Image.open(data / 'annotations' / 'validation' / f'{path.stem}.png')
        truth = np.asarray(written, dtype=np.int16) - 1  # 0 is not scored
        wrong = (truth >= 0) & (truth != labels)
        rows.append(
            [
                image,
                colorize(np.where(truth < 0, 255, truth), palette),
                colorize(labels, palette),
                np.where(wrong[..., None], np.array([40, 40, 220], np.uint8), image // 2 + 100),
            ]
        )
    return _write(rows, ['scene', 'ground truth', 'prediction', 'errors (red)'], classes, palette, out)


def draw_objects(model: Any, data: Path, out: Path) -> Path:
    """A sheet of validation scenes, their objects and the detected ones with their scores, with a legend."""
    from pycocotools import mask

    classes, palette = model.dataset_meta['classes'], model.dataset_meta['palette']
    written = json.loads((data / 'annotations' / 'instances_val2017.json').read_text())
    names = {category['id']: category['name'] for category in written['categories']}
    ids = {image['file_name']: image['id'] for image in written['images']}
    rows = []
    for path, image, found in predict(model, [str(p) for p in scenes_of(data)[:_SHOWN]]):
        truth = []
        for thing in written['annotations']:
            if thing['image_id'] == ids[path.name]:
                x, y, width, height = thing['bbox']
                truth.append(
                    dict(
                        label=classes.index(names[thing['category_id']]),
                        box=[x, y, x + width, y + height],
                        mask=mask.decode(thing['segmentation']).astype(bool),
                    )
                )
        rows.append(
            [
                image,
                draw_instances(image, truth, classes, palette),
                draw_instances(image, select_instances(found, _LEAST_SCORE), classes, palette),
            ]
        )
    return _write(rows, ['scene', 'ground truth', f'prediction (score {_LEAST_SCORE} and more)'], classes, palette, out)


def _write(rows: list[list[np.ndarray]], titles: list[str], classes: list[str], palette: list, out: Path) -> Path:
    picture = image_grid(rows, titles)
    everything = np.arange(len(classes)).repeat(2).reshape(-1, 2)
    key = class_legend(everything, classes, palette, picture.shape[0], shares=False)
    cv2.imwrite(str(out), np.hstack([picture, key]))
    return out


TRAIN_SCENES, VAL_SCENES = 800, 40


def _mean_iou(found: Evaluation) -> float:
    # From the per-class figures, which are not rounded.
    return float(np.mean([figures['IoU'] for figures in found.per_class.values()]))


def _percent(name: str, found: Evaluation) -> float:
    return 100 * found.metrics[name]


def _network(model: Any, data: Path) -> Call:
    """The network on a random image."""
    image = torch.randn(1, 3, *model.cfg.crop_size, generator=torch.Generator().manual_seed(0))
    return functools.partial(model, image)


def _detection(model: Any, data: Path) -> Call:
    """The whole detector on the first scene: what its heads have to do depends on what is found."""
    from mmdet.utils import get_test_pipeline_cfg
    from mmengine.dataset import Compose

    scene = Compose(get_test_pipeline_cfg(model.cfg))(dict(img_path=str(scenes_of(data)[0]), img_id=0))
    batch = model.data_preprocessor(dict(inputs=[scene['inputs']], data_samples=[scene['data_samples']]))
    return functools.partial(model, **batch, mode='predict')


@dataclass(frozen=True)
class Story:
    """What a demo trains and how it is judged.

    Attributes:
        config: Of the network.
        layout: Of the scenes on disk.
        metrics: In percent, from a test, by their names in the table.
        tolerance: By how much a metric of the two forms may differ, in percentage points.
        inference: What is timed: a model and the data to a call.
        draw: The picture of predictions: a model, the data and a file to the file.
        remark: What else the figures need to be understood.
    """

    config: str
    layout: str
    metrics: Mapping[str, Callable[[Evaluation], float]]
    tolerance: float
    inference: Callable[[Any, Path], Call]
    draw: Callable[[Any, Path, Path], Path]
    remark: str = ''


STORIES = {
    'segmentation': Story(
        'replk_mm::upernet_replk-nano_demo.py', 'ade20k', {'mIoU': _mean_iou}, 0.01, _network, draw_label_maps
    ),
    'detection': Story(
        'replk_mm::cascade-mask-rcnn_replk-nano_demo.py',
        'coco',
        {
            f'{what} {name}': functools.partial(_percent, f'coco/{kind}_{key}')
            for what, kind in (('box', 'bbox'), ('mask', 'segm'))
            for name, key in (('AP', 'mAP'), ('AP50', 'mAP_50'))
        },
        # 0.001 as COCO counts; scores that differ in their last bits may change places
        0.1,
        _detection,
        draw_objects,
        f'MACs: each box head on {PROPOSALS} regions, each mask head on {MASK_REGIONS}, as the papers '
        f'count them; milliseconds: a whole scene, with what is found in it',
    ),
}


@dataclass
class Row:
    """A line of the demo's table: the network in one form.

    Attributes:
        form: ``'trained'`` or ``'reparameterized'``.
        metrics: In percent.
        parameters: That inference uses.
        macs: Multiply-accumulates of one scene.
        milliseconds: Of one scene, timed in turns with the other form.
    """

    form: str
    metrics: dict[str, float]
    parameters: int
    macs: int
    milliseconds: Timing


def prepare_data(out: Path, seed: int, layout: str) -> Path:
    """Write the scenes, unless an earlier run has."""
    data = out / 'data'
    written = json.loads((data / META).read_text()) if (data / META).is_file() else {}
    wanted = dict(seed=seed, scenes=dict(train=TRAIN_SCENES, val=VAL_SCENES), layout=layout)
    if {key: written.get(key) for key in wanted} != wanted:
        write_demo_data(data, layout, train=TRAIN_SCENES, val=VAL_SCENES, seed=seed, overwrite=True, progress=True)
    return data


def run(
    out: Path, seed: int = 0, max_iters: int | None = None, resume: bool = False, story: Story = STORIES['segmentation']
) -> tuple[list[Row], Path]:
    """Run the demo.

    Args:
        out: Folder for everything it writes.
        seed: Of scenes and training.
        max_iters: Shorten the training, None for the config's schedule.
        resume: Go on from the last checkpoint in ``out``.
        story: What to train, one of :data:`STORIES`.

    Returns:
        The two rows of the table, and the sheet of predictions.
    """
    data = prepare_data(out, seed, story.layout)
    options = RunOptions(
        data_root=str(data),
        work_dir=str(out / 'train'),
        seed=seed,
        device='cpu',
        max_iters=max_iters,
        resume='auto' if resume else None,
    )
    cfg = load_config(story.config)
    trained = train(cfg, prepare_training(cfg, options))
    merged = out / 'reparameterized.pth'
    changes, differences = reparameterize_checkpoint(load_config(story.config), str(trained), merged)
    print('\n'.join(['', str(changes), *map(str, differences)]), flush=True)

    rows, records = [], []
    models = {
        'trained': load_for_prediction(load_config(story.config), str(trained), 'cpu'),
        'reparameterized': load_for_prediction(load_config(story.config), str(merged), 'cpu'),
    }
    size = load_config(story.config).crop_size
    with torch.no_grad():
        times = time_interleaved({name: story.inference(model, data) for name, model in models.items()})
    for (form, model), checkpoint in zip(models.items(), (trained, merged), strict=True):
        cfg = load_config(story.config)
        where = RunOptions(data_root=str(data), work_dir=str(out / f'test_{form}'), device='cpu')
        found = evaluate(cfg, str(checkpoint), where)
        records.append(evaluation_record(cfg, str(checkpoint), found, tta=False))
        cost = complexity.count_complexity(model, size)
        rows.append(
            Row(
                form,
                {name: of(found) for name, of in story.metrics.items()},
                cost.inference_parameters,
                cost.macs,
                times.summary(form),
            )
        )
    write_record(
        dict(
            rows=[vars(r) | dict(milliseconds=vars(r.milliseconds)) for r in rows],
            size=list(size),
            seed=seed,
            iterations=read_checkpoint(trained)['meta']['iter'],
            tests=records,
        ),
        out / 'demo.json',
    )
    return rows, story.draw(models['reparameterized'], data, out / 'predictions.png')


def table(rows: list[Row]) -> str:
    """The result as text."""
    before, after = rows
    widths = {name: max(7, len(name) + 1) for name in before.metrics}

    def line(form: str, metrics: list[str], parameters: str, macs: str, milliseconds: str) -> str:
        figures = ' '.join(f'{figure:>{width}}' for figure, width in zip(metrics, widths.values(), strict=True))
        return f'{form:16} {figures} {parameters:>12} {macs:>9} {milliseconds:>34}'

    faster = before.milliseconds.median / after.milliseconds.median
    return '\n'.join(
        [
            '',
            line('', list(widths), 'parameters', 'MACs', 'ms per scene, median (quartiles)'),
            *(
                line(
                    r.form,
                    [f'{value:.2f}' for value in r.metrics.values()],
                    f'{r.parameters:,}',
                    f'{r.macs / 1e9:.2f} G',
                    str(r.milliseconds),
                )
                for r in rows
            ),
            line(
                'difference',
                [f'{after.metrics[name] - before.metrics[name]:+.2f}' for name in widths],
                f'{after.parameters - before.parameters:+,}',
                f'{(after.macs - before.macs) / 1e9:+.2f} G',
                f'{faster:.2f} times as fast',
            ),
        ]
    )


def equal(rows: list[Row], tolerance: float = 0.01) -> bool:
    """Whether both forms have the same metrics, to ``tolerance`` percentage points."""
    before, after = rows
    return all(abs(before.metrics[name] - after.metrics[name]) <= tolerance for name in before.metrics)


@command
def main() -> None:
    p = cli.parser(__doc__, 'demo --task detection --out demo/detection')
    p.add_argument(
        '--task',
        choices=sorted(STORIES),
        default='segmentation',
        help='label maps, or boxes and masks (default: segmentation)',
    )
    p.add_argument(
        '--out', default='demo', metavar='DIR', help='folder for data, checkpoints and pictures (default: demo)'
    )
    p.add_argument('--seed', type=int, default=0, metavar='N', help='of scenes and training (default: 0)')
    p.add_argument(
        '--max-iters', type=cli.positive_int, metavar='N', help='train N iterations instead of the full demo'
    )
    p.add_argument('--resume', action='store_true', help='go on where an interrupted demo stopped')
    args = p.parse_args()
    start, story = time.monotonic(), STORIES[args.task]
    rows, picture = run(prepare_work_dir(args.out, option='--out'), args.seed, args.max_iters, args.resume, story)
    print(table(rows))
    print(
        f'\n{", ".join(story.metrics)} in percent over {VAL_SCENES} scenes never trained on; '
        f'{(time.monotonic() - start) / 60:.1f} minutes'
    )
    if story.remark:
        print(story.remark)
    print(f'predictions: {picture}\nfigures with their protocol: {Path(args.out) / "demo.json"}')
    if not equal(rows, story.tolerance):
        raise UserError(
            f'{", ".join(story.metrics)} before and after reparameterization differ by more than '
            f'{story.tolerance:g} percentage points: see the table'
        )
