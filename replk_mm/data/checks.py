"""What can be wrong with a data set, found before training: folders, pairs, and a sample of the files."""
import shlex
from collections.abc import Sequence
from pathlib import Path

from mmengine.config import Config

from replk_mm.data import coco, coco_checks, duplicates, metric_files, pairs, releases
from replk_mm.data.classes import annotation_file, classes_of
from replk_mm.data.datasets import as_list, coco_style, datasets_of
from replk_mm.data.files import sample
from replk_mm.data.pair_survey import shown, survey_pairs
from replk_mm.data.problems import BadData, Problem, refuse, warnings
from replk_mm.data.survey import Survey, Tally, doubts_about_zero


def check_data(cfg: Config, splits: tuple[str, ...], num_classes: int | None) -> list[str]:
    """:func:`check_dataset` for the leaf datasets of the named splits, each once, and the files that metrics compare with.

    Returns:
        What was looked at and what is suspicious, a line each.

    Raises:
        UserError: See :func:`check_dataset` and :func:`metric_files.check`.
    """
    scope = cfg.get('default_scope', 'mmengine')
    lines: list[str] = []
    seen: set[str] = set()
    images: dict[str, list[str]] = {}
    for split in splits:
        metrics = metrics_of(cfg, split)
        for dataset in datasets_of(cfg, (split,)):
            key = key_of(dataset, scope, metrics)
            if key not in seen:
                seen.add(key)
                lines += check_dataset(dataset, scope, num_classes, metrics).splitlines()
                images.setdefault(split, []).extend(image_files(dataset, scope))
        metric_files.check(cfg, split)
    return list(dict.fromkeys([*lines, *warnings(duplicates.same_names(images))]))


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
    if _is_coco(dataset, scope):
        refuse(_missing_folders(dataset))
        return coco_checks.check(_annotations(dataset), _folder(dataset), use_of(dataset, scope, metrics))
    found = survey(dataset, scope, num_classes, metrics)
    seen = Tally().add_all(pairs.inspect(task, found.rules) for task in sample(found.tasks))
    problems = [*found.problems, *seen.problems, *doubts_about_zero(found, seen)]
    refuse(problems)
    return '\n'.join([found.line + (f', {seen.looked} of them looked into' if found.tasks else ''), *warnings(problems)])


def metrics_of(cfg: Config, split: str) -> list | None:
    """Configs of what is measured on a split, None for the one that is trained with."""
    return None if split == 'train' else as_list(cfg.get(f'{split}_evaluator'))


def key_of(dataset: dict, scope: str, metrics: Sequence[dict] | None) -> str:
    """The same for data sets of the same files and use: one may be trained with and scored, which asks more of it."""
    use = use_of(dataset, scope, metrics) if annotation_file(dataset) else None
    return str(({k: v for k, v in dataset.items() if k in ('data_root', 'data_prefix', 'ann_file')}, use))


def survey(dataset: dict, scope: str, num_classes: int | None, metrics: Sequence[dict] | None = None,
           full: bool = False) -> Survey:
    """All that can be known of a data set without opening its images.

    Args:
        dataset: See :func:`check_dataset`, as the following.
        scope: Default scope.
        num_classes: Classes of the model.
        metrics: Configs of what is measured on it.
        full: Decode the masks of an annotation file too. Defaults to False.
    """
    root = str(Path(dataset.get('data_root') or '.'))
    problems = _missing_folders(dataset)
    if problems:
        return Survey(root, problems)
    if _is_coco(dataset, scope):
        try:
            return coco_checks.survey(_annotations(dataset), _folder(dataset), use_of(dataset, scope, metrics), full)
        except BadData as error:
            return Survey(root, error.problems, where=str(_annotations(dataset)))
    prefix = dataset.get('data_prefix') or {}
    if 'seg_map_path' in prefix:
        return survey_pairs(dataset, scope, num_classes)
    line = ('annotation file and image folder are there' if _image_key(prefix) in prefix else
            'folders not checked, the data set names none')
    return Survey(root, line=f'data {root}: {line}')


def _image_key(prefix: dict) -> str:
    return 'img_path' if 'img_path' in prefix else 'img'


def _folder(dataset: dict) -> Path:
    prefix = dataset.get('data_prefix') or {}
    return Path(dataset.get('data_root') or '.') / prefix[_image_key(prefix)]


def _annotations(dataset: dict) -> Path:
    return Path(dataset.get('data_root') or '.') / str(dataset.get('ann_file'))


def _is_coco(dataset: dict, scope: str) -> bool:
    prefix = dataset.get('data_prefix') or {}
    return bool(dataset.get('ann_file')) and _image_key(prefix) in prefix and coco_style(dataset, scope)


def _missing_folders(dataset: dict) -> list[Problem]:
    root, prefix = Path(dataset.get('data_root') or '.'), dataset.get('data_prefix') or {}
    if not root.is_dir():
        return [Problem('data-root-missing', str(root), 'no such folder (the data root)',
                        remedy=f'Name yours with --data-root DIR. {_expected(dataset)}')]
    problems = releases.wrong_ade(root, prefix)
    if dataset.get('ann_file') and not _annotations(dataset).is_file():
        problems.append(Problem('annotation-file-missing', str(_annotations(dataset)),
                                f'no such annotation file (data root {root})', remedy=_expected(dataset)))
    place = prefix.get(_image_key(prefix))
    if place is not None and not (root / place).is_dir():
        depth = len(Path(place).parts)
        found = [*(p.parents[depth - 1] for p in sorted(root.glob(f'*/{place}'))),
                 *(p for p in root.resolve().parents[:2] if (p / place).is_dir())] if depth else []
        hint = f'Did you mean --data-root {shlex.quote(str(found[0]))}?' if found else _expected(dataset)
        problems.append(Problem('folder-missing', str(root / place), f'no such folder (data root {root} holds: {shown(root)})',
                                remedy=hint))
    return problems


def use_of(dataset: dict, scope: str, metrics: Sequence[dict] | None) -> coco_checks.Use:
    """What a run does with the annotation file of a data set; see :func:`check_dataset` for the arguments."""
    filters = dataset.get('filter_cfg') or {}
    scored = [m for m in metrics or () if str(m.get('type')).endswith('CocoMetric') and not m.get('format_only')]
    masks = any('segm' in as_list(m.get('metric', 'bbox')) for m in scored) or any(
        step.get('load', step).get('with_mask') for step in dataset.get('pipeline', ()) if isinstance(step, dict))
    return coco_checks.Use(
        train=metrics is None, masks=masks, scored=bool(scored), own_file=any(m.get('ann_file') for m in scored),
        classes=classes_of(dataset, scope) if (dataset.get('metainfo') or {}).get('classes') else None,
        keep_empty=not filters.get('filter_empty_gt', False), min_size=filters.get('min_size', 0))


def image_files(dataset: dict, scope: str) -> list[str]:
    """Paths of the images of a data set whose folders are there."""
    if _is_coco(dataset, scope):
        return [f'{_folder(dataset)}/{image["file_name"]}' for image in coco.read(_annotations(dataset))['images']]
    prefix = dataset.get('data_prefix') or {}
    return [task.image for task in survey_pairs(dataset, scope, None).tasks] if 'seg_map_path' in prefix else []


def _expected(dataset: dict) -> str:
    prefix = dataset.get('data_prefix') or {}
    parts = [*prefix.values(), *([dataset['ann_file']] if dataset.get('ann_file') else [])]
    return f'It must hold: {", ".join(str(p) for p in parts)}' if parts else ''
