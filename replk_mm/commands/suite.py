"""Run a suite of experiments: train and measure each row in a process of its own.

Each measurement appends a record to WORK_DIR/results. --resume continues after a stop, a kill or a failure: it keeps
finished measurements, continues a training from its last checkpoint, and repeats failures. docs/suites.md shows how to
write a suite and how to spread it over machines.
"""

import argparse
import os
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

from replk_mm import cli
from replk_mm.bench.answer import answer
from replk_mm.bench.report.load import load_report
from replk_mm.bench.report.render import render_text
from replk_mm.bench.schema import Suite, read_suite
from replk_mm.bench.suites import plan
from replk_mm.bench.suites.runner import Settings, SuiteRunner
from replk_mm.bench.suites.slurm import submit
from replk_mm.engine.config import resolve_config_path
from replk_mm.engine.process import prepare_work_dir
from replk_mm.errors import UserError, command, command_line, printable


def names(text: str) -> list[str]:
    """Comma-separated names, for argparse."""
    parts = [name.strip() for name in text.split(',') if name.strip()]
    if not parts:  # an unset variable must not select all rows
        raise argparse.ArgumentTypeError(f'{text!r} names no row')
    return parts


def slurm_option(text: str) -> tuple[str, str | None]:
    """``KEY=VALUE``, or the ``KEY`` of a flag, for argparse."""
    key, equals, value = text.removeprefix('--').partition('=')
    if key == 'time' and not (value.isdecimal() and int(value)):
        raise argparse.ArgumentTypeError(f'{text!r}: time is a number of minutes, such as time=240')
    return key, value if equals else None


@command
def main() -> int:
    p = cli.parser(__doc__, 'suite configs/suites/demo.yaml --jobs 2')
    p.add_argument('suite', help='suite file (YAML), or replk_mm::suites/NAME.yaml')
    p.add_argument(
        '--only',
        type=names,
        default=[],
        metavar='ROWS',
        help="only these rows: names, patterns such as 'replk-*', or numbers of --list, separated by commas",
    )
    p.add_argument('--resume', action='store_true', help='keep finished measurements, repeat failures')
    p.add_argument('--list', action='store_true', help='print number, row, seed and state, and exit')
    p.add_argument('--work-dir', type=Path, metavar='DIR', help='output folder (default: work_dirs/suites/NAME)')
    p.add_argument(
        '--data-root',
        metavar='DIR',
        help='folder of the data set of all rows (default: as in the suite or the configs)',
    )
    cli.add_classes(p)
    p.add_argument(
        '--jobs',
        type=cli.positive_int,
        metavar='N',
        help='run N rows at a time (default: 1, as Slurm jobs: all); speed and memory come last, one row at a time',
    )
    p.add_argument(
        '--launcher',
        choices=['none', 'pytorch', 'slurm'],
        default='none',
        help='train and test each row with torchrun or srun; outside of an allocation, slurm submits each as a job',
    )
    p.add_argument(
        '--slurm',
        type=slurm_option,
        nargs='+',
        default=[],
        metavar='KEY=VALUE',
        help='options of sbatch for the submitted jobs, such as partition=gpu gpus=1 time=240 (minutes)',
    )
    p.add_argument(
        '--nproc', type=cli.positive_int, default=1, metavar='N', help='number of processes per row, with --launcher'
    )
    p.add_argument('--device', metavar='D', help='cpu or cuda (default: a GPU if there is one)')
    args = p.parse_args()
    if args.nproc > 1 and args.launcher == 'none':
        raise UserError(f'--nproc {args.nproc}: needs a launcher\nAdd --launcher pytorch or --launcher slurm.')
    submits = args.launcher == 'slurm' and 'SLURM_JOB_ID' not in os.environ
    if args.slurm and not submits:
        raise UserError('--slurm: has an effect only with --launcher slurm, outside of an allocation\nRemove it.')
    if args.launcher == 'slurm' and not args.list:
        if not shutil.which('srun'):
            raise UserError('--launcher slurm: there is no srun here\nRun it on a machine of the cluster.')
        if submits and not find_spec('submitit'):
            raise UserError('--launcher slurm: submits through submitit, which is missing\npip install submitit')
    suite = read_suite(resolve_config_path(args.suite))
    work_dir = args.work_dir or Path('work_dirs', 'suites', suite.name)
    if args.list:
        shown = [(row.name, seed) for row, seed in plan.select_rows(suite, args.only)]
        width = max(len(name) for name, _ in shown)
        for number, row, seed, state in plan.row_states(suite, work_dir):
            if (row.name, seed) in shown:
                print(f'{number:4}  {row.name:{width}}  {seed:4}  {printable(state)}')
        return 0
    options = plan.SuiteOptions(work_dir, args.resume, args.only, args.data_root, args.classes, args.device)
    try:
        failed = _run(suite, options, args, submits)
    except KeyboardInterrupt:
        again = [part for part in sys.argv[1:] if part != '--resume']
        print(f'\ninterrupted; continue with: {command_line("suite", *again, "--resume")}', file=sys.stderr)
        return 130
    return 1 if failed else 0


def _run(suite: Suite, options: plan.SuiteOptions, args: argparse.Namespace, submits: bool) -> bool:
    """Run or submit the remaining rows, and print a summary; returns whether something failed."""
    prepare_work_dir(options.work_dir)
    tasks = plan.remaining_tasks(suite, options)
    done = len(plan.select_rows(suite, options.only)) - len(tasks)
    print(
        f'{suite.name}, rows and seeds: {len(tasks)} to do{f", {done} done before" if done else ""}; '
        f'results go to {options.work_dir}',
        file=sys.stderr,
        flush=True,
    )
    if submits and tasks:
        job = submit(tasks, args.nproc, args.jobs, dict(args.slurm))
        print(f'submitted as Slurm job {job}; output goes to {options.work_dir / "slurm"}')
        print(f'states: {command_line("suite", args.suite, "--work-dir", options.work_dir, "--list")}')
        return False
    from replk_mm.engine.record import environment_info  # imports torch

    failed = SuiteRunner(Settings(args.jobs or 1, args.launcher, args.nproc), environment_info).run(tasks)
    found = load_report([options.work_dir])
    for part in found.suites:
        again = f'set seeds in {suite.path} and run {command_line("suite", suite.path, "--resume")}'
        print(f'\n{render_text(part)}\n\n{printable(answer(part, command=again).text)}')
    if failed:
        print(f'\n{len(failed)} failed; --resume tries them again:')
        for task, reason in failed:
            print(f'  {task.name}: ' + printable(reason).replace('\n', '\n      '))
    print(f'\nwritten: {options.work_dir / "results"}')
    roots = [argument for root in found.data_roots() for argument in ('--data-root', root)]
    print(f'report:  {command_line("report", options.work_dir, *roots, "--out", options.work_dir / "report")}')
    return bool(failed)
