"""What of the log appears in the terminal: progress, results, and warnings that a user can act on.

Log files keep everything. mmengine's logger prints the whole config, the list of hooks and a line for each parameter;
mmseg and mmdet warn about their own defaults.
"""

import logging
import re
import sys
import warnings
from collections.abc import Iterable
from typing import TypeVar

from mmengine.logging import MMLogger
from rich.console import Console
from rich.progress import track

_T = TypeVar('_T')

#: Packages whose Python warnings concern their developers.
_UPSTREAM = re.compile(r'[\\/](mmcv|mmdet|mmengine|mmseg|pkg_resources|torch[\\/](autograd|functional|nn))[\\/.]')


def announce(message: str, level: int = logging.INFO) -> None:
    """Log a message and print it. Messages of ``mmengine.logging.print_log`` go to the log file only."""
    MMLogger.get_current_instance().log(level, message, extra={'terminal': True})


class Note(str):
    """A change or finding of a command that is printed, with a level of ``logging``; defaults to INFO."""

    level: int

    def __new__(cls, text: str, level: int = logging.INFO) -> 'Note':
        note = super().__new__(cls, text)
        note.level = level
        return note


def log_notes(notes: list[str]) -> None:
    """Log what a command has changed or found, a line each. Each :class:`Note` is printed, too."""
    for note in notes:
        level = note.level if isinstance(note, Note) else logging.INFO
        MMLogger.get_current_instance().log(level, note, extra={'terminal': isinstance(note, Note)})


def show_progress(items: Iterable[_T], what: str, total: int | None = None, show: bool = True) -> Iterable[_T]:
    """Iterate over ``items`` with a progress bar on standard error, if it is a terminal."""
    return track(items, what, total, console=Console(stderr=True), disable=not (show and sys.stderr.isatty()))


def _show_percent(record: logging.LogRecord) -> bool:
    """Show AP, a fraction in mmdetection's metrics, in percent in mmengine's lines of results."""
    if str(record.msg).startswith(('Iter(', 'Epoch(', 'The best checkpoint')):
        scores = r'((?:AP\S*|_precision): )(\d\.\d+)|(?<= )(\d\.\d+)(?= \S*(?:AP|_precision))'
        record.msg = re.sub(scores, lambda m: f'{m[1] or ""}{100 * float(m[2] or m[3]):.2f}', str(record.msg))
    return True


def limit_terminal(logger: MMLogger) -> MMLogger:
    """Print only announced messages and errors of a logger, without a time stamp. Its log file stays as it is."""
    logger.addFilter(_show_percent)
    for handler in logger.handlers:
        if not isinstance(handler, logging.FileHandler):
            handler.addFilter(lambda record: getattr(record, 'terminal', record.levelno >= logging.ERROR))
            handler.setFormatter(logging.Formatter('%(message)s'))
    return logger


def log_python_warnings() -> None:
    """Send Python's warnings to mmengine's logger. Warnings of upstream packages go to the log file only."""

    def show(message, category, filename, lineno, file=None, line=None) -> None:
        MMLogger.get_current_instance().warning(
            f'warning: {message} ({category.__name__}, {filename}:{lineno})',
            extra={'terminal': not _UPSTREAM.search(filename)},
        )

    warnings.showwarning = show
