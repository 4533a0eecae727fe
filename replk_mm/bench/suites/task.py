"""One row and seed of a suite, as its process reads it from ``task.json``."""

from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from replk_mm.bench import records
from replk_mm.bench.schema import VERSION, SuiteRow
from replk_mm.checkpoints.io import fetch_checkpoint, hash_checkpoint


def utc_now() -> datetime:
    """The current time in UTC."""
    return datetime.now(timezone.utc)


def results_file(work_dir: Path, row: str, seed: int) -> Path:
    """The file with the records of a row and seed."""
    return work_dir / 'results' / f'{row}.{seed}.jsonl'


class Task(BaseModel):
    """The measurements to make of one row and seed."""

    work_dir: Path  # of the suite
    row: SuiteRow
    seed: int
    config: str  # argument of replk_mm.engine.config.load_config
    data_root: str | None  # None for the config's own
    device: str | None  # None for a GPU if there is one
    launcher: str = 'none'  # or 'pytorch', 'slurm'
    measures: tuple[str, ...]  # in order
    keys: dict[str, str]  # of the records, by measurement
    pretraining: str | None  # of the backbone; None if neither the suite nor the paper states it
    shared: dict[str, Any]  # fields that all records of the row have in common

    @property
    def name(self) -> str:
        """The name in messages."""
        return f'{self.row.name} seed {self.seed}'

    @property
    def folder(self) -> Path:
        """Folder of all files that the row and seed write, except the records."""
        return self.work_dir / 'runs' / self.row.name / str(self.seed)

    @property
    def log(self) -> Path:
        """The file with the output of its processes."""
        return self.folder / 'log.txt'

    @property
    def results(self) -> Path:
        """The file of its records."""
        return results_file(self.work_dir, self.row.name, self.seed)

    @property
    def checkpoint(self) -> str | None:
        """The trained weights that the row names."""
        return self.row.checkpoint_of(self.seed)

    def subset(self, measures: tuple[str, ...], launcher: str = 'none') -> 'Task':
        """A copy with some of the measurements only."""
        return self.model_copy(update=dict(measures=measures, launcher=launcher))

    def record(
        self, measurement: str, started: datetime, environment: Mapping[str, Any], **content: Any
    ) -> dict[str, Any]:
        """A record of a measurement that ends now; ``content`` holds the fields that only the measurement knows."""
        return {
            **self.shared,
            **dict(
                version=VERSION,
                row=self.row.name,
                label=self.row.label,
                seed=self.seed,
                measurement=measurement,
                status='done',
                reason=None,
                values={},
                protocol={},
                facts={},
                files={},
                checkpoint=None,
                started=started.isoformat(timespec='microseconds'),
                seconds=round((utc_now() - started).total_seconds(), 3),
                environment=environment,
                key=self.keys[measurement],
                asked=list(self.keys),
            ),
            **content,
        }

    def append_failure(self, measurement: str, started: datetime, environment: Mapping[str, Any], reason: str) -> None:
        """Append the record of a measurement that failed."""
        record = self.record(measurement, started, environment, status='failed', reason=reason)
        records.append_record(record, self.results)

    def unfinished(self) -> tuple[str, ...]:
        """The measurements without a record for this definition of the row and these weights."""

        def is_done(record: Mapping[str, Any]) -> bool:
            measured, weights = (record['checkpoint'] or {}).get('sha256'), self.checkpoint
            known = weights and measured and Path(weights).exists()
            same = not known or hash_checkpoint(fetch_checkpoint(str(weights))) == measured
            return record['status'] == 'done' and record['key'] == self.keys.get(record['measurement']) and same

        done = {name for name, record in records.latest_records(self.results).items() if is_done(record)}
        return tuple(name for name in self.measures if name not in done)
