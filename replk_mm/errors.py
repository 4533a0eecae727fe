"""User errors, and how commands report them."""

import contextlib
import difflib
import functools
import os
import re
import select
import shlex
import signal
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

#: Exit status after a user error.
USER_ERROR_STATUS = 2
#: Exit status of a training that a signal stopped and ``--resume`` continues: EX_TEMPFAIL of sysexits.h.
STOPPED_STATUS = 75
#: Exit status after the reader of the output has ended: 128 and SIGPIPE, as shells report it.
BROKEN_PIPE_STATUS = 141
#: Exit status after Ctrl-C.
INTERRUPTED_STATUS = 130


class UserError(Exception):
    """Something the user can fix: a path, a config field, a file's content.

    The first line of the message says what is wrong and where; the following lines say what to do. Commands print it
    without a traceback and exit with :data:`USER_ERROR_STATUS`. Control characters are escaped, because parts of the
    message may come from untrusted files. Configs of packages are named ``PACKAGE::NAME.py``.
    """

    def __init__(self, message: str = '') -> None:
        super().__init__(re.sub(r'[^\s\'"]*/(\w+)/\.mim/configs/', r'\1::', printable(message)))


def printable(text: str) -> str:
    """Escape control characters, and bytes of file names that are not UTF-8."""
    if text.replace('\n', '').replace('\t', '').isprintable():
        return text
    return ''.join(c if c.isprintable() or c in '\n\t' else ascii(c)[1:-1] for c in text)


def did_you_mean(name: object, choices: Iterable[str], cutoff: float = 0.6) -> str:
    """``'Did you mean X? '`` for a misspelled name, or ``''`` if no choice is close."""
    close = difflib.get_close_matches(str(name), list(choices), n=1, cutoff=cutoff)
    return f'Did you mean {close[0]}? ' if close else ''


def command_line(name: str, *arguments: object) -> str:
    """The shell command that runs one of this project's commands, in the form in which the current one was started.

    Args:
        name: Of the command, such as ``'test'``.
        *arguments: Its arguments; quoted for the shell where necessary. Shipped configs, ``'configs/NAME'``, are named
            ``'replk_mm::NAME'`` where the working directory has no such folder.

    Returns:
        ``'python tools/test.py ...'`` if this process runs a script of a checkout's ``tools/``, else
        ``'replk test ...'``.
    """
    program = Path(sys.argv[0])
    is_script = program.parent.name == 'tools' and program.suffix == '.py'
    start = ['python', program.with_name(f'{name}.py')] if is_script else ['replk', name]
    folder = 'configs/' if Path('configs').is_dir() else 'replk_mm::'
    return shlex.join(re.sub('^configs/', folder, str(part)) for part in (*start, *arguments))


def format_list(values: Iterable, limit: int = 5) -> str:
    """The first ``limit`` values, separated by commas, and their number if there are more."""
    texts = [str(value) for value in values]
    return ', '.join(texts[:limit]) + (f', ... ({len(texts):,})' if len(texts) > limit else '')


class Stopped(KeyboardInterrupt):
    """A signal stopped a training after its state was saved.

    Commands print it and exit with :data:`STOPPED_STATUS`, after Ctrl-C with :data:`INTERRUPTED_STATUS`.

    Attributes:
        signal: The signal.
        checkpoint: The checkpoint to resume from.
    """

    def __init__(self, number: signal.Signals, checkpoint: str) -> None:
        super().__init__(f'stopped by {number.name}; --resume continues from {checkpoint}')
        self.signal, self.checkpoint = number, checkpoint


def first_line(error: BaseException) -> str:
    """The first line of an error's text; of one without a text, its class and the line that raised it."""
    text = str(error).strip()
    for place in [] if text else traceback.extract_tb(error.__traceback__)[-1:]:
        text = f'{type(error).__name__} at {"/".join(Path(place.filename).parts[-2:])}:{place.lineno}: {place.line}'
    return (text or type(error).__name__).splitlines()[0]


def import_error(error: BaseException | None) -> str | None:
    """The first cause of ``error`` if it is a failed import: a missing package, or versions that do not fit."""
    cause = None
    while error is not None:
        # Any error in the body of a module: torchvision raises a RuntimeError if it was built for another torch.
        frames = (frame for frame, _ in traceback.walk_tb(error.__traceback__) if frame.f_code.co_name == '<module>')
        if isinstance(error, ImportError) or any(frame.f_globals.get('__spec__') for frame in frames):
            cause = first_line(error)
        error = error.__cause__ or error.__context__
    return cause


def install_advice() -> str:
    """What to do about a package that is missing or does not fit."""
    return f'Install the package, or a version that fits; {command_line("doctor")} lists the installed versions.'


@contextlib.contextmanager
def explain_errors(what: str, advice: str) -> Iterator[None]:
    """Turn any exception of a network into a user error.

    Args:
        what: The part that fails, and where.
        advice: How to fix it.

    Raises:
        UserError: With the first line of the error.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f'{what}: {first_line(error)}\n{advice} REPLK_MM_TRACEBACK=1 shows where it fails.') from error


def user_message(error: BaseException) -> str:
    """The message of ``error`` without the traceback that torch adds to errors of data workers."""
    text = str(error) or first_line(error)
    marker = f'{UserError.__module__}.{UserError.__qualname__}: '
    return text.rsplit(marker, 1)[-1].strip() if text.startswith('Caught ') else text


def _say(text: str) -> None:
    try:
        print(text, file=sys.stderr, flush=True)
    except OSError:  # the same Ctrl-C ended the program at the other end of the pipe; keep the exit status
        _discard_output(1, 2)


def _output_is_closed() -> bool:
    """Whether the reader of standard output, such as ``head``, has ended; what is left of the output is discarded."""
    poll = select.poll()
    poll.register(1, 0)  # errors are always reported
    closed = any(event & select.POLLERR for _, event in poll.poll(0))
    if closed:
        _discard_output(1)
    return closed


def _discard_output(*descriptors: int) -> None:
    null = os.open(os.devnull, os.O_WRONLY)
    for descriptor in descriptors:
        os.dup2(null, descriptor)


def _recorded(main: Callable[..., int | None]) -> Callable[..., int | None]:
    """Let torchrun's summary show the exceptions of ``main`` if torchrun started this process."""
    if 'TORCHELASTIC_ERROR_FILE' not in os.environ:
        return main
    from torch.distributed.elastic.multiprocessing.errors import record

    return record(main)


def command(main: Callable[..., int | None]) -> Callable[..., int]:
    """Turn ``main`` into a command.

    A user error prints one message and exits with 2, Ctrl-C with 130, another signal that stops a training with 75.

    ``REPLK_MM_TRACEBACK=1`` shows the traceback of a user error too.
    """

    @functools.wraps(main)
    def wrapped(*args, **kwargs) -> int:
        try:
            return _recorded(main)(*args, **kwargs) or 0
        except UserError as error:
            if os.environ.get('REPLK_MM_TRACEBACK') == '1':
                raise
            _say(f'error: {user_message(error)}')
            return USER_ERROR_STATUS
        except Stopped as stopped:
            if os.environ.get('RANK', '0') == '0':
                _say(str(stopped))
            return INTERRUPTED_STATUS if stopped.signal == signal.SIGINT else STOPPED_STATUS
        except KeyboardInterrupt:
            _say('interrupted')
            return INTERRUPTED_STATUS
        except BrokenPipeError:
            if not _output_is_closed():
                raise
            return BROKEN_PIPE_STATUS
        except Exception as error:
            failed = import_error(error)
            if not failed or os.environ.get('REPLK_MM_TRACEBACK') == '1':
                raise
            _say(f'error: a package cannot be imported: {failed}\n{install_advice()}')
            return USER_ERROR_STATUS

    return wrapped
