"""What can be wrong with a data set, found before training: folders, pairs, and a sample of the files."""
import shlex
from collections.abc import Collection, Sequence
from pathlib import Path

from mmengine.config import Config

from replk_mm.data import coco, coco_checks, duplicates, metric_files, pairs, releases
from replk_mm.data.datasets import coco_style
from replk_mm.data.files import sample
from replk_mm.data.leaves import leaves, same_data, use_of
from replk_mm.data.pair_survey import shown, survey_pairs
from replk_mm.data.pairs import Task
from replk_mm.data.problems import BadData, Problem, refuse, warnings
from replk_mm.data.survey import Survey, Tally, doubts_about_zero
from replk_mm.errors import printable


def check_data(cfg: Config, splits: tuple[str, ...], num_classes: int | None) -> list[str]:
    """:func:`check_dataset` for the leaf datasets of the named splits, each once, and the files that metrics compare with.

    Returns:
        What was looked at and what is suspicious, a line each.

    Raises:
        UserError: See :func:`check_dataset` and :func:`metric_files.check`.
    """
    scope = cfg.get('default_scope', 'mmengine')
    found = leaves(cfg, splits)
    looked: dict[str, tuple[Survey, Tally]] = {}
    images: dict[str, list[str]] = {}
    notes: list[Problem] = []
    for split in splits:
        for leaf in found:
            if leaf.split != split or leaf.key in looked:
                continue
            one, _ = looked[leaf.key] = _looked_into(leaf.config, scope, num_classes, leaf.metrics, leaf.suffixes)
            notes += releases.count_differs(leaf.config, scope, split, len(one.tasks)) if one.tasks else []
            if not leaf.repeats:
                images.setdefault(split, []).extend(task.image for task in one.tasks)
        metric_files.check(cfg, split)
    lines = [line for said in _said(list(looked.values())) for line in said]
    lines += [printable(f'note: {note.path}: {note.text}') for note in notes]
    return list(dict.fromkeys([*lines, *warnings([*same_data(found), *duplicates.same_names(images)])]))


def check_dataset(dataset: dict, scope: str, num_classes: int | None, metrics: Sequence[dict] | None = None) -> str:
    """Check folders, image and label pairs or annotations, and the content of a sample.

    Args:
        dataset: Config of a leaf dataset, mmseg's layout (image and label folders) or one with an annotation file.
        scope: Default scope of the config, in which the dataset's type is looked up.
        num_classes: Classes of the model; None checks no label ids.
        metrics: Configs of what is measured on it; None if it is trained with. Defaults to None.

    Returns:
        A line that says what was checked, and one for each kind of warning.

    Raises:
        UserError: With the first problems found, the files they concern and what to do.
    """
    return '\n'.join(_said([_looked_into(dataset, scope, num_classes, metrics)])[0])


def _looked_into(dataset: dict, scope: str, num_classes: int | None, metrics: Sequence[dict] | None,
                 suffixes: Collection[str] = ()) -> tuple[Survey, Tally]:
    """What :func:`check_dataset` finds in a data set that it does not refuse; for the arguments see there and :func:`survey`.

    The survey's line says it all, but for what is suspicious.
    """
    if _is_coco(dataset, scope):
        refuse(_missing_folders(dataset))
        line = coco_checks.check(_annotations(dataset), _folder(dataset), use_of(dataset, scope, metrics))
        return Survey(str(_folder(dataset)), tasks=[Task(path) for path in _coco_images(dataset)], line=line), Tally()
    found = survey(dataset, scope, num_classes, metrics, suffixes=suffixes)
    seen = Tally().add_all(pairs.inspect(task, found.rules) for task in sample(found.tasks))
    refuse([*found.problems, *seen.problems])
    found.line += f', {seen.looked} of them looked into' if found.tasks else ''
    return found, seen


def _said(looked: Sequence[tuple[Survey, Tally]]) -> list[list[str]]:
    """Of each data set its line, and a line for each kind of warning."""
    return [[one.line, *warnings([*one.problems, *seen.problems, *doubts])]
            for (one, seen), doubts in zip(looked, doubts_about_zero(looked), strict=True)]


def survey(dataset: dict, scope: str, num_classes: int | None, metrics: Sequence[dict] | None = None,
           full: bool = False, suffixes: Collection[str] = ()) -> Survey:
    """All that can be known of a data set without opening its images.

    Args:
        dataset: See :func:`check_dataset`, as the following.
        scope: Default scope.
        num_classes: Classes of the model.
        metrics: Configs of what is measured on it.
        full: Decode the masks of an annotation file too. Defaults to False.
        suffixes: Of the images in its folder that this data set or others read. Defaults to its own.
    """
    root = str(Path(dataset.get('data_root') or '.'))
    problems = _missing_folders(dataset)
    coco_json = _is_coco(dataset, scope)
    if problems and not (coco_json and {problem.kind for problem in problems} == {'folder-missing'}):
        return Survey(root, problems)
    if coco_json:
        try:
            found = coco_checks.survey(_annotations(dataset), _folder(dataset), use_of(dataset, scope, metrics), full)
        except BadData as error:
            return Survey(root, [*problems, *error.problems], where=str(_annotations(dataset)))
        # Without their folder all images are missing, which one message says.
        found.problems = problems + [p for p in found.problems if not (problems and p.kind == 'image-missing')]
        return found
    prefix = dataset.get('data_prefix') or {}
    if prefix.get('seg_map_path') is not None:
        return survey_pairs(dataset, scope, num_classes, suffixes)
    line = ('annotation file and image folder are there' if _image_key(prefix) in prefix else
            'folders not checked, the data set names none')
    return Survey(root, line=f'data {root}: {line}')


def _image_key(prefix: dict) -> str:
    return 'img_path' if 'img_path' in prefix else 'img'


def _folder(dataset: dict) -> Path:
    prefix = dataset.get('data_prefix') or {}
    return Path(dataset.get('data_root') or '.') / (prefix[_image_key(prefix)] or '')


def _annotations(dataset: dict) -> Path:
    return Path(dataset.get('data_root') or '.') / str(dataset.get('ann_file'))


def _is_coco(dataset: dict, scope: str) -> bool:
    prefix = dataset.get('data_prefix') or {}
    return bool(dataset.get('ann_file')) and _image_key(prefix) in prefix and coco_style(dataset, scope)


def _missing_folders(dataset: dict) -> list[Problem]:
    try:
        return _not_there(dataset)
    except OSError as error:  # a folder on the way that may not be entered
        return [Problem('unreadable', str(error.filename), f'cannot be opened: {error.strerror}')]


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except PermissionError:  # a folder above may not be entered
        return False


def _not_there(dataset: dict) -> list[Problem]:
    root, prefix = Path(dataset.get('data_root') or '.'), dataset.get('data_prefix') or {}
    if not root.is_dir():
        return [Problem('data-root-missing', str(root), 'no such folder (the data root)',
                        remedy=f'Name yours with --data-root DIR. {_expected(dataset)}')]
    problems = releases.wrong_ade(root, prefix, str(dataset['type']))
    if dataset.get('ann_file') and not _annotations(dataset).is_file():
        problems.append(Problem('annotation-file-missing', str(_annotations(dataset)),
                                f'no such annotation file (data root {root})', remedy=_expected(dataset)))
    place = prefix.get(_image_key(prefix))
    if place is not None and not (root / place).is_dir():
        depth = len(Path(place).parts)
        found = [*(p.parents[depth - 1] for p in sorted(root.glob(f'*/{place}'))),
                 *(p for p in root.resolve().parents[:2] if _is_folder(p / place))] if depth else []
        hint = f'Did you mean --data-root {shlex.quote(str(found[0]))}?' if found else _expected(dataset)
        problems.append(Problem('folder-missing', str(root / place), f'no such folder (data root {root} holds: {shown(root)})',
                                remedy=hint))
    return problems


def _coco_images(dataset: dict) -> list[str]:
    """Paths of the images of an annotation file."""
    return [str(_folder(dataset) / image['file_name']) for image in coco.read(_annotations(dataset))['images']]


def _expected(dataset: dict) -> str:
    prefix = dataset.get('data_prefix') or {}
    parts = [*prefix.values(), *([dataset['ann_file']] if dataset.get('ann_file') else [])]
    return f'It must hold: {", ".join(str(p) for p in parts)}' if parts else ''
