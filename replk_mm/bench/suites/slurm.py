"""Submit the tasks of a suite to Slurm, each as a job of one job array, through submitit."""

import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from replk_mm.bench.suites.runner import Settings, SuiteRunner, python_path
from replk_mm.bench.suites.task import Task
from replk_mm.errors import UserError, command, first_line


@dataclass(frozen=True)
class RowJob:
    """What a job runs each time that it starts: everything unfinished of a row and seed."""

    task: Task
    settings: Settings

    def __call__(self) -> None:
        """Run the task, and exit: with 1 if something failed."""
        sys.exit(command(self.run)())

    def run(self) -> bool:
        """Run the task; returns whether something failed."""
        from replk_mm.engine.record import environment_info  # imports torch

        left = self.task.unfinished()
        return bool(left and SuiteRunner(self.settings, environment_info).run([self.task.subset(left)]))

    def checkpoint(self) -> Any:
        """What submitit requeues before the time limit."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


def submit(tasks: Sequence[Task], processes: int, jobs: int | None, options: Mapping[str, str | None]) -> str:
    """Submit tasks as a job array; returns its job id.

    Args:
        tasks: From :func:`replk_mm.bench.suites.plan.remaining_tasks`.
        processes: For training and test of each task.
        jobs: Number of jobs that run at a time; None for no limit.
        options: Long options of sbatch, None for a flag: ``{'partition': 'gpu', 'exclusive': None}``. Time in minutes.

    Raises:
        UserError: If sbatch fails.
    """
    import submitit
    from submitit.core.utils import FailedJobError

    # `exec` and `B:` make Python the process that Slurm signals two minutes before the time limit. It does not run in
    # srun: one srun within another would wait for its CPUs.
    python = f'exec {shlex.quote(sys.executable)}'
    executor = submitit.SlurmExecutor(tasks[0].work_dir / 'slurm', max_num_timeout=20, python=python)
    executor.update_parameters(
        time=int(options.get('time') or 240),
        job_name=tasks[0].shared['suite'],
        setup=[f'export PYTHONPATH={shlex.quote(python_path())}'],
        stderr_to_stdout=True,
        use_srun=False,
        array_parallelism=jobs or len(tasks),
        additional_parameters={
            'ntasks': processes,
            'requeue': True,
            'signal': f'B:{submitit.JobEnvironment.USR_SIG}@120',
            **{key: True if value is None else value for key, value in options.items()},
        },
    )
    settings = Settings(launcher='slurm' if processes > 1 else 'none', processes=processes)
    try:
        return executor.submit_array([RowJob(task, settings) for task in tasks])[0].job_id.partition('_')[0]
    except FailedJobError as error:
        raise UserError(f'--launcher slurm: {first_line(error)}\nCorrect --slurm, and add --resume.') from error
