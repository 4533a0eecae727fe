"""What a process of a suite is told: a row and seed, and what is to be measured of it; plain data in a file."""
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from replk_mm.bench import records
from replk_mm.files import sha256


@dataclass(frozen=True)
class Task:
    """A row and seed.

    Attributes:
        work_dir: Of the suite.
        suite: Its name.
        question: Its question.
        row: Name of the row.
        label: As a report shows it.
        seed: Of the training.
        config: What :func:`replk_mm.engine.config.load_config` takes.
        config_record: What records say of the config.
        options: Overrides of config fields.
        iterations: Training budget, None for another.
        trains: Whether there is something to train.
        checkpoint: Trained weights, None if the row trains or has random ones.
        pretraining: Of the backbone, as the suite says it; None if it does not.
        shape: Of speed and memory; None for the config's.
        macs_shape: Of complexity; None for the published row's or the config's.
        batch: Of speed and memory; 0 for as few images as possible.
        erf: ``size`` and ``count`` of the images of the effective receptive field, where the row says them.
        data_root: None for the config's.
        device: None for what is there.
        launcher: ``'none'``, ``'pytorch'`` or ``'slurm'``: how its processes are started.
        measures: What is to be done, in order.
        keys: Of the records, by measurement.
        published: What a paper reports, None if nothing.
        git: State of the repository, None outside of one.
    """

    work_dir: str
    suite: str
    question: str
    row: str
    label: str
    seed: int
    config: str
    config_record: Mapping[str, Any]
    options: Mapping[str, Any]
    iterations: int | None
    trains: bool
    checkpoint: str | None
    pretraining: str | None
    shape: tuple[int, int] | None
    macs_shape: tuple[int, int] | None
    batch: int
    erf: Mapping[str, int]
    data_root: str | None
    device: str | None
    launcher: str
    measures: tuple[str, ...]
    keys: Mapping[str, str]
    published: Mapping[str, Any] | None
    git: Mapping[str, Any] | None

    @property
    def name(self) -> str:
        """For lines to the user."""
        return f'{self.row} seed {self.seed}'

    @property
    def folder(self) -> Path:
        """Of everything that the row and seed write but their records."""
        return Path(self.work_dir, 'runs', self.row, str(self.seed))

    @property
    def log(self) -> Path:
        """The output of its processes, one after the other."""
        return self.folder / 'log.txt'

    @property
    def results(self) -> Path:
        """The file of its records."""
        return records.file_of(Path(self.work_dir), self.row, self.seed)

    def part(self, measures: tuple[str, ...], launcher: str) -> 'Task':
        """The same for some of its measurements."""
        return replace(self, measures=measures, launcher=launcher)

    def left(self) -> tuple[str, ...]:
        """Its measurements that are not recorded as done."""
        known = records.read([self.results])[0] if self.results.exists() else []
        done = {record['measurement'] for record in known if record['status'] == 'done'
                and self.keys.get(record['measurement']) == record['key'] and self._same_weights(record)}
        return tuple(name for name in self.measures if name not in done)

    def _same_weights(self, record: Mapping[str, Any]) -> bool:
        measured = (record['checkpoint'] or {}).get('sha256')
        if not self.checkpoint or measured is None or not Path(self.checkpoint).is_file():
            return True
        return sha256(self.checkpoint) == measured

    def write(self) -> Path:
        """Leave the task to its process; returns the file."""
        return write_whole(self.folder / 'task.json', asdict(self))

    @classmethod
    def read(cls, path: Path) -> 'Task':
        """What :meth:`write` wrote."""
        found = json.loads(path.read_text())
        return cls(**{**found, **{key: found[key] and tuple(found[key]) for key in ('measures', 'shape', 'macs_shape')}})

    def record(self, measurement: str, started: datetime, environment: Mapping[str, Any], **content: Any) -> dict[str, Any]:
        """A record of a measurement that ends now; ``content`` has what differs from a failure without a word."""
        seconds = (datetime.now(timezone.utc) - started).total_seconds()
        return dict(
            version=records.VERSION, suite=self.suite, question=self.question, row=self.row, label=self.label, seed=self.seed,
            measurement=measurement, **{**dict(status='done', reason=None, values={}, protocol={}, facts={}, checkpoint=None,
                                               files={}), **content},
            config=self.config_record, published=self.published, git=self.git, environment=environment,
            started=started.isoformat(timespec='microseconds'), seconds=round(seconds, 3), key=self.keys[measurement],
            asked=list(self.keys))

    def fail(self, measurement: str, started: datetime, environment: Mapping[str, Any], reason: str) -> None:
        """Append the record of a measurement that failed."""
        records.append(self.record(measurement, started, environment, status='failed', reason=reason), self.results)

    def say_stage(self, measurement: str) -> None:
        """Leave word of what is being done."""
        write_whole(self.folder / 'stage.json', dict(stage=measurement, pid=os.getpid()))

    def stage(self) -> str | None:
        """What the row's process was doing last."""
        return read_whole(self.folder / 'stage.json').get('stage')

    def training(self) -> dict[str, Any]:
        """How far training is: ``iteration``, ``iterations`` and ``seconds``; empty before its first iteration."""
        return read_whole(self.folder / 'train' / 'progress.json')


def now() -> datetime:
    """The time, in UTC."""
    return datetime.now(timezone.utc)


def write_whole(path: Path, content: Mapping[str, Any]) -> Path:
    """Write JSON so that a reader sees the old file or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f'{path.name}.{os.getpid()}.part')
    part.write_text(json.dumps(content, indent=1) + '\n')
    part.replace(path)
    return path


def read_whole(path: Path) -> dict[str, Any]:
    """What :func:`write_whole` wrote; empty if there is none, or something else."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
