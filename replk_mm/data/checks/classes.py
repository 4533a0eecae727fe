"""Check that data sets, annotation files, heads and checkpoints have the same classes."""

import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress

from mmengine.config import Config

from replk_mm.data.class_heads import classes_per_head
from replk_mm.data.classes import annotation_file, classes_of
from replk_mm.data.coco import category_counts, read_annotations
from replk_mm.data.datasets import (
    as_list,
    dataset_class,
    has_own_index,
    is_classification,
    is_coco_style,
    named_datasets,
)
from replk_mm.data.findings import Finding, raise_for_errors
from replk_mm.errors import UserError, did_you_mean, format_list

#: With more names than these, a file is easier than the command line.
_MAX_NAMES = 20


def check_classes(cfg: Config, splits: tuple[str, ...]) -> list[Finding]:
    """Report heads with another number of classes than the data, and annotated categories that are no classes.

    Args:
        cfg: The config. Annotation files that cannot be read are skipped: other checks report them.
        splits: Data sets to check.
    """
    scope = cfg.get('default_scope', 'mmengine')
    findings = _check_heads(cfg, classes_per_head(cfg.model), splits) if 'model' in cfg else []
    counts: dict[str, dict[str, int]] = {}
    for key, dataset in named_datasets(cfg, splits):
        if (file := annotation_file(dataset)) and is_coco_style(dataset, scope):
            with suppress(UserError):
                counts[key] = category_counts(read_annotations(file))
    for key, dataset in named_datasets(cfg, splits):
        if key in counts:
            findings += _check_categories(key, dataset, scope, counts) or _check_surplus(key, dataset, scope, counts)
            findings += _check_order(key, dataset, scope, counts[key])
    return list(dict.fromkeys(findings))


def check_heads(cfg: Config, counts: Mapping[str, int], splits: tuple[str, ...] = ()) -> None:
    """Reject heads whose numbers of classes differ, from each other or from the data sets.

    Args:
        cfg: The config.
        counts: Number of classes of every head by its path.
        splits: Data sets that must have as many classes. Defaults to none.

    Raises:
        InvalidDataError: With the heads, and how to set them.
    """
    raise_for_errors(_check_heads(cfg, counts, splits))


def _check_heads(cfg: Config, counts: Mapping[str, int], splits: Sequence[str]) -> list[Finding]:
    if len(set(counts.values())) > 1:
        found = ', '.join(f'{path}.num_classes={count}' for path, count in counts.items())
        message = f'the heads have different numbers of classes: {found}'
        return [Finding('classes-mismatch', str(cfg.filename), message)]
    scope = cfg.get('default_scope', 'mmengine')
    findings = []
    for key, dataset in named_datasets(cfg, tuple(splits)):
        names, has_label_maps = classes_of(dataset, scope), hasattr(dataset_class(dataset, scope), 'get_label_map')
        known = has_label_maps or is_coco_style(dataset, scope) or is_classification(dataset, scope)
        # Panoptic data sets, for example, have classes that are not for these heads.
        if not names or not known:
            continue
        if has_label_maps and 1 in counts.values() and 'loss_cls' not in str(cfg.model):  # MaskFormer has "no object"
            message = (
                f'{next(iter(counts))}.num_classes=1: the background is a class too; of one class there is no loss'
            )
            findings.append(Finding('one-class', str(cfg.filename), message))
        heads = [h for key in ('decode_head', 'auxiliary_head') for h in as_list(cfg.model.get(key) or [])]
        if has_label_maps and len(names) == 2 and any(head.get('ignore_index') in (0, 1) for head in heads):
            message = 'a head ignores one of two classes (ignore_index), which leaves one to learn'
            findings.append(Finding('one-class', str(cfg.filename), message, fix='Set ignore_index=255 of all heads.'))
        if wrong := {path: count for path, count in counts.items() if count != len(names)}:
            found = ', '.join(f'{path}.num_classes={count}' for path, count in wrong.items())
            message = f'{key} has {len(names)} classes ({format_list(names)}), but {found}'
            settings = ' '.join(f'{path}.num_classes={len(names)}' for path in wrong)
            fix = f'Name the classes (--classes NAME,NAME,...), or set the heads: --cfg-options {settings}'
            findings.append(Finding('classes-mismatch', str(cfg.filename), message, fix=fix))
    return findings


def _check_categories(key: str, dataset: dict, scope: str, counts: Mapping[str, dict[str, int]]) -> list[Finding]:
    """Report categories with objects that are no classes: mmdetection ignores them."""
    found, names = counts[key], classes_of(dataset, scope)
    unknown = {name: count for name, count in found.items() if count and names and name not in names}
    if not names or not unknown:
        return []
    hints = {name: f'; {hint.strip()}' for name in unknown if (hint := did_you_mean(name, names))}
    objects = [f'{name} ({n:,} object{"s" * (n != 1)}{hints.get(name, "")})' for name, n in unknown.items()]
    message = f'{len(unknown)} of its {len(found)} categories are none of the {len(names)} classes of {key} '
    message += f'({format_list(names)}): {format_list(objects)}'
    # A config may select categories, if all annotation files have the same.
    is_subset = (dataset.get('metainfo') or {}).get('classes') and set(names) <= set(found)
    if is_subset and all(name in other for name in unknown for other in counts.values()):
        severity, fix = 'note', 'Training and scoring ignore objects of other categories.'
    else:
        message += f'; {sum(unknown.values()):,} of {sum(found.values()):,} objects would be ignored'
        all_names = list(dict.fromkeys(name for other in counts.values() for name in other))
        severity, fix = '', f'Use the categories of the annotation files as classes: {classes_option(all_names)}'
    return [Finding('classes-mismatch', str(annotation_file(dataset)), message, severity=severity, fix=fix)]


def _check_surplus(key: str, dataset: dict, scope: str, counts: Mapping[str, dict[str, int]]) -> list[Finding]:
    """Reject heads for classes that no training file has, unless the config names these classes itself."""
    names = classes_of(dataset, scope) or ()
    found = {name for other, of in counts.items() if other.startswith('train_') for name in of}
    if set(names) <= found or not key.startswith('train_') or (dataset.get('metainfo') or {}).get('classes'):
        return []
    message = f'has {len(found)} categories, but the heads have the {len(names)} classes of {dataset["type"]}'
    fix = f'Use its categories: --classes auto. To train {len(names)} classes, set metainfo.classes, or --classes FILE.'
    return [Finding('classes-mismatch', str(annotation_file(dataset)), message, fix=fix)]


def _check_order(key: str, dataset: dict, scope: str, found: Mapping[str, int]) -> list[Finding]:
    """Report classes that mmdetection numbers in the order of the file, not of the config."""
    names = classes_of(dataset, scope) or ()
    shared = [name for name in found if name in names]
    if has_own_index(dataset, scope) or shared == list(names[: len(shared)]):
        return []
    message = f'{key}: mmdet numbers the {len(shared)} classes of this file as {format_list(shared)}, and the config '
    message += f'names {format_list(names)}; replk_mm.CocoDataset matches them by name'
    return [Finding('classes-order', str(annotation_file(dataset)), message)]


def classes_option(names: Sequence[str]) -> str:
    """The command-line option that sets these classes."""
    if len(names) > _MAX_NAMES or any(',' in name or name != name.strip() for name in names):
        return f'--classes FILE, with these {len(names)} names, one per line: {format_list(names)}'
    return f'--classes {shlex.quote(",".join(names))}'


def checkpoint_classes(meta: Mapping) -> list[str]:
    """The classes in the metadata of a checkpoint; empty if it has none."""
    found = meta.get('dataset_meta')
    lower = {str(key).lower(): value for key, value in found.items()} if isinstance(found, Mapping) else {}
    names = lower.get('classes')
    return [str(name) for name in names] if isinstance(names, (list, tuple)) else []


def classes_advice(meta: Mapping) -> str:
    """A line with the option that sets the classes of a checkpoint; empty if its metadata has none."""
    names = checkpoint_classes(meta)
    return f'\nIt was trained on {len(names)} classes; use them: {classes_option(names)}' if names else ''


def compare_with_checkpoint(cfg: Config, meta: Mapping, checkpoint: str, splits: tuple[str, ...] = ('test',)) -> None:
    """Reject a checkpoint with other classes than the data, or another order.

    Its weights may load all the same, and every score would be that of the wrong class.

    Args:
        cfg: The config.
        meta: Metadata of the checkpoint.
        checkpoint: Its name.
        splits: Data sets to compare with. Defaults to the test data.

    Raises:
        UserError: With both lists, and a value for ``--classes``.
    """
    trained = [name.strip() for name in checkpoint_classes(meta)]
    for key, dataset in named_datasets(cfg, splits):
        names = [name.strip() for name in classes_of(dataset, cfg.get('default_scope', 'mmengine')) or ()]
        if trained and names and names != trained:
            order = ' in another order' if Counter(names) == Counter(trained) else ''
            raise UserError(
                f'{checkpoint}: was trained on {len(trained)} classes: {format_list(trained)}; {key} has '
                f'{len(names)}{order}: {format_list(names)}{classes_advice(meta)}'
            )
