"""Runs a reader on hostile input and notices what it must not do: run code, write, crash, hang, take memory.

The contract of every reader: it returns, or raises ``UserError`` with a message that any terminal can show.
"""

import codecs
import contextlib
import os
import re
import resource
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from replk_mm.errors import UserError

#: Longest message, characters.
LONGEST = 20_000
#: Events of the interpreter that reading data has no need for; of `open` those count that write outside of the scratch folder.
_FORBIDDEN = re.compile(
    r'os\.(system|exec|posix_spawn|spawn|fork|forkpty|startfile|kill|putenv|unsetenv|chmod|chown|link|symlink|truncate|'
    r'mkdir|rename|remove|rmdir)|subprocess\.|socket\.|shutil\.|pty\.|webbrowser\.|ftplib\.|smtplib\.|urllib\.|'
    r'pickle\.find_class|marshal\.loads|ctypes\.dlopen|exec|compile|import|code\.__new__|function\.__new__|tempfile\.'
)
_ENCODINGS = (
    'utf-16', 'utf-16-le', 'utf-16-be', 'utf-32', 'utf-32-le', 'utf-32-be', 'utf-8-sig', 'raw-unicode-escape',
    'unicode-escape', 'latin-1', 'cp437', 'punycode', 'idna')
_active: 'Guard | None' = None
_hooked = False


class Failure(BaseException):
    """A reader broke its contract. Not an ``Exception``: readers turn those into messages."""


class Guard:
    """Limits for one execution after the other.

    Args:
        scratch: Folder that may be written to.
        seconds: Longest execution.
        memory: Most that the process may grow in one execution, bytes.
    """

    def __init__(self, scratch: Path, seconds: float = 5, memory: int = 256 << 20) -> None:
        self.scratch, self.seconds, self.memory = str(scratch), seconds, memory
        self.events: list[str] = []
        with contextlib.suppress(OSError):  # what was needed before would hide what is needed now; only Linux forgets
            Path('/proc/self/clear_refs').write_text('5')
        global _hooked
        for name in _ENCODINGS:  # what is imported at need is imported before
            codecs.lookup(name)
        if not _hooked:
            sys.addaudithook(_audit)
            _hooked = True

    def run(self, reader: Callable[[bytes], object], data: bytes) -> str:
        """Run a reader on data.

        Returns:
            ``'accepted'``, or the kind of refusal.

        Raises:
            Failure: If it broke its contract.
        """
        global _active
        before, self.events = peak(), []
        previous = signal.signal(signal.SIGALRM, _too_long)
        signal.setitimer(signal.ITIMER_REAL, self.seconds)
        _active = self
        try:
            reader(data)
            outcome = 'accepted'
        except UserError as error:
            outcome = _kind(str(error))
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            raise Failure(
                f'{type(error).__name__} instead of a message: {str(error)[:300]} ({where.filename}:{where.lineno}, '
                f'{where.line})'
            ) from error
        finally:
            _active = None
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, previous)
        if self.events:
            raise Failure(f'it did what reading needs not: {self.events[:5]}')
        if (more := peak() - before) > self.memory:
            raise Failure(f'{more >> 20:,} MiB more memory than before')
        return outcome


def _too_long(number: int, frame: object) -> None:
    raise Failure('it takes too long')


def peak() -> int:
    """Most memory that this process has had, since there is a guard, bytes."""
    try:
        status = Path('/proc/self/status').read_text()
    except OSError:  # not Linux
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    # ru_maxrss begins with what the process that started this one once had, which hides what is below.
    return int(status.partition('VmHWM:')[2].split(maxsplit=1)[0]) * 1024


def _audit(event: str, arguments: tuple) -> None:
    guard = _active
    if guard is None:
        return
    if event == 'open':
        path, mode, flags = arguments
        if (flags or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) and not str(path).startswith((guard.scratch, '/dev/null')):
            guard.events.append(f'open {path!r} {mode}')
    elif event == 'compile' and arguments[1] == '<unknown>':
        pass  # ast.parse: running it would be an event of its own
    elif _FORBIDDEN.match(event):
        guard.events.append(f'{event} {str(arguments)[:200]}')


def _kind(message: str) -> str:
    if len(message) > LONGEST:
        raise Failure(f'a message of {len(message):,} characters: {message[:200]}')
    if any(not (c.isprintable() or c in '\n\t') for c in message):
        raise Failure(f'a message with characters that a terminal obeys: {message!r:.300}')
    if not message.strip():
        raise Failure('an empty message')
    first = re.sub(r'\S*/\S+', 'FILE', message.splitlines()[0][:160])
    first = re.sub(r"'[^']*'|\"[^\"]*\"", '_', first)
    return re.sub(r'\d[\d,.]*', 'N', first)[:70]
