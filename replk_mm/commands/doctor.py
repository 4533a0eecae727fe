"""Check the environment, and print what works and how to repair the rest."""

import argparse
import json

from replk_mm.environment import check_environment, format_report
from replk_mm.errors import command, command_line


@command
def main() -> int:
    parser = argparse.ArgumentParser(
        description='Check dependencies, compiled operators and the machine, and run a part of mmseg and of mmdet. '
        'Exit status 0 if segmentation and detection both work, else 1.',
        epilog=f'example: {command_line("doctor", "--json")} > environment.json',
    )
    parser.add_argument('--json', action='store_true', help='print the report as JSON instead of text')
    args = parser.parse_args()
    report = check_environment()
    print(json.dumps(report.to_dict(), indent=2) if args.json else format_report(report))
    return 0 if report.healthy else 1
