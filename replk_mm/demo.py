"""The whole chain on procedural scenes: write data, train, test, reparameterize, test again, compare, draw."""
import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from PIL import Image

from replk_mm import checkpoints
from replk_mm.analysis import complexity
from replk_mm.analysis.speed import Timing, interleaved
from replk_mm.data.demo_writer import META, write_demo_data
from replk_mm.engine import results
from replk_mm.engine.config import load_config
from replk_mm.engine.evaluate import evaluate
from replk_mm.engine.machine import Options
from replk_mm.engine.merge import reparameterize_checkpoint
from replk_mm.engine.predict import load_segmentor, predict
from replk_mm.engine.prepare import prepare_training
from replk_mm.engine.train import train
from replk_mm.visualize import colorize, legend, sheet

CONFIG = 'replk_mm::upernet_replk-nano_demo.py'
TRAIN_SCENES, VAL_SCENES = 800, 40
_SHOWN = 6


@dataclass
class Row:
    """A line of the demo's table: the network in one form.

    Attributes:
        form: ``'trained'`` or ``'reparameterized'``.
        miou: Over all classes, in percent.
        parameters: That inference uses.
        macs: Multiply-accumulates of one scene.
        milliseconds: Of one scene, timed in turns with the other form.
    """

    form: str
    miou: float
    parameters: int
    macs: int
    milliseconds: Timing


def prepare_data(out: Path, seed: int) -> Path:
    """Write the scenes, unless an earlier run has."""
    data = out / 'data'
    written = json.loads((data / META).read_text()) if (data / META).is_file() else {}
    if [written.get('seed'), written.get('scenes')] != [seed, {'train': TRAIN_SCENES, 'val': VAL_SCENES}]:
        write_demo_data(data, train=TRAIN_SCENES, val=VAL_SCENES, seed=seed, overwrite=True, progress=True)
    return data


def run(out: Path, seed: int = 0, max_iters: int | None = None, resume: bool = False) -> tuple[list[Row], Path]:
    """Run the demo.

    Args:
        out: Folder for everything it writes.
        seed: Of scenes and training.
        max_iters: Shorten the training, None for the config's schedule.
        resume: Go on from the last checkpoint in ``out``.

    Returns:
        The two rows of the table, and the sheet of predictions.
    """
    data = prepare_data(out, seed)
    options = Options(data_root=str(data), work_dir=str(out / 'train'), seed=seed, device='cpu',
                      max_iters=max_iters, resume='auto' if resume else None)
    cfg = load_config(CONFIG)
    trained = train(cfg, prepare_training(cfg, options))
    merged = out / 'reparameterized.pth'
    changes, differences = reparameterize_checkpoint(load_config(CONFIG), str(trained), merged)
    print('\n'.join(['', str(changes), *map(str, differences)]), flush=True)

    rows, records = [], []
    models = {'trained': load_segmentor(load_config(CONFIG), str(trained), 'cpu'),
              'reparameterized': load_segmentor(load_config(CONFIG), str(merged), 'cpu')}
    size = load_config(CONFIG).crop_size
    image = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(0))
    times = interleaved({name: functools.partial(model, image) for name, model in models.items()})
    for (form, model), checkpoint in zip(models.items(), (trained, merged), strict=True):
        cfg = load_config(CONFIG)
        where = Options(data_root=str(data), work_dir=str(out / f'test_{form}'), device='cpu')
        found = evaluate(cfg, str(checkpoint), where)
        records.append(results.record(cfg, str(checkpoint), found, tta=False))
        # From the per-class figures, which are not rounded.
        miou = float(np.mean([figures['IoU'] for figures in found.per_class.values()]))
        rows.append(Row(form, miou, complexity.inference_parameters(model), complexity.macs(model, size), times[form]))
    results.write(dict(rows=[vars(r) | dict(milliseconds=vars(r.milliseconds)) for r in rows], size=list(size), seed=seed,
                       iterations=checkpoints.read(trained)['meta']['iter'], tests=records), out / 'demo.json')
    return rows, draw(models['reparameterized'], data, out / 'predictions.png')


def draw(model: Any, data: Path, out: Path) -> Path:
    """A sheet of validation scenes, their labels and the predictions, with a legend."""
    classes, palette = model.dataset_meta['classes'], model.dataset_meta['palette']
    images = sorted((data / 'images' / 'validation').glob('*.jpg'))[:_SHOWN]
    rows = []
    for path, image, labels in predict(model, [str(p) for p in images]):
        written = Image.open(data / 'annotations' / 'validation' / f'{path.stem}.png')
        truth = np.asarray(written, dtype=np.int16) - 1  # 0 is not scored
        wrong = (truth >= 0) & (truth != labels)
        rows.append([image, colorize(np.where(truth < 0, 255, truth), palette), colorize(labels, palette),
                     np.where(wrong[..., None], np.array([40, 40, 220], np.uint8), image // 2 + 100)])
    picture = sheet(rows, ['scene', 'ground truth', 'prediction', 'errors (red)'])
    everything = np.arange(len(classes)).repeat(2).reshape(-1, 2)
    key = legend(everything, classes, palette, picture.shape[0], shares=False)
    cv2.imwrite(str(out), np.hstack([picture, key]))
    return out


def table(rows: list[Row]) -> str:
    """The result as text."""
    before, after = rows
    lines = ['', f'{"":16} {"mIoU":>7} {"parameters":>12} {"MACs":>9} {"ms per scene, median (quartiles)":>34}']
    lines += [f'{r.form:16} {r.miou:7.2f} {r.parameters:12,} {r.macs / 1e9:7.2f} G {str(r.milliseconds):>34}' for r in rows]
    faster = before.milliseconds.median / after.milliseconds.median
    lines.append(f'{"difference":16} {after.miou - before.miou:+7.2f} {after.parameters - before.parameters:+12,} '
                 f'{(after.macs - before.macs) / 1e9:+7.2f} G {f"{faster:.2f} times as fast":>34}')
    return '\n'.join(lines)


def equal(rows: list[Row], tolerance: float = 0.01) -> bool:
    """Whether both forms have the same mIoU, to ``tolerance`` percentage points."""
    return abs(rows[0].miou - rows[1].miou) <= tolerance
