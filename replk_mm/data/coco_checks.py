"""What can be wrong with a COCO-style annotation file and its images, found before a run.

All annotations are looked at, which takes about three seconds for 860,000 of them, as many as COCO trains with; of the images
only a sample is opened.
"""
import os
from collections import Counter
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from io import StringIO
from pathlib import Path

from replk_mm.data import coco_masks, coco_shapes, pairs
from replk_mm.data.coco import category_counts, content, how_to_add, mend
from replk_mm.data.files import Listing, listing, sample
from replk_mm.data.pairs import Rules, Task
from replk_mm.data.problems import Item, Problem, errors, refuse, some, warnings
from replk_mm.data.survey import Survey, Tally

#: pycocotools keeps ids as floating-point numbers.
_LARGEST_ID = 2**53


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
        BadData: With all kinds of problem found, each counted and with its first examples.
    """
    found = survey(path, images_dir, use)
    seen = Tally().add_all(pairs.inspect(task, found.rules) for task in sample(found.tasks))
    refuse([*found.problems, *seen.problems], path)
    notes = [p.text for p in found.problems]
    return '; '.join([f'{found.line}, {seen.looked} images opened', *notes, *warnings(seen.problems)])


def survey(path: Path, images_dir: Path, use: Use, full: bool = False) -> Survey:
    """All that an annotation file says, and whether its images are there.

    Args:
        path: The file.
        images_dir: Folder of the images.
        use: What a run does with the file.
        full: Look at masks that are only trained with too. Defaults to False.

    Raises:
        BadData: If it is no annotation file.
    """
    known = content(path)
    data, problems = known.data, list(known.problems)
    images, objects = data['images'], data.get('annotations', [])
    if (use.train or use.scored) and 'annotations' not in data:
        problems.append(Problem('coco-no-annotations', '', "there is no 'annotations'", remedy=(
            f'{"Training" if use.train else "Scoring"} needs annotations; name a file that has them (ann_file).')))
    for section in ('images', 'annotations', 'categories'):
        problems += _repeated('id-repeated', section, 'id', [e['id'] for e in data.get(section, ())])
    problems += _repeated('name-repeated', 'categories', 'name', [c['name'] for c in data['categories']])
    problems += _repeated('file-repeated', 'images', 'file_name', [image['file_name'] for image in images])
    for kind, key, section in (('image-unknown', 'image_id', 'images'), ('category-unknown', 'category_id', 'categories')):
        ids = known.ids.get(section)
        lost = [a for a in objects if a[key] not in ids] if ids is not None else []  # without the section, none is there
        if lost:
            missing = list(dict.fromkeys(a[key] for a in lost))
            problems.append(Problem(
                kind, '', f'{len(lost):,} of {len(objects):,} annotations have a {key} that {section} do not have: '
                f'{some(missing)} (annotations {some(a["id"] for a in lost)})', remedy=f'Add the {section}, or remove these '
                'annotations.', items=tuple(Item(f'{key} {a[key]}', f'annotation {a["id"]}') for a in lost)))
    if not images and not known.problems:
        problems.append(Problem('coco-no-images', '', "'images' is empty"))
    problems += _lacking_keys(path, data, use)
    sized, more = coco_shapes.sizes(images)
    problems += more + coco_shapes.boxes(sized, objects, use.train)
    if use.masks:
        shaped = [a for a in objects if a.get('segmentation')]
        problems += coco_shapes.masks(sized, shaped, use.scored)
        problems += coco_masks.undecodable(shaped) if full or use.scored else []  # training looks at each when it loads it
    more, here = _on_disk(images, images_dir)
    problems += more
    if use.train and not errors(problems):
        problems += _left_out(data, use)
    kinds = {c['id']: c['name'] for c in data['categories']}
    return Survey(
        root=str(images_dir), problems=[p if p.path else replace(p, path=str(path)) for p in problems],
        tasks=[Task(str(images_dir / image['file_name']), stated=sized.get(image['id'])) for image in here],
        rules=Rules(), classes=kinds, objects=category_counts(data), where=str(path),
        line=f'data {path}: {len(images):,} images, {len(objects):,} objects of {len(data["categories"])} categories')


def _repeated(kind: str, section: str, key: str, values: list) -> list[Problem]:
    if len(set(values)) == len(values):
        return []
    counts = Counter(values)
    twice = [value for value, count in counts.items() if count > 1]
    return [Problem(kind, '', f'{len(twice):,} of the {section} have a {key} that others have too: {some(twice)}',
                    remedy='' if kind == 'file-repeated' else f'Give each of the {section} a {key} of its own.',
                    items=tuple(Item(f'{key} {value} occurs {counts[value]} times', section) for value in twice))]


def _lacking_keys(path: Path, data: dict, use: Use) -> list[Problem]:
    """What only some uses need: masks, and what pycocotools reads when it compares. Needless, it is a note."""
    problems: list[Problem] = []
    objects = data.get('annotations', [])
    by_file = use.scored and use.own_file

    def lacking(kind: str, key: str, those: Sequence[dict], needed: bool, why: str, remedy: str) -> None:
        if those:
            problems.append(Problem(
                kind, '', f'{len(those):,} of {len(objects):,} annotations have no {key!r}'
                + (f'{why}: ids {some(a["id"] for a in those)}' if needed else ''), remedy=remedy if needed else '',
                severity='error' if needed else 'note',
                items=tuple(Item(f'no {key!r}', f'annotation {a["id"]}') for a in those)))

    lacking('segmentation-missing', 'segmentation', [a for a in objects if not a.get('segmentation')], use.masks,
            f', and the config {"trains" if use.train else "scores"} masks',
            'Use a config without masks for boxes only (FCOS, Faster R-CNN), or add the masks.')
    unmatched = [a['id'] for a in objects
                 if type(a['id']) is not int or not 0 < abs(a['id']) <= _LARGEST_ID] if by_file else []
    if unmatched:
        problems.append(Problem(
            'id-unscorable', '', f"{len(unmatched):,} of {len(objects):,} annotations have an 'id' that pycocotools cannot "
            f'score: {some(f"{i!r:.40}" for i in unmatched)} (0 is its sign for an object not found, and ids beyond '
            f'{_LARGEST_ID} it mistakes for others)', remedy=mend(
                path, "[a.update(id=i) for i, a in enumerate(d['annotations'], 1)]", 'Number them from 1'),
            items=tuple(Item(f'id {i!r:.40}', f'annotation {i!r:.40}') for i in unmatched)))
    lacking('iscrowd-missing', 'iscrowd', [a for a in objects if 'iscrowd' not in a], by_file,
            ', which pycocotools needs to score', how_to_add(path, 'annotations', 'iscrowd'))
    if 'info' not in data:
        needed = by_file and info_needed()
        problems.append(Problem('info-missing', '', "there is no 'info'" + (
            ', which this pycocotools needs to score' if needed else ''), severity='error' if needed else 'note',
            remedy=mend(path, "d['info'] = {}", 'Add an empty one') if needed else ''))
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


def _on_disk(images: list[dict], folder: Path) -> tuple[list[Problem], list[dict]]:
    """What is wrong with the files of the images, not opened; and the entries of those that are there."""
    parents = {os.path.split(image['file_name'])[0] for image in images}
    present = {parent: _listed(folder / parent) for parent in parents}
    absent: list[dict] = []
    dead: list[dict] = []
    here: list[dict] = []
    for image in images:
        parent, name = os.path.split(image['file_name'])
        (here if name in present[parent].files else dead if name in present[parent].dead else absent).append(image)
    problems: list[Problem] = []
    for kind, those, what, found in (('image-missing', absent, 'are not in', 'no such file'),
                                     ('broken-link', dead, 'are links that lead nowhere in', 'a link that leads nowhere')):
        if those:
            problems.append(Problem(
                kind, '', f'{len(those):,} of {len(images):,} images {what} {folder}: {some(i["file_name"] for i in those)}',
                remedy='' if kind == 'broken-link' else 'Add the images, name their folder (data_prefix.img of the data set), '
                       'or remove them from the file.',
                items=tuple(Item(found, f'image {i["id"]}', str(folder / i['file_name'])) for i in those)))
    return problems, here


def _listed(folder: Path) -> Listing:
    try:
        return listing(folder, recursive=False, hidden=True)
    except (OSError, ValueError):  # no such folder, or a name that none can have
        return Listing()


def _left_out(data: dict, use: Use) -> list[Problem]:
    """The images that mmdet does not train with: those without an object of a class, and small ones."""
    ids = {c['id'] for c in data['categories'] if use.classes is None or c['name'] in use.classes}
    having = {a['image_id'] for a in data['annotations'] if a['category_id'] in ids}
    empty = [i for i in data['images'] if i['id'] not in having] if not use.keep_empty else []
    without = {i['id'] for i in empty}
    small = [i for i in data['images'] if min(i['width'], i['height']) < use.min_size and i['id'] not in without]
    if len(empty) + len(small) == len(data['images']):
        wanted = [] if use.keep_empty else ['an object of a class']
        wanted += [f'sides of at least {use.min_size} pixels'] if use.min_size else []
        return [Problem('nothing-to-train', '', f'none of the {len(data["images"]):,} images has {" and ".join(wanted)}')]
    return [Problem('left-out', '', f'{len(those):,} images {what} are left out of training',
                    items=tuple(Item(found(i), f'image {i["id"]}') for i in those))
            for those, what, found in (
                (empty, 'without objects', lambda i: 'without objects'),
                (small, f'with a side of less than {use.min_size} pixels', lambda i: f'{i["width"]}x{i["height"]} pixels'))
            if those]
