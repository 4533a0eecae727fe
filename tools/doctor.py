#!/usr/bin/env python3
"""Print what this environment has, what works in it, and how to repair what does not."""

import argparse
import json
import sys
from pathlib import Path

if sys.version_info < (3, 10):  # noqa: UP036 - whoever runs a doctor may run it with anything
    sys.exit(f'error: Python 3.10 or newer is needed, this is {sys.version.split()[0]}\nmake setup PYTHON=python3.11')

# Works in a Python where the package is not installed: that is one of the things to find out.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from replk_mm.environment import examine, format_report
from replk_mm.errors import command


@command
def main() -> int:
    """Parse, examine, print. Status 0 if segmentation and detection both work, else 1."""
    parser = argparse.ArgumentParser(
        description='Check versions, compiled operators, processors, memory and disk, and try what the project needs. '
        'Exit status 0 if segmentation and detection both work, else 1.',
        epilog='example: .venv/bin/python tools/doctor.py --json > environment.json',
    )
    parser.add_argument('--json', action='store_true', help='print the report as JSON instead of text')
    args = parser.parse_args()
    report = examine()
    print(json.dumps(report.as_dict(), indent=2) if args.json else format_report(report))
    return 0 if report.healthy else 1


if __name__ == '__main__':
    sys.exit(main())
