"""Report the results of suites: one self-contained HTML page, and its tables as Markdown.

RESULTS are work directories of suites (work_dirs/suites/NAME), folders of results or .jsonl files. Only rows
under the same protocol are ranked together; figures that were not measured are shown as missing.
"""

import argparse
import shlex
import sys
from pathlib import Path

from replk_mm import cli
from replk_mm.bench.answer import answer
from replk_mm.bench.costs import read_costs
from replk_mm.bench.records import record_files
from replk_mm.bench.report.load import SKIPPED_STATUS, load_report, read_results
from replk_mm.bench.report.render import render_html, render_markdown, render_suite_tables
from replk_mm.bench.rescore import rescore
from replk_mm.bench.submission import SUFFIX, open_submissions, pack
from replk_mm.errors import UserError, command, printable
from replk_mm.files import check_outputs, write_output
from replk_mm.text import update_page

STATUSES = f"""
exit status:
  0  written; with --rescore, every metric is reproduced
  1  with --rescore: a metric differs, or cannot be recomputed
  2  nothing was written: the results do not exist or hold no record, or the output is not writable
  {SKIPPED_STATUS}  as 0, but some records were skipped: damaged, of an unknown version, or of an earlier
     definition of their row; the output and the page list them
"""


@command
def main() -> int:
    p = cli.parser(__doc__, 'report work_dirs/suites/kernel_size --out report/')
    p.epilog = f'{p.epilog}\n{STATUSES}'
    p.add_argument('results', nargs='+', metavar='RESULTS', help='work dir, folder, .jsonl file or archive of --pack')
    action = p.add_mutually_exclusive_group(required=True)
    action.add_argument('--out', metavar='DIR', help='output folder for index.html and report.md')
    action.add_argument(
        '--rescore', action='store_true', help='recompute each metric from predictions and labels (see --data-root)'
    )
    action.add_argument('--pack', metavar='FILE.zip', help='write the results to an archive that others can check')
    cli.add_overwrite(p)
    p.add_argument(
        '--page',
        metavar='FILE',
        help='also update the tables in this Markdown page, between <!-- SUITE:begin --> and <!-- SUITE:end -->',
    )
    p.add_argument(
        '--data-root',
        action='append',
        default=[],
        metavar='DIR',
        help='also show images, or read labels, of this data set; repeatable (default: only data in the work dirs)',
    )
    p.add_argument('--metric', metavar='NAME', help='rank rows by it: a class, AP_small, ... (default: mIoU or AP)')
    cli.add_costs(p)
    args = p.parse_args()
    unused = dict(out=(), rescore=('page', 'costs', 'metric'), pack=('page', 'costs', 'metric', 'data_root'))
    for option in next(names for name, names in unused.items() if getattr(args, name)):
        if getattr(args, option):
            p.error(f'--{option.replace("_", "-")} is for the page of --out')
    if args.pack:
        return pack_results(args)
    with open_submissions(args.results) as args.results:
        return rescore_results(args) if args.rescore else write_report(args)


def pack_results(args: argparse.Namespace) -> int:
    archive = Path(args.pack)
    if archive.suffix.lower() != SUFFIX:
        raise UserError(f'--pack {archive}: expected a name that ends with {SUFFIX}')
    check_outputs([archive], inputs=record_files(args.results), overwrite=args.overwrite)
    print(f'written: {archive}, {pack(args.results, archive):,} files')
    return 0


def rescore_results(args: argparse.Namespace) -> int:
    found, complaints = read_results(args.results)
    same = []
    for one in rescore(found, args.data_root):
        print(printable(str(one)), flush=True)
        same.append(not one.differences)
    for complaint in complaints:
        print(f'skipped: {complaint}', file=sys.stderr)
    if not same:
        raise UserError('no record of a metric, so that there is nothing to recompute\nName results of a test.')
    return SKIPPED_STATUS if all(same) and complaints else int(not all(same))


def write_report(args: argparse.Namespace) -> int:
    found = load_report(args.results, read_costs(args.costs), args.metric)
    out = cli.prepare_out(args, 'index.html', 'report.md')
    for name, text in (('index.html', render_html(found, args.data_root)), ('report.md', render_markdown(found))):
        write_output(Path(out, name), text)
        print(f'written: {Path(out, name)}')
    for part in found.suites:
        print(printable(f'{part.name}: {answer(part).text}'))
    for folder in map(str, sorted(found.outside)):
        print(
            f'index.html shows no images of {printable(folder)}, which is outside of the results; if these are your '
            f'data: --data-root {printable(shlex.quote(folder))}'
        )
    for suite in found.suites if args.page else ():
        update_page(Path(args.page), suite.name, render_suite_tables(suite))
        print(f'{args.page}: block {suite.name} updated')
    for complaint in found.complaints:
        print(f'skipped: {complaint}', file=sys.stderr)
    return SKIPPED_STATUS if found.complaints else 0
