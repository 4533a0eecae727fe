"""What can be wrong with a COCO-style annotation file and its images, found before a run.

All annotations are looked at, which takes about three seconds for 860,000 of them, as many as COCO trains with; of the images
only a sample is opened.
"""
from collections import Counter
from collections.abc import Iterable
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

from PIL import Image

from replk_mm.data import coco_shapes
from replk_mm.data.coco import SHOWN, Problems, how_to_add, mend, read, refuse, some
from replk_mm.data.files import UNDECODABLE, damage, sample

_ORIENTATION = 0x0112  # EXIF; 5 to 8 swap width and height, which image readers follow


@dataclass(frozen=True)
class Use:
    """What a run does with an annotation file.

    Attributes:
        train: Train with its annotations.
        masks: Load masks, or score them.
        scored: Compare detections with it.
        own_file: The metric names the file, so that pycocotools reads it. Otherwise it gets a copy from mmdet, which numbers
            the annotations anew.
        classes: Names of the classes that count; None for all.
        keep_empty: Train with images that have no object too.
        min_size: Images with a shorter side are left out of training, pixels.
    """

    train: bool
    masks: bool = False
    scored: bool = True
    own_file: bool = True
    classes: tuple[str, ...] | None = None
    keep_empty: bool = True
    min_size: int = 0


def check(path: Path, images_dir: Path, use: Use) -> str:
    """Check the content of an annotation file, and a sample of its images.

    Returns:
        A line that says what was looked at.

    Raises:
        UserError: With all kinds of problem found, each counted and with its first examples.
    """
    data = read(path)
    images, objects = data['images'], data.get('annotations', [])
    problems: Problems = []
    if (use.train or use.scored) and 'annotations' not in data:
        problems.append(("there is no 'annotations'",
                         f'{"Training" if use.train else "Scoring"} needs annotations; name a file that has them (ann_file).'))
    for section in ('images', 'annotations', 'categories'):
        problems += _repeated(section, [e['id'] for e in data.get(section, ())])
    problems += _repeated('categories', [c['name'] for c in data['categories']], 'name')
    for key, section in (('image_id', 'images'), ('category_id', 'categories')):
        known = {e['id'] for e in data[section]}
        lost = [a for a in objects if a[key] not in known]
        if lost:
            missing = list(dict.fromkeys(a[key] for a in lost))
            problems.append((f'{len(lost):,} of {len(objects):,} annotations have a {key} that {section} do not have: '
                             f'{some(missing)} (annotations {some(a["id"] for a in lost)})',
                             f'Add the {section}, or remove these annotations.'))
    if not images:
        problems.append(("'images' is empty", 'Name a file with images (ann_file).'))
    problems += _lacking_keys(path, objects, use)
    found, notes = coco_shapes.boxes(images, objects, use.train)
    problems += found
    if use.masks:
        found, more = coco_shapes.masks(images, [a for a in objects if a.get('segmentation')], use.scored)
        problems, notes = problems + found, notes + more
    problems += _on_disk(images, images_dir)
    if not problems and use.train and not use.keep_empty:
        found, left = _without_objects(data, use)
        problems, notes = problems + found, [*notes, *left]
    refuse(path, problems)
    kinds = len(data['categories'])
    return '; '.join([f'data {path}: {len(images):,} images, {len(objects):,} objects of {kinds} categories, '
                      f'{len(sample(images))} images opened', *notes])


def _repeated(section: str, values: list, key: str = 'id') -> Problems:
    if len(set(values)) == len(values):
        return []
    twice = [value for value, count in Counter(values).items() if count > 1]
    return [(f'{len(twice):,} of the {section} have a {key} that others have too: {some(twice)}',
             f'Give each of the {section} a {key} of its own.')]


def _lacking_keys(path: Path, objects: list[dict], use: Use) -> Problems:
    """What only some uses need: masks, and what pycocotools reads when it compares."""
    problems: Problems = []
    if use.masks:
        lacking = [a['id'] for a in objects if not a.get('segmentation')]
        if lacking:
            problems.append((f"{len(lacking):,} of {len(objects):,} annotations have no 'segmentation', and the config "
                             f'{"trains" if use.train else "scores"} masks: ids {some(lacking)}',
                             'Use a config without masks for boxes only (FCOS, Faster R-CNN), or add the masks.'))
    if use.scored and use.own_file:
        unmatched = [a['id'] for a in objects if type(a['id']) is not int or a['id'] == 0]
        if unmatched:
            problems.append((f"{len(unmatched):,} of {len(objects):,} annotations have an 'id' that pycocotools cannot score: "
                             f'{some(map(repr, unmatched))} (0 is its sign for an object not found)', mend(
                                 path, "[a.update(id=i) for i, a in enumerate(d['annotations'], 1)]", 'Number them from 1')))
        lacking = [a['id'] for a in objects if 'iscrowd' not in a]
        if lacking:
            problems.append((f"{len(lacking):,} of {len(objects):,} annotations have no 'iscrowd', which pycocotools needs to "
                             f'score: ids {some(lacking)}', how_to_add(path, 'annotations', 'iscrowd')))
        if 'info' not in read(path) and info_needed():
            problems.append(("there is no 'info', which this pycocotools needs to score", mend(
                path, "d['info'] = {}", 'Add an empty one')))
    return problems


def info_needed() -> bool:
    """Whether the installed pycocotools fails on files without 'info' when it reads detections; some releases do."""
    from pycocotools.coco import COCO
    with redirect_stdout(StringIO()):
        probe = COCO()
        probe.dataset = dict(images=[dict(id=1)], categories=[dict(id=1, name='')], annotations=[])
        probe.createIndex()
        try:
            probe.loadRes([dict(image_id=1, category_id=1, bbox=[0, 0, 1, 1], score=1.0)])
        except KeyError:
            return True
    return False


def _on_disk(images: list[dict], folder: Path) -> Problems:
    names = [image['file_name'] for image in images]
    present = {parent: set(_files(folder / parent)) for parent in {name.rpartition('/')[0] for name in names}}
    absent = [name for name in names if name.rpartition('/')[2] not in present[name.rpartition('/')[0]]]
    problems: Problems = []
    if absent:
        problems.append((f'{len(absent):,} of {len(names):,} images are not in {folder}: {some(absent)}',
                         'Add the images, name their folder (data_prefix.img of the data set), or remove them from the file.'))
    gone = set(absent)
    here = [image for image in images if image['file_name'] not in gone]
    wrong = [text for image in sample(here) if (text := _image_problem(folder / image['file_name'], image))]
    if wrong:
        problems.append(('; '.join(wrong[:SHOWN]) + (f' and {len(wrong) - SHOWN} more' if len(wrong) > SHOWN else ''),
                         'Replace these images, or mend their width and height in the file.'))
    return problems


def _files(folder: Path) -> Iterable[str]:
    return (p.name for p in folder.iterdir()) if folder.is_dir() else ()


def _image_problem(path: Path, image: dict) -> str | None:
    problem = damage(path)
    if problem:
        return f'{path}: {problem}'
    try:
        with Image.open(path) as opened:
            size = opened.size[::-1] if opened.getexif().get(_ORIENTATION, 1) > 4 else opened.size
    except UNDECODABLE as error:
        return f'{path}: cannot be decoded ({error})'
    stated = image['width'], image['height']
    return None if size == stated else f'{path}: {size[0]}x{size[1]} pixels, and {stated[0]}x{stated[1]} in the file'


def _without_objects(data: dict, use: Use) -> tuple[Problems, list[str]]:
    ids = {c['id'] for c in data['categories'] if use.classes is None or c['name'] in use.classes}
    having = {a['image_id'] for a in data['annotations'] if a['category_id'] in ids}
    usable = [i for i in data['images'] if i['id'] in having and min(i['width'], i['height']) >= use.min_size]
    if not usable:
        return [(f'none of the {len(data["images"]):,} images has an object of a class'
                 + (f' and a side of {use.min_size} pixels' if use.min_size else ''),
                 'Check the classes (--classes) and filter_cfg of the data set.')], []
    left = len(data['images']) - len(usable)
    return [], [f'{left:,} images without objects are left out of training'] if left else []
