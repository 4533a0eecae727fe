"""The remaining tasks of a suite: reads configs, writes scenes, and leaves out finished measurements."""

import contextlib
import copy
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from filelock import FileLock
from mmengine.config import Config

from replk_mm.analysis.complexity import build_on_meta
from replk_mm.bench import records
from replk_mm.bench.schema import Suite, SuiteRow, fingerprint
from replk_mm.bench.suites.task import Task, results_file
from replk_mm.bench.suites.worker import in_suite_terms
from replk_mm.data.classes import use_classes
from replk_mm.data.datasets import datasets_of, task_of
from replk_mm.data.scenes.kinds import SCENES
from replk_mm.data.scenes.writer import META, write_demo_data
from replk_mm.engine.backbone import published_result
from replk_mm.engine.config import load_config, set_data_root
from replk_mm.environment import git_state
from replk_mm.errors import UserError
from replk_mm.files import write_atomic
from replk_mm.published import PublishedResult

#: Measurements that read images of the data set.
_NEED_IMAGES = {'train', 'metric', 'erf', 'shape_bias', 'robustness'}
#: See :func:`_as_first_version`.
_ONCE_IMPLICIT = [
    f'replk_mm.{name}'
    for name in (
        'CheckpointHook',
        'CocoDataset',
        'CocoMetric',
        'EpochBasedTrainLoop',
        'IoUMetric',
        'IterBasedTrainLoop',
        'SegTTAModel',
        'ValLoop',
    )
]


@dataclass(frozen=True)
class SuiteOptions:
    """Options of the command line."""

    work_dir: Path  # where everything is written
    resume: bool = False  # continue an earlier run
    only: Sequence[str] = ()  # names or patterns of rows, or numbers of pairs of row and seed; empty for all
    data_root: str | None = None  # of all rows; None for what the suite says
    classes: str | None = None  # of all rows; None for what the suite says
    device: str | None = None  # None for a GPU if there is one


def select_rows(suite: Suite, only: Sequence[str]) -> list[tuple[SuiteRow, int]]:
    """Rows and seeds that ``--only`` names.

    Raises:
        UserError: If a part of it names nothing.
    """
    pairs = suite.pairs()
    wanted: set[int] = set()
    for name in only:
        found = [i for i, (row, _) in enumerate(pairs) if str(i) == name or fnmatchcase(row.name, name)]
        if not found:
            raise UserError(
                f'--only {name}: {suite.path} has no such row\nKnown rows: '
                f'{", ".join(row.name for row in suite.rows)}; or 0 to {len(pairs) - 1}, as --list numbers '
                f'them.'
            )
        wanted.update(found)
    return [pair for i, pair in enumerate(pairs) if i in wanted or not only]


def remaining_tasks(suite: Suite, options: SuiteOptions, build: bool = True) -> list[Task]:
    """The tasks of the chosen rows that are not done, with their data written.

    Args:
        suite: The suite.
        options: From the command line.
        build: Build each model, without memory, so that a suite fails before its first row. Defaults to True.

    Raises:
        UserError: If results exist and ``resume`` is not set, or a row has changed or cannot be used.
    """
    pairs = select_rows(suite, options.only)
    begun = [
        f'{row.name} seed {seed}'
        for row, seed in pairs
        if results_file(options.work_dir, row.name, seed).exists()
        or (options.work_dir / 'runs' / row.name / str(seed)).exists()
    ]
    if begun and not options.resume:
        raise UserError(
            f'{options.work_dir}: {len(begun)} of {len(pairs)} rows and seeds exist already: {begun[0]}'
            f'{" ..." * (len(begun) > 1)}\nContinue with --resume, or choose another --work-dir DIR.'
        )
    git = git_state()
    found = [
        entry
        for row in {row.name: row for row, _ in pairs}.values()
        for entry in _tasks_of(suite, row, [seed for other, seed in pairs if other.name == row.name], options, git)
    ]
    for row, cfg in {task.row.name: cfg for task, _, cfg in found}.items() if build else ():
        with _naming(suite, row, 'config'):
            build_on_meta(copy.deepcopy(cfg))
    return [_begin(task, definition, cfg) for task, definition, cfg in found]


@contextlib.contextmanager
def _naming(suite: Suite, name: str, field: str) -> Iterator[None]:
    """Put the place in the suite file before an error."""
    try:
        yield
    except UserError as error:
        number = next(i for i, row in enumerate(suite.rows) if row.name == name)
        raise UserError(f'{suite.path}: rows[{number}] ({name}): {field}: {in_suite_terms(str(error))}') from error


def _tasks_of(
    suite: Suite, row: SuiteRow, seeds: list[int], options: SuiteOptions, git: dict | None
) -> Iterator[tuple[Task, dict[str, Any], Config]]:
    """The unfinished tasks of a row, its definition and its config."""
    path = config_path(row, suite)
    with _naming(suite, row.name, 'config'):
        cfg = load_config(path, row.options)
    sha256 = fingerprint(_as_first_version(cfg.to_dict()))
    comparable = row.published and row.protocol == 'finetune' and row.fraction == 100
    paper = published_result(cfg, row.config) if comparable else None
    row = _without_weights(row, seeds[0], paper)
    row = row.model_copy(update=dict(classes=row.classes if options.classes is None else options.classes))
    data_root, data = _data_of(suite, row, cfg, options)
    names = None
    if row.classes is not None:
        if data_root:
            set_data_root(cfg, data_root)
        with _naming(suite, row.name, 'classes'):
            use_classes(cfg, row.classes, ('train', 'val', 'test'))
        names = list(next(datasets_of(cfg)).metainfo.classes)
    # The keys of the first version's records: changing this makes --resume measure everything again.
    definition = dict(
        row=row.name,
        config=sha256,
        iterations=row.iterations,
        schedule=row.schedule,
        checkpoint=row.checkpoint,
        data=data,
        **(dict(classes=names) if names else {}),
        **row.training_keys(),
    )
    if row.protocol == 'linear':
        from replk_mm.engine.probe import use_linear_head  # imports mmseg

        with _naming(suite, row.name, 'protocol'):
            use_linear_head(cfg)
    size = dict(shape=row.shape, batch=row.batch or 0)
    extra: dict[str, dict] = dict(
        complexity=dict(shape=row.macs_shape),
        speed=size,
        memory=size,
        erf=dict(erf=row.erf.model_dump(exclude_none=True)),
        robustness=dict(robustness=row.robustness.model_dump()),
    )
    shared = dict(
        suite=suite.name,
        question=suite.question,
        git=git,
        published=paper
        and dict(
            paper.metrics,
            dataset=paper.dataset,
            params_m=paper.params_m,
            flops_g=paper.flops_g,
            input=paper.input and list(paper.input),
            source=paper.source,
        ),
        quotes=suite.quotes,
        config=dict(path=row.config, sha256=sha256, options=row.options),
    )
    for seed in seeds:
        weights = row.pretrained_of(seed) or 'none'
        if weights != 'none' and ':' not in weights and not Path(weights).exists():
            raise UserError(f'{suite.path}: {row.name}: pretrained: {weights}: no such file')
        task = Task(
            work_dir=options.work_dir,
            row=row,
            seed=seed,
            config=path,
            data_root=data_root,
            device=options.device,
            measures=row.measurements(),
            shared=shared,
            keys={m: fingerprint([{**definition, **extra.get(m, {})}, seed, m]) for m in row.measurements()},
            pretraining=row.pretraining or (paper.pretraining if paper and row.checkpoint else None),
        )
        if left := task.unfinished():
            yield task.subset(left), {**definition, 'options': row.options, 'classes': names}, cfg


def _without_weights(row: SuiteRow, seed: int, paper: PublishedResult | None) -> SuiteRow:
    """The row with no measurement but the complexity, where a published network's trained weights are missing."""
    file = row.checkpoint_of(seed)
    if not paper or not file or ':' in file or Path(file).exists():
        return row
    skipped = [name for name in row.measure if name != 'complexity']
    print(
        f"{row.name}: {file} is missing: skips {', '.join(skipped)}; the authors' weights: {paper.trained}",
        file=sys.stderr,
    )
    return row.model_copy(update=dict(measure=[name for name in row.measure if name == 'complexity']))


def _begin(task: Task, definition: dict[str, Any], cfg: Config) -> Task:
    """Keep the definition of a task, and a config with other classes or heads, which all measurements then read."""
    _check_unchanged(task, definition)
    if not definition['classes'] and task.row.protocol != 'linear':
        return task
    file = write_atomic(task.folder / 'config.py', cfg.pretty_text)
    return task.model_copy(update=dict(config=str(file), row=task.row.model_copy(update=dict(options={}))))


def _as_first_version(node: Any) -> Any:
    """A config as the first version wrote it, so that its records stay valid.

    Our types replaced those of mmengine without being named, and features had one memory format.
    """
    if isinstance(node, dict):
        return {
            key: value.removeprefix('replk_mm.')
            if key == 'type' and value in _ONCE_IMPLICIT
            else _as_first_version(value)
            for key, value in node.items()
            if (key, value) != ('out_memory_format', 'preserve_format')
        }
    return [_as_first_version(part) for part in node] if isinstance(node, (list, tuple)) else node


def config_path(row: SuiteRow, suite: Suite) -> str:
    """Resolve a row's config: a path, a file next to the suite file, or a config of this project."""
    name = row.config
    if '::' in name or Path(name).is_file():
        return name
    beside = suite.path.parent / name
    return str(beside) if beside.is_file() else f'replk_mm::{name}' if '/' not in name else name


def _check_unchanged(task: Task, definition: dict[str, Any]) -> None:
    """Keep the definition of a row, and reject another one for a training that has begun.

    Raises:
        UserError: If the row was begun with another definition.
    """
    path = task.folder / 'definition.json'
    after = json.loads(json.dumps(definition, default=str))
    before = records.read_json(path)
    changed = [key for key in {**after, **before} if before and before.get(key) != after.get(key)]
    if changed and (task.row.trains or before.get('iterations') or before.get('schedule')):
        # options tell a reader more than the hash of the config
        shown = next((key for key in changed if key != 'config'), 'config')
        raise UserError(
            f'{task.folder}: was begun with another {shown} than the suite has now: '
            f'{str(before.get(shown)):.60} then, {str(after.get(shown)):.60} now\n'
            f'Remove that folder to run the row again, or choose another --work-dir DIR.'
        )
    records.write_json(path, after)


def _data_of(suite: Suite, row: SuiteRow, cfg: Config, options: SuiteOptions) -> tuple[str | None, dict[str, Any]]:
    """The data root of a row, None for the config's own, and what identifies the data; scenes are written if needed.

    Raises:
        UserError: If there is no such kind of scenes, or they cannot be written.
    """
    root = options.data_root or row.data_root or suite.data.root
    if root or suite.data.scenes is None:
        return root, dict(root=root)
    wanted = suite.data.model_dump(exclude={'root'})
    wanted['layout'] = wanted['layout'] or _layout_of(cfg)
    kind = SCENES.get(wanted['scenes'])
    if kind is None:
        raise UserError(
            f'{suite.path}: data: scenes: {wanted["scenes"]!r} is unknown\nKnown scenes: {", ".join(SCENES)}.'
        )
    wanted['version'] = kind.version
    if not _NEED_IMAGES & set(row.measurements()) and row.classes is None:
        return None, wanted
    folder = options.work_dir / 'data' / f'{kind.name}-{wanted["layout"]}-{fingerprint(wanted)[:8]}'
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.parent / 'lock'):  # tasks of a job array start together
        if not (folder / META).is_file():
            write_demo_data(
                folder,
                wanted['layout'],
                train=wanted['train'],
                val=wanted['val'],
                seed=wanted['seed'],
                size=tuple(wanted['size']),
                kind=kind,
            )
    return str(folder), wanted


def _layout_of(cfg: Config) -> str:
    if task_of(cfg) != 'segmentation':
        return {'detection': 'coco', 'classification': 'imagenet'}[task_of(cfg)]
    types = [str(dataset.get('type')) for dataset in datasets_of(cfg, ('test',))]
    return 'cityscapes' if types and types[0].endswith('CityscapesDataset') else 'ade20k'


def row_states(suite: Suite, work_dir: Path) -> Iterator[tuple[int, SuiteRow, int, str]]:
    """Number, row, seed and state of every pair, from the records alone."""
    for i, (row, seed) in enumerate(suite.pairs()):
        known = records.latest_records(results_file(work_dir, row.name, seed))
        found = [known[name] for name in row.measurements() if name in known]
        failed = [record for record in found if record['status'] == 'failed']
        if failed:
            state = f'failed: {failed[0]["measurement"]}: {failed[0]["reason"].splitlines()[0]}'
        elif len(found) == len(row.measurements()):
            state = 'done'
        else:
            # No record: it runs, waits to be continued, or was killed together with the suite.
            begun = records.read_json(work_dir / 'runs' / row.name / str(seed) / 'train' / 'progress.json')
            state = f'{len(found)} of {len(row.measurements())} done' if found else '-'
            if begun and 'train' not in known:
                state = f'training: iteration {begun["iteration"]} of {begun["iterations"]}'
        yield i, row, seed, state
