"""Check that data sets, annotation files, heads and checkpoints have the same classes."""

import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress

from mmengine.config import Config

from replk_mm.data import coco
from replk_mm.data.class_heads import classes_per_head
from replk_mm.data.classes import annotation_file, classes_of
from replk_mm.data.datasets import dataset_class, is_coco_style, named_datasets
from replk_mm.data.findings import Problem, reject_errors
from replk_mm.errors import UserError, did_you_mean, format_list

#: With more names than these, a file is easier than the command line.
_ON_A_LINE = 20


def class_problems(cfg: Config, splits: tuple[str, ...]) -> list[Problem]:
    """Heads whose number of classes is not that of the data, and categories of annotation files that are no classes.

    Args:
        cfg: The config. Annotation files that cannot be read are skipped: other checks report them.
        splits: Whose data sets.
    """
    scope = cfg.get('default_scope', 'mmengine')
    problems = _heads(cfg, classes_per_head(cfg.model), splits) if 'model' in cfg else []
    counts: dict[str, dict[str, int]] = {}
    for place, dataset in named_datasets(cfg, splits):
        if (file := annotation_file(dataset)) and is_coco_style(dataset, scope):
            with suppress(UserError):
                counts[place] = coco.category_counts(coco.read_annotations(file))
    names = list(dict.fromkeys(name for found in counts.values() for name in found))
    for place, dataset in named_datasets(cfg, splits):
        if place in counts:
            problems += _categories(place, dataset, scope, counts, names)
            problems += _order(place, dataset, scope, counts[place])
    return list(dict.fromkeys(problems))


def check_heads(cfg: Config, counts: Mapping[str, int], splits: tuple[str, ...] = ()) -> None:
    """Reject heads that disagree on the number of classes, with each other or with the data sets.

    Args:
        cfg: The config.
        counts: Number of classes of every head by its path.
        splits: Whose data sets must have as many classes. Defaults to none.

    Raises:
        UserError: With the heads, and how to set them.
    """
    reject_errors(_heads(cfg, counts, splits))


def _heads(cfg: Config, counts: Mapping[str, int], splits: Sequence[str]) -> list[Problem]:
    if len(set(counts.values())) > 1:
        found = ', '.join(f'{path}.num_classes={count}' for path, count in counts.items())
        return [Problem('classes-mismatch', str(cfg.filename), f'the heads have different numbers of classes: {found}')]
    scope = cfg.get('default_scope', 'mmengine')
    problems = []
    for place, dataset in named_datasets(cfg, tuple(splits)):
        names = classes_of(dataset, scope)
        # Panoptic data sets, for one, have classes that are not for these heads.
        if not names or not (is_coco_style(dataset, scope) or hasattr(dataset_class(dataset, scope), 'get_label_map')):
            continue
        wrong = {path: count for path, count in counts.items() if count != len(names)}
        if wrong:
            settings = ' '.join(f'{path}.num_classes={len(names)}' for path in wrong)
            problems.append(
                Problem(
                    'classes-mismatch',
                    str(cfg.filename),
                    f'{place} has {len(names)} classes ({format_list(names)}), but '
                    + ', '.join(f'{path}.num_classes={count}' for path, count in wrong.items()),
                    remedy=f'Name the classes (--classes NAME,NAME,...), or set the heads: --cfg-options {settings}',
                )
            )
    return problems


def _categories(
    place: str, dataset: dict, scope: str, counts: Mapping[str, dict[str, int]], all_names: Sequence[str]
) -> list[Problem]:
    """Categories with objects that are no classes, and would be ignored."""
    found, names = counts[place], classes_of(dataset, scope)
    strange = {name: count for name, count in found.items() if count and names and name not in names}
    if not names or not strange:
        return []
    # Leaving out categories is fine if the config names the others, and if all annotation files have the same.
    picked = (dataset.get('metainfo') or {}).get('classes') and set(names) <= set(found)
    text = (
        f'{len(strange)} of its {len(found)} categories are none of the {len(names)} classes of {place} '
        f'({format_list(names)}): '
    )
    hints = {name: f'; {hint.strip()}' for name in strange if (hint := did_you_mean(name, names))}
    text += format_list(
        [f'{name} ({count:,} object{"s" * (count != 1)}{hints.get(name, "")})' for name, count in strange.items()]
    )
    if picked and not any(name not in other for name in strange for other in counts.values()):
        return [
            Problem(
                'classes-mismatch',
                str(annotation_file(dataset)),
                text,
                severity='note',
                remedy=('Objects of other categories are ignored.'),
            )
        ]
    text += f'; {sum(strange.values()):,} of {sum(found.values()):,} objects would be ignored'
    return [
        Problem(
            'classes-mismatch',
            str(annotation_file(dataset)),
            text,
            remedy=(f'Use the categories of the annotation files as classes: {_option(all_names)}'),
        )
    ]


def _order(place: str, dataset: dict, scope: str, found: Mapping[str, int]) -> list[Problem]:
    """Labels that mmdet's data set numbers otherwise than the classes of the config: in the order of the file."""
    names = classes_of(dataset, scope) or ()
    shared = [name for name in found if name in names]
    by_name = dataset_class(dataset, scope).COCOAPI.__module__.startswith('replk_mm.')  # type: ignore[attr-defined]
    if by_name or shared == list(names[: len(shared)]):
        return []
    return [
        Problem(
            'classes-order',
            str(annotation_file(dataset)),
            (
                f'{place}: mmdet numbers the {len(shared)} classes of this file as {format_list(shared)}, and '
                f'the config names '
                f'{format_list(names)}; replk_mm.CocoDataset matches them by name'
            ),
        )
    ]


def _option(names: Sequence[str]) -> str:
    """The option that sets these classes."""
    if len(names) > _ON_A_LINE or any(',' in name or name != name.strip() for name in names):
        return f'--classes FILE, with these {len(names)} names, one a line: {format_list(names)}'
    return f'--classes {shlex.quote(",".join(names))}'


def checkpoint_classes(meta: Mapping) -> list[str]:
    """The classes that a checkpoint's record names; none if it names none."""
    found = meta.get('dataset_meta')
    lower = {str(key).lower(): value for key, value in found.items()} if isinstance(found, Mapping) else {}
    names = lower.get('classes')
    return [str(name) for name in names] if isinstance(names, (list, tuple)) else []


def classes_advice(meta: Mapping) -> str:
    """A line on the classes of a checkpoint that does not fit the config; empty if its record does not name them."""
    names = checkpoint_classes(meta)
    return f'\nIt was trained on {len(names)} classes; use them: {_option(names)}' if names else ''


def compare_with_checkpoint(cfg: Config, meta: Mapping, checkpoint: str, splits: tuple[str, ...] = ('test',)) -> None:
    """Reject a checkpoint whose classes are not those of the data, or are in another order.

    Its weights may fit all the same, and every figure would be of the wrong class.

    Args:
        cfg: The config.
        meta: The checkpoint's record.
        checkpoint: Its name.
        splits: Data sets to compare with.

    Raises:
        UserError: With both lists, and a value for ``--classes``.
    """
    theirs = [name.strip() for name in checkpoint_classes(meta)]
    for place, dataset in named_datasets(cfg, splits):
        names = [name.strip() for name in classes_of(dataset, cfg.get('default_scope', 'mmengine')) or ()]
        if not theirs or not names or names == theirs:
            continue
        order = ' in another order' if Counter(names) == Counter(theirs) else ''
        raise UserError(
            f'{checkpoint}: was trained on {len(theirs)} classes: {format_list(theirs)}; {place} has '
            f'{len(names)}{order}: {format_list(names)}{classes_advice(meta)}'
        )
