"""Send tasks of a suite to Slurm through submitit: a job array with one job a row and seed."""

import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import replk_mm
from replk_mm.bench.suites.runner import Settings, SuiteRunner
from replk_mm.bench.suites.task import Task
from replk_mm.errors import UserError, printable

if TYPE_CHECKING:
    from submitit.helpers import DelayedSubmission

#: Time limit of a job in minutes, after which it is requeued.
DEFAULT_MINUTES = 240
#: Time limits that a job may reach before it is not requeued.
_MAX_TIMEOUTS = 20
#: Seconds from submitit's signal to the time limit; Slurm may send it up to a minute early.
_SECONDS_TO_SAVE = 120


@dataclass(frozen=True)
class RowJob:
    """The job of a row and seed. It may start several times: each time, it continues what is unfinished."""

    task: Task
    settings: Settings

    def __call__(self) -> None:
        """Run the task; exits with 1 if something failed."""
        from replk_mm.engine.record import environment_info  # imports torch

        left = self.task.unfinished()
        if left and SuiteRunner(self.settings, environment_info).run([self.task.subset(left)]):
            sys.exit(1)

    def checkpoint(self) -> 'DelayedSubmission':
        """What submitit queues before the time limit: the same again."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


def submit(
    tasks: Sequence[Task], processes: int = 1, jobs: int | None = None, options: Mapping[str, str | None] | None = None
) -> str:
    """Submit tasks as a job array; returns its job id.

    Args:
        tasks: From :func:`replk_mm.bench.suites.plan.remaining_tasks`.
        processes: For training and test of each task, started with ``srun`` if there are several. Defaults to 1.
        jobs: Number of jobs that run at a time. Defaults to None: no limit.
        options: Long options of sbatch, such as ``{'partition': 'gpu', 'exclusive': None}``; ``time`` in minutes.

    Raises:
        UserError: If sbatch rejects the options.
    """
    import submitit
    from submitit.core.utils import FailedJobError

    options = dict(options or {})
    minutes = int(options.pop('time', None) or DEFAULT_MINUTES)
    path = os.pathsep.join(filter(None, [str(Path(replk_mm.__file__).parents[1]), os.environ.get('PYTHONPATH')]))
    folder = tasks[0].work_dir / 'slurm'
    # `exec` and `B:` let Python, in the place of the batch script, receive the signal and save before it exits.
    executor = submitit.SlurmExecutor(folder, _MAX_TIMEOUTS, python=f'exec {shlex.quote(sys.executable)}')
    executor.update_parameters(
        time=minutes,
        job_name=tasks[0].shared['suite'],
        setup=[f'export PYTHONPATH={shlex.quote(path)}'],
        stderr_to_stdout=True,
        use_srun=False,  # srun within a job step would wait for the CPUs of that step
        array_parallelism=jobs or len(tasks),
        additional_parameters=dict(
            ntasks=processes,
            requeue=True,
            signal=f'B:{submitit.JobEnvironment.USR_SIG}@{_SECONDS_TO_SAVE}',
            **{key: True if value is None else value for key, value in options.items()},
        ),
    )
    settings = Settings(launcher='slurm' if processes > 1 else 'none', processes=processes)
    try:
        return executor.submit_array([RowJob(task, settings) for task in tasks])[0].job_id.partition('_')[0]
    except FailedJobError as error:
        raise UserError(
            f'--launcher slurm: sbatch failed: {printable(str(error)).strip()}\n'
            'Correct --slurm KEY=VALUE, and submit again with --resume.'
        ) from error
