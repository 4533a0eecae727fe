"""The demo's pictures: scenes, what is in them, and what a network finds."""

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image

from replk_mm.data.demo_layouts import LAYOUTS
from replk_mm.engine.predict import instances, label_map, predict
from replk_mm.visualize import colorize, draw_instances, legend, sheet

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
                draw_instances(image, instances(found, _LEAST_SCORE), classes, palette),
            ]
        )
    return _write(rows, ['scene', 'ground truth', f'prediction (score {_LEAST_SCORE} and more)'], classes, palette, out)


def _write(rows: list[list[np.ndarray]], titles: list[str], classes: list[str], palette: list, out: Path) -> Path:
    picture = sheet(rows, titles)
    everything = np.arange(len(classes)).repeat(2).reshape(-1, 2)
    key = legend(everything, classes, palette, picture.shape[0], shares=False)
    cv2.imwrite(str(out), np.hstack([picture, key]))
    return out
