"""Do data sets, annotation files and heads mean the same classes? Asked before anything is trained or scored."""
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from mmengine.config import Config

from replk_mm.data import coco
from replk_mm.data.class_heads import head_counts
from replk_mm.data.classes import (
    CLASSES_FILE,
    annotation_file,
    classes_of,
    command_to_write,
    command_with,
    did_you_mean,
    found_classes,
    listed,
)
from replk_mm.data.datasets import coco_style, dataset_class, placed_datasets
from replk_mm.data.picked_labels import check_picked
from replk_mm.errors import UserError

#: Names of so many classes and fewer are written out in a command.
_WRITTEN_OUT = 20


def check_classes(cfg: Config, splits: tuple[str, ...]) -> list[str]:
    """Compare the classes of the data sets with the categories or label ids in their files, and with the heads.

    Args:
        cfg: With its data checked: the annotation files are there and can be read.
        splits: Whose data sets.

    Returns:
        What a user should know, a line each: classes that do not occur, categories that are left out on purpose.

    Raises:
        UserError: If objects would be left out without a word, or heads have another number of classes than the data.
    """
    refused, notes = disagreements(cfg, splits)
    if refused:
        raise refused[0]
    return notes


def disagreements(cfg: Config, splits: tuple[str, ...]) -> tuple[list[UserError], list[str]]:
    """All that :func:`check_classes` refuses, and what a user should know.

    Annotation files and label maps that are missing or cannot be read are passed over: other checks name them.
    """
    scope = cfg.get('default_scope', 'mmengine')
    counts: dict[str, dict[str, int]] = {}
    for place, dataset in placed_datasets(cfg, splits):
        if (file := annotation_file(dataset)) and coco_style(dataset, scope):
            with suppress(UserError, OSError):
                counts[place] = coco.category_counts(coco.content(file).data)
    refused: list[UserError] = []
    notes: list[str] = []

    def ask(check: Callable[..., list[str] | None], *args) -> None:
        try:
            notes.extend(check(*args) or ())
        except UserError as error:
            refused.append(error)
        except (OSError, UnicodeDecodeError):
            pass  # a list of images that cannot be read

    for place, dataset in placed_datasets(cfg, splits):
        names = classes_of(dataset, scope)
        if names and place in counts:
            ask(_compare_with_file, cfg, place, dataset, names, counts, splits)
    for split in splits:
        ask(check_picked, cfg, (split,))
    for split in splits:
        ask(check_heads, cfg, head_counts(cfg.model), (split,))
    return list({str(error): error for error in refused}.values()), list(dict.fromkeys(notes))


def check_heads(cfg: Config, counts: Mapping[str, int], splits: tuple[str, ...] = ()) -> None:
    """Refuse heads that disagree on the number of classes: the labels are the same for all of them.

    Args:
        cfg: The config.
        counts: Number of classes of every head by its path.
        splits: Whose data sets must have as many classes. Defaults to none.
    """
    if len(set(counts.values())) > 1:
        found = ', '.join(f'{path}.num_classes={count}' for path, count in counts.items())
        raise UserError(f'{cfg.filename}: the heads have different numbers of classes: {found}\n'
                        f'Set them to the same number; --classes NAME,NAME,... does so, and names the classes in the data.')
    scope = cfg.get('default_scope', 'mmengine')
    for place, dataset in placed_datasets(cfg, splits):
        names = classes_of(dataset, scope)
        # Panoptic data sets, for one, name classes that are not for these heads.
        if names and (coco_style(dataset, scope) or hasattr(dataset_class(dataset, scope), 'get_label_map')):
            _compare_with_heads(cfg, place, names, counts)


def _compare_with_heads(cfg: Config, place: str, names: Sequence[str], counts: Mapping[str, int]) -> None:
    wrong = {path: count for path, count in counts.items() if count != len(names)}
    if wrong:
        found = ', '.join(f'{path}.num_classes={count}' for path, count in wrong.items())
        settings = ' '.join(f'{path}.num_classes={len(names)}' for path in wrong)
        raise UserError(
            f'{cfg.filename}: {place} has {len(names)} classes ({listed(names)}), and the heads others: {found}\n'
            f'Labels would be mistaken for others, or be out of range. Set the heads:\n  --cfg-options {settings}\n'
            f'or name the classes, and data sets and heads are set together:\n  '
            + command_with('--classes', 'NAME,NAME,...'))


def _compare_with_file(cfg: Config, place: str, dataset: dict, names: Sequence[str],
                       counts: dict[str, dict[str, int]], splits: tuple[str, ...]) -> list[str]:
    file, found = annotation_file(dataset), counts[place]
    strange = {name: count for name, count in found.items() if count and name not in names}
    unknown = [name for name in names if name not in found]
    # Picking some of the categories is fine, if it is the config that says so and no name misses.
    picked = bool((dataset.get('metainfo') or {}).get('classes')) and not unknown
    others = {other: set(of_other) for other, of_other in counts.items() if set(of_other) != set(found)}
    if strange and (not picked or any(name not in other for name in strange for other in others.values())):
        raise UserError(_mismatch(cfg, place, dataset, names, found, strange, others, splits))
    if strange:
        return [f'{file}: categories left out, the classes being {listed(names)}: {listed(list(strange))}']
    occurring = [name for name in names if found.get(name)]
    return [] if len(occurring) == len(names) else [
        f'{file}: {len(occurring)} of {len(names)} classes occur: {listed(occurring)}']


def _mismatch(cfg: Config, place: str, dataset: dict, names: Sequence[str], found: dict[str, int], strange: dict[str, int],
              others: dict[str, set[str]], splits: tuple[str, ...]) -> str:
    file = annotation_file(dataset)
    assert file is not None
    meant = {name: other for name in strange if (other := did_you_mean(name, names))}
    shown = [f'{name} ({count:,} object{"s" * (count != 1)}{"; did you mean " + meant[name] + "?" if name in meant else ""})'
             for name, count in strange.items()]
    whose = f'metainfo.classes of {place}' if (dataset.get('metainfo') or {}).get('classes') else (
        f'{dataset["type"]}\'s own, for {place} has no metainfo')
    left = [name for name, count in found.items() if count and name in names]
    lines = [
        f'{file}: {len(strange)} of its {len(found)} categories are none of the {len(names)} classes of the data set: '
        f'{listed(shown)}',
        f'Its categories: {listed(list(found))}. Classes ({whose}): {listed(names)}.',
        f'{sum(strange.values()):,} of {sum(found.values()):,} objects would be left out without a word, and '
        + (f'the model be trained and scored on {listed(left)} only.' if left else 'nothing be left to learn: AP would be 0.')]
    for other, theirs in others.items():
        mine_only, theirs_only = sorted(set(found) - theirs), sorted(theirs - set(found))
        lines.append(f'{place} and {other} disagree: only the first has {listed(mine_only) or "nothing"}, '
                     f'only the second {listed(theirs_only) or "nothing"}.')
    if len(meant) == len(strange):
        lines.append(coco.mend(file, f"[c.update(name={meant!r}.get(c['name'], c['name'])) for c in d['categories']]",
                               'Rename the categories in the file, if that is what they are'))
    wanted = list(found) if not others else list(dict.fromkeys([*found, *(n for o in others.values() for n in sorted(o))]))
    lines += [f'{"Or use" if len(meant) == len(strange) else "Use"} the categories as the classes, of the heads too:',
              *_commands(cfg, wanted, splits)]
    text = snippet(cfg, wanted)
    return '\n'.join([*lines, *(['or the same in a config of your own beside that one:', *(f'  {line}' for line in text)]
                                if text else [])])


def _commands(cfg: Config, names: Sequence[str], splits: tuple[str, ...]) -> list[str]:
    """Lines for the shell that run this command with these classes."""
    writable = not any(',' in name or name != name.strip() for name in names)
    if writable and len(names) <= _WRITTEN_OUT:
        return [f'  {command_with("--classes", ",".join(names))}']
    if _found(cfg, splits)[0] == list(names):
        return [f'  {command_with("--classes", "auto")}']
    # Not a file in the data root: there it would say what label ids count.
    return [f'  {command_to_write(names, CLASSES_FILE)}', f'  {command_with("--classes", CLASSES_FILE)}']


def _found(cfg: Config, splits: tuple[str, ...]) -> tuple[list[str], bool]:
    """The names that ``--classes auto`` would take, none if it would be refused, and whether label ids count them."""
    try:
        names, _, counted = found_classes(cfg, splits)
    except UserError:
        return [], False
    return names, counted


def snippet(cfg: Config, names: Sequence[str]) -> list[str]:
    """Lines of a config that inherits ``cfg`` and has these classes; none if its lists are nested too deeply."""
    changes = [(place, 'metainfo', 'dict(classes=classes)') for place, _ in placed_datasets(cfg)]
    changes += [(path, 'num_classes', 'len(classes)') for path in head_counts(cfg.model)]
    tree: dict[str, Any] = {}
    for path, key, value in changes:
        words = path.split('.')
        if words[-1].isdigit():  # mmengine replaces lists as wholes
            parent = '.'.join(words[:-1])
            words, key, value = words[:-2], words[-2], f'[{{**part, {key!r}: {value}}} for part in _base_.{parent}]'
        if any(word.isdigit() for word in words):
            return []
        node = tree
        for word in words:
            node = node.setdefault(word, {})
        node[key] = value
    return [f"_base_ = './{Path(cfg.filename).name}'", f'classes = {tuple(names)!r}',
            *(f'{key} = {_rendered(node)}' for key, node in tree.items())]


def _rendered(node: dict | str) -> str:
    return node if isinstance(node, str) else f'dict({", ".join(f"{key}={_rendered(part)}" for key, part in node.items())})'


def trained_on(meta: Mapping) -> list[str]:
    """The classes that a checkpoint's record names; none if it names none."""
    found = meta.get('dataset_meta')
    lower = {str(key).lower(): value for key, value in found.items()} if isinstance(found, Mapping) else {}
    names = lower.get('classes')
    return [str(name) for name in names] if isinstance(names, (list, tuple)) else []


def advice_of(meta: Mapping, option: str | None = None) -> str:
    """What to tell who has a checkpoint that does not fit: lines, none if it does not name its classes.

    Args:
        meta: The checkpoint's record.
        option: What to give ``--classes``; None for the names. Defaults to None.
    """
    names = trained_on(meta)
    return '' if not names else (f'\nIt was trained on {len(names)} classes: {listed(names)}. If the config has others, use '
                                 f'them:\n  {command_with("--classes", option or ",".join(names))}')


def compare_with_checkpoint(cfg: Config, meta: Mapping, checkpoint: str, splits: tuple[str, ...] = ('test',)) -> None:
    """Refuse a checkpoint whose classes are others than the data's, or the same in another order.

    Weights may fit all the same, and every figure would be of the wrong class.

    Args:
        cfg: The config.
        meta: The checkpoint's record.
        checkpoint: Its name.
        splits: Data sets to compare with.

    Raises:
        UserError: With both lists, and what to give ``--classes``.
    """
    theirs = [name.strip() for name in trained_on(meta)]
    for place, dataset in placed_datasets(cfg, splits):
        names = [name.strip() for name in classes_of(dataset, cfg.get('default_scope', 'mmengine')) or ()]
        if theirs and names and names != theirs:
            order = ' in another order' if set(names) == set(theirs) else ''
            # Given by name, classes that label ids count might be picked from those of the data set's type.
            option = 'auto' if _found(cfg, splits) == (theirs, True) else None
            raise UserError(
                f'{checkpoint}: was trained on {len(theirs)} classes: {listed(theirs)}; {place} has {len(names)}{order}: '
                f'{listed(names)}{advice_of(meta, option)}')
