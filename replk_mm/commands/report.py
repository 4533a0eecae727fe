"""Report the results of suites: one self-contained HTML page, and its tables as Markdown.

RESULTS are work directories of suites (work_dirs/suites/NAME), folders of results or .jsonl files. Only rows
under the same protocol are ranked together; figures that were not measured are shown as missing.
"""

import shlex
import sys
from pathlib import Path

from replk_mm import cli
from replk_mm.bench.answer import answer
from replk_mm.bench.costs import read_costs
from replk_mm.bench.report.load import SKIPPED_STATUS, load_report
from replk_mm.bench.report.render import render_html, render_markdown, render_suite_tables
from replk_mm.errors import command, printable
from replk_mm.files import write_output
from replk_mm.text import update_page

STATUSES = f"""
exit status:
  0  written
  2  nothing was written: the results do not exist or hold no record, or the output folder is not writable
  {SKIPPED_STATUS}  written, but some records were skipped: damaged, of an unknown version, or of an earlier
     definition of their row; the output and the page list them
"""


@command
def main() -> int:
    p = cli.parser(__doc__, 'report work_dirs/suites/kernel_size --out report/')
    p.epilog = f'{p.epilog}\n{STATUSES}'
    p.add_argument('results', nargs='+', metavar='RESULTS', help='work dir, folder or .jsonl file')
    cli.add_out(p, 'output folder for index.html and report.md')
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
        help='also show images of this data set; repeatable (default: only data in the work dirs themselves)',
    )
    cli.add_costs(p)
    args = p.parse_args()
    found = load_report(args.results, read_costs(args.costs))
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
