"""Choose a backbone for your images: plan a suite that fits a budget, run it, and say which one to take.

DIR has images and labels in the layout of ADE20K, Cityscapes or COCO (docs/data.md). Linear probes of pretrained
backbones come first; the rest of the budget fine-tunes the best of them. docs/choose.md explains the answer.
"""

import argparse
import math
import re
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import yaml

from replk_mm import cli
from replk_mm.bench import choose, records
from replk_mm.bench.answer import Limits, answer
from replk_mm.bench.costs import read_costs
from replk_mm.bench.report.field import render_field
from replk_mm.bench.report.load import METRICS, load_report
from replk_mm.bench.report.render import render_html, render_markdown
from replk_mm.bench.schema import Suite, read_suite
from replk_mm.bench.suites import plan
from replk_mm.bench.suites.runner import Settings, SuiteRunner
from replk_mm.bench.suites.task import Task, results_file
from replk_mm.deploy.artefact import read_manifest
from replk_mm.engine.process import prepare_work_dir, select_device
from replk_mm.engine.record import environment_info
from replk_mm.errors import UserError, command, command_line, printable
from replk_mm.files import write_output
from replk_mm.text import format_duration, text_table

#: In order with the lines of a suite.
say = partial(print, flush=True)


def duration(text: str) -> float:
    """An argparse type: seconds, from ``90s``, ``10min`` or ``2h``."""
    found = re.fullmatch(r'(\d+(?:\.\d+)?)(s|min|h)', text)
    if not found:
        raise argparse.ArgumentTypeError(f'{text!r} is not a duration such as 90s, 10min or 2h')
    return float(found[1]) * dict(s=1, min=60, h=3600)[found[2]]


def parse_args() -> argparse.Namespace:
    p = cli.parser(__doc__, 'choose --data-root data/mine --budget 2h --max-latency 50')
    p.add_argument('--data-root', required=True, type=Path, metavar='DIR', help='folder of the data set')
    p.add_argument('--task', choices=['segmentation', 'detection'], help='default: what the labels are for')
    cli.add_classes(p)
    p.add_argument('--backbones', nargs='+', metavar='NAME', help='default: a spread of the catalogue by size')
    p.add_argument('--metric', metavar='NAME', help='a class, mIoU, AP, AP_small, ... (default: mIoU or AP)')
    p.add_argument('--budget', type=duration, default='10min', metavar='TIME', help='such as 2h (default: %(default)s)')
    p.add_argument('--scratch', action='store_true', help='train from random weights instead')
    p.add_argument('--max-latency', type=float, metavar='MS', help='of an image')
    p.add_argument('--max-memory', type=float, metavar='MIB', help='of inference, beyond the loaded network')
    p.add_argument('--max-params', type=float, metavar='M', help='of the whole network as deployed, in millions')
    p.add_argument('--licence', choices=['permissive'], help='leave out weights that forbid commercial use')
    cli.add_costs(p)
    p.add_argument(
        '--artefacts',
        nargs='+',
        type=Path,
        default=[],
        metavar='DIR',
        help='with --resume: also compare folders of the command export, made from checkpoints of this run',
    )
    p.add_argument('--work-dir', type=Path, metavar='DIR', help='default: work_dirs/choose/NAME, after the data')
    p.add_argument('--resume', action='store_true', help='continue an interrupted run')
    p.add_argument('--device', metavar='D', help='cpu or cuda (default: a GPU if there is one)')
    args = p.parse_args()
    args.work_dir = args.work_dir or Path('work_dirs', 'choose', choose.slug(args.data_root.resolve().name) or 'data')
    args.suite = args.work_dir / 'suite.yaml'
    args.limits = Limits(args.max_latency, args.max_memory, args.max_params, bool(args.costs))
    args.begin = psutil.Process().create_time()
    args.start_up = time.time() - args.begin
    return args


def make_suite(args: argparse.Namespace, data: choose.Data) -> Suite | None:
    """Plan the first rows and write the suite; None if fewer than two backbones can be compared."""
    names = dict.fromkeys([*(args.backbones or choose.BACKBONES), *choose.CONTROLS])
    rows, missing = choose.find_weights(list(names), args.licence, args.scratch)
    if missing:
        lines = (f'{name}: {how}' for name, how in missing.items())
        say('left out without weights here; to add them, get', *lines, sep='\n  ')
    if len(rows) < 2:
        return None
    protocol = 'scratch' if args.scratch else 'head' if data.layout.task == 'detection' else 'linear'
    keys: dict[str, Any] = dict(measure=['metric', 'complexity', 'speed', 'memory'])
    trains = {} if protocol == 'linear' else dict(iterations=data.schedule)
    say(f'timing {len(rows)} backbones at {data.shape[0]}x{data.shape[1]}')
    costs = []
    for row in Suite.model_validate(choose.suite_content(data, protocol, rows, **keys, **trains)).rows:
        image, parameters, fit = choose.time_row(row, data, args.kind)
        slowest = args.max_latency if args.max_latency and not args.costs else math.inf
        if image * 1e3 / 1.5 <= slowest and parameters / 1e6 <= (args.max_params or math.inf):  # a first look
            costs.append(choose.row_cost(row.name, protocol, image, data, args.start_up, fit))
    if len(costs) < 2:
        raise UserError(f'{len(costs)} of {len(rows)} backbones are within the limits\nRaise them, or use --backbones.')
    left = args.budget - (time.time() - args.begin)
    planned = choose.fit_budget(costs, left, list(choose.CONTROLS), data.schedule if trains else 0)
    show_plan(planned, costs, left)
    keys |= dict(seeds=list(range(planned.seeds)), **(dict(iterations=planned.iterations) if trains else {}))
    chosen = [row for row in rows if row['name'] in planned.rows]
    return choose.write_suite(args.suite, choose.suite_content(data, protocol, chosen, **keys))


def continue_suite(args: argparse.Namespace, data: choose.Data) -> Suite:
    """Read the suite of an earlier run, whose rows stay."""
    suite = read_suite(args.suite)
    if Path(suite.data.root or '').resolve() != data.root:
        raise UserError(f'{args.suite}: compares backbones for {suite.data.root}\nChoose another --work-dir DIR.')
    if ignored := [name for name in ('backbones', 'classes', 'licence', 'scratch') if getattr(args, name)]:
        say(f'the rows of {args.suite} stay as they are: --{", --".join(ignored)} ignored')
    if suite.rows[0].protocol != 'linear':
        say('a larger --budget adds nothing to these trainings: for longer ones, choose another --work-dir')
    return suite


def show_plan(planned: choose.Plan, costs: list[choose.RowCost], budget: float) -> None:
    """Print the rows with their estimated times."""
    times = {cost.name: format_duration(cost.seconds(planned.seeds, planned.iterations)) for cost in costs}
    shown = [[name, took if name in planned.rows else 'not within the budget'] for name, took in times.items()]
    say(text_table([['row', 'estimated time'], *shown]))
    each = f' of {planned.iterations} iterations' if planned.iterations else ''
    total = f'about {format_duration(planned.seconds)} of {format_duration(max(0.0, budget))} left'
    say(f'{len(planned.rows)} rows, {planned.seeds} trainings each{each}: {total}; after a stop, --resume continues')
    if planned.seconds > budget:
        say('the budget is too small for a comparison: this is the least, two rows with two trainings each')


def run_rows(suite: Suite, args: argparse.Namespace) -> list[tuple[Task, str]]:
    """Run the rest of a suite, and measure the costs of a row with its first seed only; returns failures."""
    tasks = []
    for task in plan.remaining_tasks(suite, plan.SuiteOptions(args.work_dir, resume=True, device=args.device)):
        if task.seed != task.row.seeds[0]:
            keys = {name: key for name, key in task.keys.items() if name in ('train', 'metric')}
            task = task.model_copy(update=dict(keys=keys, measures=tuple(m for m in task.measures if m in keys)))
        tasks += [task] if task.measures else []
    tasks.sort(key=lambda task: task.seed)  # all rows can be compared as early as possible
    return SuiteRunner(Settings(), environment_info).run(tasks) if tasks else []


def add_finalists(suite: Suite, args: argparse.Namespace, data: choose.Data) -> Suite:
    """Plan the fine-tuning of two or three of the best linear probes, if the rest of the budget allows it."""
    suite_rows = {row.name for row in suite.rows if row.trains}
    here = {row.name: row for row in load_report([args.work_dir]).suites[0].rows}  # times of this machine
    report = load_report([args.work_dir], args.other_costs, args.metric).suites[0]
    found = answer(report, args.limits)
    rows = [r for r in (found.group.rows if found.group else ()) if r.figures['metric'].value is not None]
    rows = [r for r in rows if not args.limits.problem(r) and r.name in suite_rows][
        : min(3, max(2, len(found.candidates)))
    ]
    left = args.budget - sum(record['seconds'] for record in records.read_records([args.work_dir])[0])
    costs = []
    for row in rows:
        image = sum(r['values']['forms']['reparameterized']['median_ms'] for r in here[row.name].of('speed')[:1]) / 1e3
        costs.append(choose.row_cost(f'{row.name}-finetuned', 'finetune', image, data, args.start_up))
    if len(rows) < 2:
        return suite
    planned = choose.fit_budget(costs, left, most=data.schedule)
    if planned.seconds > left:
        minutes = math.ceil((args.budget - left + planned.seconds) / 60)
        say(f'fine-tuning the best is not within the budget; to add it: --resume --budget {minutes}min')
        return suite
    show_plan(planned, costs, left)
    content = yaml.safe_load(args.suite.read_text(encoding='utf-8'))
    training = dict(protocol='finetune', iterations=planned.iterations, learning_rates=list(choose.RATES))
    for row in content['rows'][:]:
        if f'{row["name"]}-finetuned' in planned.rows:
            names = dict(name=f'{row["name"]}-finetuned', label=f'{row["label"]}, fine-tuned')
            seeds = list(range(planned.seeds))  # of its own only if they differ: who adds seeds adds them to all rows
            own = {} if seeds == content['defaults']['seeds'] else dict(seeds=seeds)
            content['rows'].append({**row, **names, **training, **own})
    return choose.write_suite(args.suite, content)


def add_artefacts(suite: Suite, args: argparse.Namespace) -> Suite:
    """Add rows for the exported networks of ``--artefacts``."""
    content = yaml.safe_load(args.suite.read_text(encoding='utf-8'))
    content['rows'] += choose.artefact_rows(suite, args.work_dir, args.artefacts)
    return choose.write_suite(args.suite, content)


def answer_without_weights(args: argparse.Namespace, data: choose.Data, out: Path) -> list[str]:
    """Write a page of published results with latencies measured here; returns the sentences of the answer."""
    if ignored := [
        f'--{name.replace("_", "-")}' for name in ('backbones', 'max_memory', 'costs') if getattr(args, name)
    ]:
        say(f'published results of the catalogue answer: {", ".join(ignored)} ignored')
    say(f'timing backbones with published results at {data.shape[0]}x{data.shape[1]}')
    rows = choose.published_rows(data, args.kind, args.budget / 2, args.licence)
    slowest, largest = args.max_latency or math.inf, args.max_params or math.inf
    within = [row for row in rows if (row.milliseconds or 0) <= slowest and (row.parameters or 0) <= largest]
    machine = environment_info()
    device = machine['cpu' if args.kind == 'cpu' else 'gpu']
    where = f'{device}, 1x3x{data.shape[0]}x{data.shape[1]}, float32'
    sentences = choose.prior_answer(data.layout.task, within, f'on {where}')
    again = command_line('choose', '--data-root', args.data_root)
    title = f'Which backbone for {data.root.name}?'
    write_output(out / 'index.html', render_field(within, where, again, sentences, title))
    return sentences


def train_command(name: str, args: argparse.Namespace, data: choose.Data) -> str:
    """The command that trains the backbone of a row in full."""
    row = next(row for row in read_suite(args.suite).rows if row.name == name)
    words = ['configs/' + (data.layout.config if args.kind == 'cpu' else data.layout.full), '--backbone', row.backbone]
    words += ['--pretrained', row.pretrained] if row.pretrained else []
    if args.kind == 'cpu' and row.protocol != 'scratch':  # the small config's rate is for random weights
        done = records.latest_records(results_file(args.work_dir, name, row.seeds[0])).get('train', {})
        tried = [score for score in done.get('facts', {}).get('learning_rates') or () if score['value'] is not None]
        best = max(tried, key=lambda score: score['value'])['learning_rate'] if tried else choose.RATES[0]
        words += ['--cfg-options', 'recipe=common', f'optim_wrapper.optimizer.lr={best:g}']
    classes = data.classes if isinstance(data.classes, str) else ','.join(data.classes)
    words += ['--data-root', str(data.root), '--classes', classes, '--work-dir', str(args.work_dir / 'full')]
    return command_line('train', *words)


@command
def main() -> int:
    args = parse_args()
    args.kind, args.other_costs = select_device(args.device), read_costs(args.costs)
    if args.artefacts and not (args.resume and args.suite.exists()):
        raise UserError('--artefacts: compares networks exported from an earlier run\nAdd --resume and its --work-dir.')
    for folder in args.artefacts:
        read_manifest(folder)  # before the work begins
    if args.suite.exists() and not args.resume:
        raise UserError(f'{args.suite}: exists already\nContinue with --resume, or choose another --work-dir DIR.')
    out = prepare_work_dir(args.work_dir / 'report', option='--work-dir')
    data = choose.read_data(args.data_root, args.task, args.classes or 'auto')
    say(*map(printable, data.notes), sep='\n')
    known = [*data.names, *(METRICS if data.layout.task == 'detection' else ['mIoU'])]
    if args.metric and args.metric not in known:
        raise UserError(f'--metric {args.metric}: neither a class nor a metric\nKnown: {", ".join(known)}.')
    suite = continue_suite(args, data) if args.suite.exists() else make_suite(args, data)
    if suite is None:
        say('', *answer_without_weights(args, data, out), f'report: {out / "index.html"}', sep='\n')
        return 0
    failed = run_rows(suite, args)
    if all(row.protocol == 'linear' for row in suite.rows):
        suite = add_finalists(suite, args, data)
        failed += run_rows(suite, args)
    if args.artefacts:
        suite = add_artefacts(suite, args)
        failed += run_rows(suite, args)
    found = load_report([args.work_dir], args.other_costs, args.metric)
    write_output(out / 'index.html', render_html(found, [str(data.root)], args.limits))
    write_output(out / 'report.md', render_markdown(found, args.limits))
    for task, reason in failed:
        say(f'failed: {task.name}: {reason.splitlines()[0]} ({task.log})')
    again = command_line('choose', *(part for part in sys.argv[1:] if part != '--resume'), '--resume')
    result = answer(found.suites[0], args.limits, f'add seeds in {args.suite} and run {again}')
    say('', *map(printable, (result.verdict, *result.sentences)), sep='\n')
    chosen = next((row for row in suite.rows if row.name in result.candidates[:1]), None)  # the file may be edited
    if chosen:
        trains = f'train it in full: {train_command(chosen.name, args, data)}' if chosen.trains else None
        say(trains or f'it is in {chosen.checkpoint}')
    say(f'report: {out / "index.html"}; suite: {args.suite}')
    return 1 if failed else 0
