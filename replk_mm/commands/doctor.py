"""Print what this environment has, what works in it, and how to repair what does not."""

import argparse
import json

from replk_mm.environment import examine, format_report
from replk_mm.errors import command, command_line


@command
def main() -> int:
    """Parse, examine, print. Status 0 if segmentation and detection both work, else 1."""
    parser = argparse.ArgumentParser(
        description='Check versions, compiled operators, processors, memory and disk, and try what the project needs. '
        'Exit status 0 if segmentation and detection both work, else 1.',
        epilog=f'example: {command_line("doctor", "--json")} > environment.json',
    )
    parser.add_argument('--json', action='store_true', help='print the report as JSON instead of text')
    args = parser.parse_args()
    report = examine()
    print(json.dumps(report.as_dict(), indent=2) if args.json else format_report(report))
    return 0 if report.healthy else 1
