"""Example predictions of detectors: COCO's result files drawn into the images."""
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from replk_mm.bench.report.label_examples import WIDTH, Data, Example, Shown, choose, photo
from replk_mm.bench.report.pictures import Album, Unusable, read_rgb
from replk_mm.data.coco import is_number, mask_problem

#: Detections that are drawn: of at least this score, and this many at most.
LEAST_SCORE, MOST_OBJECTS = 0.3, 40
_MOST_FILE_BYTES = 512 * 2**20
#: How far outside of its image a box is still drawn, pixels.
_EDGE = 9


def of_objects(rows: Sequence[tuple[int, str, Path]], data: Data, album: Album) -> list[Example]:
    """Images, their annotated objects and the detected ones; arguments as of
    :func:`replk_mm.bench.report.label_examples.of_label_maps`.

    Raises:
        Unusable: If the annotations cannot be read.
    """
    try:
        written = _load(data.root / data.annotations, dict)
        images = {image['id']: image for image in written['images']}
        classes = {category['id']: str(category['name']) for category in written['categories']}
        truths = _by_image(written['annotations'])
        colours = {category: data.palette[i % len(data.palette)] for i, category in enumerate(sorted(classes))}
    except (KeyError, TypeError, AttributeError) as error:
        raise Unusable(f'{data.root / data.annotations}: not COCO annotations ({error!r:.200})') from error
    found = {number: _results(folder, album) for number, _, folder in rows}
    names = {number: {str(images[i]['file_name']) for i in of_row if i in images} for number, of_row in found.items()}
    ids = {str(image['file_name']): key for key, image in images.items()}
    examples = []
    for name in choose(names.values()):
        path = data.root / data.images / name
        example = Example(name, photo(path, name, album), Shown(None, 'missing'))
        if example.image.picture:
            pixels = read_rgb(path)
            example.truth = _drawn(pixels, truths.get(ids[name], []), classes, colours, f'ground truth of {name}', album)
            for number, label, _ in rows:
                example.predictions[number] = _drawn(pixels, found[number].get(ids[name], []), classes, colours,
                                                     f'{label}: {name}', album)
        examples.append(example)
    return examples


def _results(folder: Path, album: Album) -> dict[Any, list[dict]]:
    """Detections of a row by image: those with masks if it has them."""
    for name in ('instances.segm.json', 'instances.bbox.json'):
        if (folder / name).is_file():
            try:
                return _by_image(_load(folder / name, list))
            except (Unusable, KeyError, TypeError, AttributeError) as error:
                album.problems.append(str(error) if isinstance(error, Unusable) else f'{folder / name}: not COCO results')
    return {}


def _load(path: Path, kind: type) -> Any:
    try:
        if path.stat().st_size > _MOST_FILE_BYTES:
            raise Unusable(f'{path}: larger than {_MOST_FILE_BYTES // 2**20} MiB')
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise Unusable(f'{path}: cannot be read as JSON ({type(error).__name__})') from error
    if not isinstance(found, kind):
        raise Unusable(f'{path}: {type(found).__name__} instead of {kind.__name__}')
    return found


def _by_image(things: Sequence[dict]) -> dict[Any, list[dict]]:
    found: dict[Any, list[dict]] = {}
    for thing in things:
        box, score = thing.get('bbox') or [0, 0, 0, 0], thing.get('score', 1.)
        if not isinstance(box, list) or len(box) != 4 or not all(map(is_number, (*box, score))):
            raise TypeError(f'bbox {box!r:.60}, score {score!r:.20}')
        if not isinstance(thing.get('category_id'), (int, str)):
            raise TypeError('an object without a category')
        found.setdefault(thing['image_id'], []).append(thing)
    return found


def _drawn(pixels: np.ndarray, things: Sequence[dict], classes: Mapping[Any, str], colours: Mapping[Any, Any], name: str,
           album: Album) -> Shown:
    from replk_mm.visualize import draw_instances
    order = sorted(classes)
    objects = []
    for thing in sorted(things, key=lambda t: -t.get('score', 1.))[:MOST_OBJECTS]:
        if thing.get('category_id') in classes and thing.get('score', 1.) >= LEAST_SCORE:
            objects.append(_object(thing, order, pixels.shape[:2]))
    drawn = draw_instances(pixels[..., ::-1], objects, [classes[c] for c in order], [colours[c] for c in order])
    picture = album.add(np.ascontiguousarray(drawn[..., ::-1]), 2 * WIDTH, 'photo', name)
    counts: dict[str, int] = {}
    for thing in objects:
        counts[classes[order[thing['label']]]] = counts.get(classes[order[thing['label']]], 0) + 1
    words = ', '.join(f'{count} {name}' for name, count in counts.items()) or 'nothing'
    return Shown(picture, words if picture else 'missing')


def _object(thing: Mapping[str, Any], order: Sequence[Any], size: tuple[int, ...]) -> dict[str, Any]:
    """A COCO object as :func:`replk_mm.visualize.draw_instances` takes it."""
    found: dict[str, Any] = dict(label=order.index(thing['category_id']))
    if 'score' in thing:
        found['score'] = float(thing['score'])
    mask = _mask(thing.get('segmentation'), size)
    if mask is not None:
        found['mask'] = mask
    if thing.get('bbox'):
        x, y, width, height = thing['bbox']
        corners = np.array([[x, y], [x + width, y + height]])
        # What lies far outside of the image is not seen, and OpenCV does not take every number.
        return {**found, 'box': corners.clip(-_EDGE, np.array(size[::-1]) + _EDGE).ravel().tolist()}
    rows, columns = np.nonzero(mask) if mask is not None and mask.any() else ([0], [0])
    return {**found, 'box': [min(columns), min(rows), max(columns), max(rows)]}


def _mask(segmentation: Any, size: tuple[int, ...]) -> np.ndarray | None:
    """A COCO segmentation, polygons or run lengths, as ``(H, W)`` bool; None if there is none that can be decoded and is of
    the image's size."""
    if not segmentation or mask_problem(segmentation, *size):
        return None
    from pycocotools import mask
    if isinstance(segmentation, list):
        runs = mask.merge(mask.frPyObjects(segmentation, *size))
    else:
        runs = segmentation if isinstance(segmentation['counts'], str) else mask.frPyObjects(segmentation, *size)
    found = mask.decode(runs).astype(bool)
    return found if found.shape == size else None
