"""A data set of images and label maps, before any of them is opened: which there are, and which belong together."""
from collections.abc import Collection
from pathlib import Path

from mmengine import list_from_file

from replk_mm.data import cityscapes
from replk_mm.data.classes import classes_of
from replk_mm.data.datasets import dataset_class, dataset_option
from replk_mm.data.files import Listing, listing
from replk_mm.data.pairs import Rules, Task
from replk_mm.data.problems import Item, Problem, some
from replk_mm.data.survey import Survey

_IMAGES = ('.jpg', '.jpeg', '.png', '.bmp', '.tif', '.tiff', '.webp', '.gif')


def survey_pairs(dataset: dict, scope: str, num_classes: int | None, suffixes: Collection[str] = ()) -> Survey:
    """What is known of such a data set, whose image folder is there.

    Args:
        dataset: Its config.
        scope: Default scope of the config.
        num_classes: Classes of the model; None checks no label ids.
        suffixes: Of the images in its folder that this data set or others read. Defaults to its own.

    Raises:
        UserError: If there is no such type of data sets.
    """
    root, prefix = Path(dataset.get('data_root') or '.'), dataset['data_prefix']
    images_dir, labels_dir = root / (prefix.get('img_path', prefix.get('img')) or ''), root / prefix['seg_map_path']
    builder = dataset_class(dataset, scope)
    reduce_zero = bool(dataset_option(dataset, builder, 'reduce_zero_label', False))
    image_suffix = dataset_option(dataset, builder, 'img_suffix', '.jpg')
    label_suffix = dataset_option(dataset, builder, 'seg_map_suffix', '.png')
    known, problems = _classes_of_files(dataset, builder, scope)
    problems += _reduction(dataset, reduce_zero)
    found = Survey(str(root), problems, where=str(labels_dir), line=f'data {images_dir}')
    if len(known) and num_classes is not None and list(known) != list(classes_of(dataset, scope) or ()):
        num_classes = len(known)  # the data set maps those that were picked
    found.classes = {i + reduce_zero: name for i, name in enumerate(known)}
    if label_suffix.endswith(cityscapes.RAW_SUFFIX) and num_classes == len(cityscapes.IDS):
        problems.append(Problem(
            'cityscapes-raw-labels', str(labels_dir), f'{dataset["type"]}.seg_map_suffix={label_suffix!r}: these are the raw '
            f'label ids, of 34 kinds; the model has {num_classes} classes', remedy=f'{cityscapes.how_to_convert(root)}\nand '
            f'use the suffix {label_suffix.replace(cityscapes.RAW_SUFFIX, cityscapes.TRAIN_SUFFIX)!r}.'))
        return found
    try:
        files = listing(images_dir)
        labels = listing(labels_dir) if labels_dir.is_dir() else None
        names, dead, more = _names(dataset, root, images_dir, image_suffix, files)
    except OSError as error:
        problems.append(Problem('unreadable', str(error.filename), f'cannot be listed: {error.strerror}'))
        return found
    problems += more
    read = tuple({image_suffix, *suffixes})
    if not dataset.get('ann_file'):
        problems += _other_images(images_dir, labels_dir, read, label_suffix, files, names)
    if not names:
        problems.append(Problem('no-images', str(images_dir),
                                f'no image ends with {image_suffix}; found: {shown(images_dir)}'))
        return found
    if labels is None:
        problems.append(Problem(
            'folder-missing', str(labels_dir), f'no such folder, so the {len(names)} images have no labels', remedy=(
                f'(data root {root} holds: {shown(root)})')))
        good: set[str] = set()
    else:
        good, more = _partners(root, images_dir, labels_dir, label_suffix, names, labels)
        problems += more
        if not dataset.get('ann_file'):
            lonely = sorted(labels.names(label_suffix) - dead - {name for suffix in read for name in files.names(suffix)})
            problems += [_several('label-without-image', labels_dir, f'{len(lonely)} label maps have no image: {some(lonely)}',
                                  [_file(labels_dir, name, label_suffix) for name in lonely], 'no image')] if lonely else []
    found.rules = Rules(num_classes, reduce_zero, pillow_labels=_reads_with_pillow(dataset))
    found.tasks = [Task(_file(images_dir, name, image_suffix),
                        _file(labels_dir, name, label_suffix) if name in good else None) for name in sorted(names)]
    found.line += f': {len(names)} images with labels'
    return found


def _file(folder: Path, name: str, suffix: str) -> str:
    """The path that mmseg makes of a name, which may be one with folders, of any place."""
    return str(folder / (name + suffix))


def _several(kind: str, folder: Path, text: str, paths: list[str], each: str, remedy: str = '') -> Problem:
    return Problem(kind, str(folder), text, remedy=remedy, items=tuple(Item(each, path=path) for path in paths))


def _names(dataset: dict, root: Path, images_dir: Path, suffix: str,
           files: Listing) -> tuple[set[str], set[str], list[Problem]]:
    """Names without suffix, of images and of links that lead nowhere, and what is wrong with them.

    mmseg takes them from an annotation file, if there is one, else from the folder.
    """
    there = files.names(suffix)
    dead = {name[:len(name) - len(suffix)] for name in files.dead if name.endswith(suffix)}
    problems = []
    if dataset.get('ann_file'):
        file = root / dataset['ann_file']
        try:
            listed = {line.strip() for line in list_from_file(file)}  # as mmseg does
        except (UnicodeDecodeError, OSError) as error:
            return set(), set(), [Problem('list-unreadable', str(file), f'cannot be read: {error}')]
        there, dead = _there(images_dir, listed, suffix, there)
        absent = sorted(listed - there - dead)
        if absent:
            problems.append(_several(
                'image-missing', file, f'{len(absent)} of {len(listed)} images are not in {images_dir} (NAME{suffix}): '
                f'{some(name or "an empty line" for name in absent)}', [_file(images_dir, name, suffix) for name in absent],
                f'named by {file.name}, not there', 'Add the images, or remove their lines.'))
    if dead:
        problems.append(_several('broken-link', images_dir, f'{len(dead)} images are links that lead nowhere, and left out '
                                 f'without a word: {some(sorted(dead))}',
                                 [_file(images_dir, name, suffix) for name in sorted(dead)], 'a link that leads nowhere'))
    strange = sorted(name for name in there if not name.isprintable() or name != name.strip())
    if strange:
        problems.append(_several('name-not-text', images_dir, f'{len(strange)} images have names that are no UTF-8, or have '
                                 f'control characters or spaces at an end: {some(map(ascii, strange))}',
                                 [_file(images_dir, name, suffix) for name in strange], 'an odd name'))
    return there, dead, problems


def _there(folder: Path, names: set[str], suffix: str, listed: set[str]) -> tuple[set[str], set[str]]:
    """Those of the names whose files are there, and those that are links that lead nowhere.

    What the folder's list does not have may be there: hidden, in another folder, or below a name that begins with './'.
    """
    others = {name: folder / (name + suffix) for name in names - listed}
    return (names & listed | {name for name, path in others.items() if path.is_file()},
            {name for name, path in others.items() if path.is_symlink() and not path.exists()})


def _other_images(images_dir: Path, labels_dir: Path, read: tuple[str, ...], label_suffix: str, files: Listing,
                  names: Collection[str]) -> list[Problem]:
    """Images that no data set sees, for they end otherwise than those that are read."""
    # Label maps may lie beside their images.
    beside = label_suffix if labels_dir == images_dir or labels_dir in images_dir.parents or images_dir in labels_dir.parents \
        else None
    others = sorted(name for name in files.files if name.lower().endswith(_IMAGES) and not name.endswith(read)
                    and not (beside and name.endswith(beside)))
    if not others or not names:
        return []
    ends = ' or '.join(sorted(read))
    return [_several('suffix-ignored', images_dir, f'{len(others)} images do not end with {ends}, and are left out: '
                     f'{some(others)}', [f'{images_dir}/{name}' for name in others], f'does not end with {ends}')]


def _partners(root: Path, images_dir: Path, labels_dir: Path, suffix: str, names: set[str],
              labels: Listing) -> tuple[set[str], list[Problem]]:
    """The images that have a label map, and what is wrong with the others."""
    there, dead = _there(labels_dir, names, suffix, labels.names(suffix))
    missing = names - there - dead
    problems = []
    if dead:
        problems.append(_several('broken-link', labels_dir, f'{len(dead)} label maps are links that lead nowhere: '
                                 f'{some(sorted(dead))}', [_file(labels_dir, name, suffix) for name in sorted(dead)],
                                 'a link that leads nowhere'))
    raw_suffix = suffix.replace(cityscapes.TRAIN_SUFFIX, cityscapes.RAW_SUFFIX)
    raw = labels.names(raw_suffix) & missing if raw_suffix != suffix else set()
    if raw:
        problems.append(_several(
            'cityscapes-raw-labels', labels_dir, f'{len(missing)} of {len(names)} images have no label map (NAME{suffix}), '
            f'but {len(raw)} of them raw ones (NAME{raw_suffix}): {some(sorted(missing))}',
            [_file(labels_dir, name, raw_suffix) for name in sorted(raw)], 'raw label ids', cityscapes.how_to_convert(root)))
        missing = missing - raw
    if missing:
        stems = {name.rpartition('.')[0]: name for name in labels.files}
        similar = {name: stems[name] for name in missing if name in stems}
        text = f'{len(missing)} of {len(names)} images have no label map (NAME{suffix}): {some(sorted(missing))}' + (
            f'; there is {some(sorted(similar.values()))}' if similar else '')
        problems.append(Problem(
            'label-missing', str(labels_dir), text, remedy=f'Add the label maps, or remove the images from {images_dir}.',
            items=tuple(Item('no such file' + (f'; there is {similar[name]}' if name in similar else ''),
                             path=_file(labels_dir, name, suffix)) for name in sorted(missing))))
    return names & there, problems


def _classes_of_files(dataset: dict, builder: type, scope: str) -> tuple[tuple[str, ...], list[Problem]]:
    """The classes that the ids in the files count: those of the type, if the data set picks some of them, else its own."""
    known = getattr(builder, 'METAINFO', {}).get('classes')
    given = (dataset.get('metainfo') or {}).get('classes')
    names = classes_of(dataset, scope) or ()
    if not known or not given:
        return names, []
    if isinstance(given, str):  # names in files are read without the space that one of ADE20K's ends with
        known = [name.strip() for name in known]
    if list(names) == list(known):
        return names, []
    strange = [name for name in names if name not in known]
    return tuple(known), [Problem(
        'class-names', str(dataset.get('data_root')), f'metainfo.classes of {dataset["type"]}: {some(strange)} of '
        f'{len(names)} are none of its classes')] if strange else []


def _reduction(dataset: dict, reduce_zero: bool) -> list[Problem]:
    problems = []
    for step in dataset.get('pipeline', ()):
        step = step.get('load', step)  # as the pipeline's own checks wrap it
        if step.get('reduce_zero_label') not in (None, reduce_zero):
            problems.append(Problem(
                'reduce-zero-pipeline', str(dataset.get('data_root')),
                f'reduce_zero_label={step["reduce_zero_label"]}'
                f' in the pipeline\'s {step["type"]}, and {reduce_zero} in {dataset["type"]}'))
    return problems


def _reads_with_pillow(dataset: dict) -> bool:
    steps = [step.get('load', step) for step in dataset.get('pipeline', ())]
    return all(step.get('imdecode_backend', 'pillow') == 'pillow' for step in steps
               if str(step.get('type')).endswith('LoadAnnotations'))


def shown(folder: Path) -> str:
    """The first things in a folder."""
    try:
        names = sorted(p.name for p in folder.iterdir())
    except PermissionError:
        return 'what you may not list'
    return ', '.join(names[:6]) + (' ...' if len(names) > 6 else '') if names else 'nothing'
