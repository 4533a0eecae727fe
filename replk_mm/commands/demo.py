"""Train a small RepLKNet on generated scenes, reparameterize it and evaluate it before and after.

Needs no data and no GPU. On two cores it takes about 4 minutes, or 5 with --task detection.
"""

import functools
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jinja2 import Environment, PackageLoader, StrictUndefined
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
from replk_mm.engine.predict import label_map, load_for_prediction, predict, select_instances, write_picture
from replk_mm.engine.prepare import prepare_training
from replk_mm.engine.process import RunOptions
from replk_mm.engine.record import evaluation_record, write_record
from replk_mm.engine.resuming import require_no_run
from replk_mm.engine.train import train
from replk_mm.errors import UserError, command, command_line
from replk_mm.files import write_output
from replk_mm.text import text_table
from replk_mm.visualize import class_legend, colorize, draw_instances, image_grid

TRAIN_SCENES, VAL_SCENES = 800, 40
#: Validation scenes in the picture.
SHOWN_SCENES = 6
#: Score from which the picture shows a detected object.
MIN_SCORE = 0.5


# -- pictures
def find_images(data: Path) -> list[Path]:
    """Images of the validation scenes, in the layout of ADE20K or COCO."""
    return sorted(path for name in ('ade20k', 'coco') for path in data.glob(LAYOUTS[name].files('val', '*')[0]))


def draw_segmentation(model: Any, data: Path, out: Path) -> None:
    """Write a picture of scenes, label maps, predictions and errors."""
    classes, palette = model.dataset_meta['classes'], model.dataset_meta['palette']
    rows, shown = [], []
    for path, image, prediction in predict(model, [str(p) for p in find_images(data)[:SHOWN_SCENES]]):
        labels = label_map(prediction)
        annotation = Image.open(data / 'annotations' / 'validation' / f'{path.stem}.png')
        truth = np.asarray(annotation, dtype=np.int16) - 1  # 0 is ignored
        wrong = (truth >= 0) & (truth != labels)
        shown += [labels.ravel(), truth[truth >= 0]]
        rows.append(
            [
                image,
                colorize(np.where(truth < 0, 255, truth), palette),
                colorize(labels, palette),
                np.where(wrong[..., None], np.array([40, 40, 220], np.uint8), image // 2 + 100),
            ]
        )
    _write_picture(rows, ['scene', 'ground truth', 'prediction', 'errors (red)'], shown, classes, palette, out)


def draw_detection(model: Any, data: Path, out: Path) -> None:
    """Write a picture of scenes, annotated objects and detected objects with their scores."""
    from replk_mm.data.coco_dataset import CocoIndex

    classes, palette = model.dataset_meta['classes'], model.dataset_meta['palette']
    coco = CocoIndex(data / 'annotations' / 'instances_val2017.json')
    images = {image['file_name']: image['id'] for image in coco.imgs.values()}
    rows, shown = [], []
    for path, image, prediction in predict(model, [str(p) for p in find_images(data)[:SHOWN_SCENES]]):
        truth = []
        for annotation in coco.imgToAnns[images[path.name]]:
            x, y, width, height = annotation['bbox']
            name = coco.cats[annotation['category_id']]['name']
            box, mask = [x, y, x + width, y + height], coco.annToMask(annotation).astype(bool)
            truth.append(dict(label=classes.index(name), box=box, mask=mask))
        found = select_instances(prediction, MIN_SCORE)
        rows.append([image, *(draw_instances(image, objects, classes, palette) for objects in (truth, found))])
        shown.append(np.array([thing['label'] for thing in truth + found], int))
    titles = ['scene', 'ground truth', f'prediction (score {MIN_SCORE} or more)']
    _write_picture(rows, titles, shown, classes, palette, out)


def _write_picture(
    rows: list, titles: list[str], shown: list[np.ndarray], classes: list[str], palette: list, out: Path
) -> None:
    picture = image_grid(rows, titles)
    key = class_legend(np.concatenate(shown), classes, palette, picture.shape[0], shares=False)
    write_picture(out, np.hstack([picture, key]))


# -- tasks
def mean_iou(result: Evaluation) -> float:
    """mIoU in percent from the figures of the classes, which are not rounded."""
    return float(np.mean([figures['IoU'] for figures in result.per_class.values()]))


def _coco_metric(key: str, result: Evaluation) -> float:
    return 100 * result.metrics[key]


def _segmentor_call(model: Any, data: Path) -> Call:
    image = torch.randn(1, 3, *model.cfg.crop_size, generator=torch.Generator().manual_seed(0))
    return functools.partial(model, image)


def _detector_call(model: Any, data: Path) -> Call:
    """The whole detector on the first scene, since the time of its heads depends on the number of objects."""
    from mmdet.utils import get_test_pipeline_cfg
    from mmengine.dataset import Compose

    scene = Compose(get_test_pipeline_cfg(model.cfg))(dict(img_path=str(find_images(data)[0]), img_id=0))
    batch = model.data_preprocessor(dict(inputs=[scene['inputs']], data_samples=[scene['data_samples']]))
    return functools.partial(model, **batch, mode='predict')


@dataclass(frozen=True)
class DemoTask:
    """What a demo trains, and how the result is measured."""

    config: str  #: config of the network
    layout: str  #: layout of the scenes on disk
    #: functions of a test's result that return percentages, by the metric's name in the table
    metrics: Mapping[str, Callable[[Evaluation], float]]
    tolerance: float  #: largest accepted difference between the two forms, in percentage points
    inference: Callable[[Any, Path], Call]  #: function of a model and the data folder that returns the call to time
    draw: Callable[[Any, Path, Path], None]  #: function of a model, the data folder and a file that writes the picture
    own_data: Sequence[str]  #: arguments of the ``train`` command for the reader's own photographs
    note: str = ''  #: explanation of the figures


TASKS = {
    'segmentation': DemoTask(
        config='replk_mm::upernet_replk-nano_demo.py',
        layout='ade20k',
        metrics={'mIoU': mean_iou},
        tolerance=0.01,
        inference=_segmentor_call,
        draw=draw_segmentation,
        own_data=('replk_mm::upernet_replk-nano_ade20k.py', '--data-root', 'DIR', '--classes', 'crop,weed,soil'),
    ),
    'detection': DemoTask(
        config='replk_mm::cascade-mask-rcnn_replk-nano_demo.py',
        layout='coco',
        metrics={
            f'{what} {name}': functools.partial(_coco_metric, f'coco/{kind}_{key}')
            for what, kind in (('box', 'bbox'), ('mask', 'segm'))
            for name, key in (('AP', 'mAP'), ('AP50', 'mAP_50'))
        },
        tolerance=0.1,  # rounding errors may swap detections of nearly equal scores
        inference=_detector_call,
        draw=draw_detection,
        own_data=('replk_mm::cascade-mask-rcnn_replk-nano_coco.py', '--data-root', 'DIR', '--classes', 'auto'),
        note=f'MACs: each box head on {PROPOSALS} regions and each mask head on {MASK_REGIONS}, as in the papers; '
        f'milliseconds: a whole scene with the regions found in it',
    ),
}


# -- the demo
@dataclass
class DemoRow:
    """The network in one form."""

    form: str  #: ``'trained'`` or ``'reparameterized'``
    metrics: dict[str, float]  #: percentages by name
    parameters: int  #: number of parameters that inference uses
    macs: int  #: multiply-accumulates of one scene
    milliseconds: Timing  #: time of one scene, measured in turns with the other form
    unreliable: str = ''  #: why that time is not reliable; empty if it is


def write_scenes(out: Path, seed: int, layout: str) -> Path:
    """Write the scenes to ``out/data``, unless an earlier run has, and return that folder."""
    data = out / 'data'
    found = json.loads((data / META).read_text()) if (data / META).is_file() else {}
    wanted = dict(seed=seed, scenes=dict(train=TRAIN_SCENES, val=VAL_SCENES), layout=layout)
    if {key: found.get(key) for key in wanted} != wanted:
        write_demo_data(data, layout, train=TRAIN_SCENES, val=VAL_SCENES, seed=seed, overwrite=True)
    return data


def run_demo(
    task: DemoTask, out: Path, seed: int = 0, max_iters: int | None = None, resume: bool = False
) -> tuple[list[DemoRow], dict]:
    """Train, reparameterize, evaluate and time a network; write checkpoints and the picture to ``out``.

    Args:
        task: One of :data:`TASKS`.
        out: Folder for all files.
        seed: Seed of scenes and training.
        max_iters: Number of iterations. Defaults to the config's.
        resume: Continue from the last checkpoint in ``out``. Defaults to False, which replaces an earlier training.

    Returns:
        The rows of the table, and all figures with their protocol as plain data.
    """
    data = write_scenes(out, seed, task.layout)
    options = RunOptions(
        data_root=str(data),
        work_dir=str(out / 'train'),
        seed=seed,
        device='cpu',
        max_iters=max_iters,
        resume='auto' if resume else None,
        overwrite=not resume,
    )
    cfg = load_config(task.config)
    trained = train(cfg, prepare_training(cfg, options), overwrite=not resume)
    merged = out / 'reparameterized.pth'
    changes, differences = reparameterize_checkpoint(load_config(task.config), str(trained), merged, overwrite=True)
    print('\n'.join(['', str(changes), *map(str, differences)]), flush=True)

    checkpoints = {'trained': str(trained), 'reparameterized': str(merged)}
    models = {form: load_for_prediction(load_config(task.config), path, 'cpu') for form, path in checkpoints.items()}
    crop_size = load_config(task.config).crop_size
    with torch.no_grad():
        times = time_interleaved({form: task.inference(model, data) for form, model in models.items()})
    rows, tests = [], []
    for form, checkpoint in checkpoints.items():
        cfg = load_config(task.config)
        options = RunOptions(data_root=str(data), work_dir=str(out / f'test_{form}'), device='cpu')
        result = evaluate(cfg, checkpoint, options)
        tests.append(evaluation_record(cfg, checkpoint, result, tta=False))
        cost = complexity.count_complexity(models[form], crop_size)
        metrics = {name: metric(result) for name, metric in task.metrics.items()}
        rows.append(
            DemoRow(form, metrics, cost.inference_parameters, cost.macs, times.summary(form), times.problem(form))
        )
    task.draw(models['reparameterized'], data, out / 'predictions.png')
    iterations = read_checkpoint(trained)['meta']['iter']
    figures = dict(
        rows=[asdict(row) for row in rows], size=list(crop_size), seed=seed, iterations=iterations, tests=tests
    )
    return rows, figures


def table_cells(rows: Sequence[DemoRow]) -> list[list[str]]:
    """The cells of the table: a heading, the two forms, and their difference."""
    before, after = rows
    speedup = before.milliseconds.median / after.milliseconds.median
    return [
        ['', *before.metrics, 'parameters', 'MACs', 'ms per scene, median (quartiles)'],
        *(
            [
                row.form,
                *(f'{value:.2f}' for value in row.metrics.values()),
                f'{row.parameters:,}',
                f'{row.macs / 1e9:.2f} G',
                f'{row.milliseconds}{" ?" if row.unreliable else ""}',
            ]
            for row in rows
        ),
        [
            'difference',
            *(f'{after.metrics[name] - value:+.2f}' for name, value in before.metrics.items()),
            f'{after.parameters - before.parameters:+,}',
            f'{(after.macs - before.macs) / 1e9:+.2f} G',
            f'{speedup:.2f} times as fast',
        ],
    ]


def metrics_match(rows: Sequence[DemoRow], tolerance: float) -> bool:
    """Whether no metric of the two forms differs by more than ``tolerance`` percentage points."""
    before, after = rows
    return all(abs(before.metrics[name] - after.metrics[name]) <= tolerance for name in before.metrics)


def render_report(**content: Any) -> str:
    """The HTML page of the demo; it refers to ``predictions.png`` beside it."""
    environment = Environment(
        loader=PackageLoader('replk_mm', 'commands'),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template('demo.html.j2').render(content)


@command
def main() -> None:
    p = cli.parser(__doc__, 'demo --task detection --out demo/detection')
    p.add_argument(
        '--task',
        choices=sorted(TASKS),
        default='segmentation',
        help='label maps, or boxes and masks (default: %(default)s)',
    )
    p.add_argument('--out', default='demo', metavar='DIR', help='folder for all files (default: demo)')
    p.add_argument('--seed', type=int, default=0, metavar='N', help='seed of scenes and training (default: 0)')
    p.add_argument(
        '--max-iters', type=cli.positive_int, metavar='N', help="iterations (default: as in the demo's config)"
    )
    former = p.add_mutually_exclusive_group()
    former.add_argument('--resume', action='store_true', help='continue an interrupted demo')
    former.add_argument('--overwrite', action='store_true', help='replace an earlier demo')
    args = p.parse_args()
    start, task = time.monotonic(), TASKS[args.task]
    if not (args.resume or args.overwrite):
        require_no_run(Path(args.out, 'train'))
    out = cli.prepare_out(args, 'demo.json', 'report.html', 'predictions.png', 'reparameterized.pth')
    rows, figures = run_demo(task, out, args.seed, args.max_iters, args.resume)
    write_record(figures, out / 'demo.json')
    cells, names = table_cells(rows), ', '.join(task.metrics)
    caption = f'{names} in percent on {VAL_SCENES} scenes that were not used for training.'
    own_data = command_line('train', *task.own_data)
    page = render_report(figures=figures, task=task, cells=cells, caption=caption, own_data=own_data)
    write_output(out / 'report.html', page)
    print(f'\n{text_table(cells)}\n\n{caption} {(time.monotonic() - start) / 60:.1f} minutes.')
    for note in filter(None, (task.note, *{f'?: {row.unreliable}' for row in rows if row.unreliable})):
        print(note)
    print(f'\nnext, train on your own photographs in DIR (docs/data.md describes the folders):\n  {own_data}')
    print(f'picture: {out / "predictions.png"}\nreport:  {out / "report.html"}')
    if not metrics_match(rows, task.tolerance):
        raise UserError(
            f'{names} before and after reparameterization differ by more than {task.tolerance:g} percentage points\n'
            f'The table shows both.'
        )
