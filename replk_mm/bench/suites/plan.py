"""From a suite to the tasks that are left: configs read, data written, what is done already left out."""
import contextlib
import json
import os
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import replk_mm
from replk_mm.bench import published, records
from replk_mm.bench.suites.definition import Row, Suite
from replk_mm.bench.suites.scenes import data_of
from replk_mm.bench.suites.task import Task, now, read_whole, write_whole
from replk_mm.engine.config import load_config
from replk_mm.errors import UserError

Pair = tuple[Row, int]


@dataclass(frozen=True)
class Choice:
    """What the command line says of a suite.

    Attributes:
        work_dir: Where everything goes.
        resume: Go on where an earlier run was ended.
        only: Names or patterns of rows, or numbers of pairs of row and seed; empty for all.
        data_root: Of all rows; None for what the suite says.
        device: None for what is there.
    """

    work_dir: Path
    resume: bool = False
    only: Sequence[str] = ()
    data_root: str | None = None
    device: str | None = None


def chosen(suite: Suite, only: Sequence[str]) -> list[Pair]:
    """Rows and seeds that ``--only`` names.

    Raises:
        UserError: If something in it names nothing.
    """
    pairs = suite.pairs()
    wanted: set[int] = set()
    for name in only:
        found = [i for i, (row, _) in enumerate(pairs) if str(i) == name or fnmatchcase(row.name, name)]
        if not found:
            raise UserError(f'--only {name}: {suite.path} has no such row\nThere are: '
                            f'{", ".join(row.name for row in suite.rows)}; or 0 to {len(pairs) - 1}, as --list numbers them.')
        wanted.update(found)
    return [pair for i, pair in enumerate(pairs) if i in wanted or not only]


def tasks_left(suite: Suite, choice: Choice) -> tuple[list[Task], list[tuple[str, str]]]:
    """The tasks of the chosen rows that are not done, their data written.

    Args:
        suite: The suite.
        choice: What of it.

    Returns:
        The tasks; and row and seed with the reason where the config cannot be read, which is recorded.

    Raises:
        UserError: If there are results already and nobody said ``resume``, or a row has changed since it was begun.
    """
    pairs = chosen(suite, choice.only)
    begun = [f'{row.name} seed {seed}' for row, seed in pairs if records.file_of(choice.work_dir, row.name, seed).exists()
             or (choice.work_dir / 'runs' / row.name / str(seed)).exists()]
    if begun and not choice.resume:
        raise UserError(f'{choice.work_dir}: {len(begun)} of {len(pairs)} rows and seeds are begun already: {begun[0]}'
                        f'{" ..." * (len(begun) > 1)}\nGo on with --resume, or begin elsewhere with --work-dir DIR.')
    state = git_state()
    tasks, failed = list[Task](), list[tuple[str, str]]()
    for row in {row.name: row for row, _ in pairs}.values():
        seeds = [seed for other, seed in pairs if other.name == row.name]
        for task, wrong in _tasks_of(suite, row, seeds, choice, state):
            if wrong:
                failed.append((task.name, f'{_fail(task, wrong)}: {wrong}'))
            else:
                tasks.append(task)
    return tasks, failed


def _fail(task: Task, wrong: str) -> str:
    """Record that a row's config cannot be read; what was measured while it could be stays. Returns what fails by it."""
    known = records.read([task.results])[0] if task.results.exists() else []
    done = {record['measurement'] for record in known if record['status'] == 'done'}
    missing = [name for name in task.measures if name not in done]
    if missing:
        task.fail(missing[0], now(), {}, wrong)
    return (missing or task.measures)[0]


def _tasks_of(suite: Suite, row: Row, seeds: list[int], choice: Choice, state: dict | None) -> Iterator[tuple[Task, str]]:
    """What is left of a row, with what is wrong with its config."""
    cfg, wrong = None, ''
    try:
        cfg = load_config(config_path(row, suite), dict(row.options) or None)
    except UserError as error:
        wrong = str(error)
    data_root, data = data_of(suite, row, cfg, choice.work_dir, choice.data_root) if cfg else (None, {})
    config = dict(path=row.config, sha256=records.fingerprint(cfg.to_dict()) if cfg else None, options=dict(row.options))
    definition = dict(row=row.name, config=config['sha256'] or row.config, iterations=row.iterations, schedule=row.schedule,
                      checkpoint=row.checkpoint, data=data)
    paper = published.for_config(row.config.rpartition('::')[2]) if row.published else None
    size = dict(shape=row.shape, batch=row.batch)
    extra: dict[str, dict] = dict(complexity=dict(shape=row.macs_shape), speed=size, memory=size, erf=dict(erf=row.erf))
    for seed in seeds:
        measures = row.measurements()
        task = Task(
            work_dir=str(choice.work_dir), suite=suite.name, question=suite.question, row=row.name, label=row.label, seed=seed,
            config=config_path(row, suite), config_record=config, options=row.options, iterations=row.iterations,
            trains=row.trains, checkpoint=row.checkpoint_of(seed), shape=row.shape, macs_shape=row.macs_shape,
            batch=row.batch, erf=row.erf, data_root=data_root, device=choice.device,
            pretraining=row.pretraining or (paper.pretraining if paper and row.checkpoint else None),
            launcher='none', measures=measures, git=state,
            keys={m: records.key_of({**definition, **extra.get(m, {})}, seed, m) for m in measures},
            published=dict(paper.metrics, params_m=paper.params_m, flops_g=paper.flops_g, input=list(paper.input),
                           source=paper.source) if paper else None)
        left = task.left()
        if left and not wrong:
            _check_unchanged(task, {**definition, 'options': dict(row.options)})
        if left:
            yield task.part(left, 'none'), wrong


def config_path(row: Row, suite: Suite) -> str:
    """What to read for a row's config: as it is named, beside the suite file, or among those of this project."""
    name = row.config
    if '::' in name or Path(name).is_file():
        return name
    beside = suite.path.parent / name
    return str(beside) if beside.is_file() else f'replk_mm::{name}' if '/' not in name else name


def _check_unchanged(task: Task, definition: dict[str, Any]) -> None:
    """Refuse to go on with a training of something else; a definition that is new is kept.

    Raises:
        UserError: If the row was begun with another definition.
    """
    path = task.folder / 'definition.json'
    before, after = read_whole(path), json.loads(json.dumps(definition, default=str))
    changed = [key for key in after if before and before.get(key) != after[key]]
    if changed and (task.trains or before.get('iterations') or before.get('schedule')):
        # the config's hash says nothing to a reader where the options do
        shown = next((key for key in changed if key != 'config'), 'config')
        raise UserError(f'{task.folder}: was begun with another {shown} than the suite has now: '
                        f'{str(before.get(shown)):.60} then, {str(after[shown]):.60} now\n'
                        f'Remove that folder to run the row anew, or begin elsewhere with --work-dir DIR.')
    write_whole(path, after)


def git_state() -> dict[str, Any] | None:
    """Commit of the repository that this package runs from, and whether files differ from it; None outside of one."""
    root = Path(replk_mm.__file__).resolve().parents[1]

    def ask(*arguments: str) -> str:
        return subprocess.run(['git', '-C', str(root), *arguments], capture_output=True, text=True, check=True,
                              env={**os.environ, 'GIT_OPTIONAL_LOCKS': '0'}).stdout.strip()

    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        if Path(ask('rev-parse', '--show-toplevel')).resolve() == root:
            return dict(commit=ask('rev-parse', 'HEAD'), dirty=bool(ask('status', '--porcelain')))
    return None


def states(suite: Suite, work_dir: Path) -> Iterator[tuple[int, Row, int, str]]:
    """Number, row, seed and state of every pair, from the records alone."""
    for i, (row, seed) in enumerate(suite.pairs()):
        path = records.file_of(work_dir, row.name, seed)
        of = {record['measurement']: record for record in (records.read([path])[0] if path.exists() else [])}
        measures = row.measurements()
        failed = [of[name] for name in measures if name in of and of[name]['status'] == 'failed']
        done = sum(name in of for name in measures) - len(failed)
        if failed:
            state = f'failed: {failed[0]["measurement"]}: {failed[0]["reason"].splitlines()[0]}'
        else:
            state = 'done' if done == len(measures) else f'{done} of {len(measures)} done' if done else '-'
        yield i, row, seed, state
