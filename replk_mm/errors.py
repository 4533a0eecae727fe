"""The one exception for mistakes a user can make, and how a command reports it."""
import functools
import os
import sys
from collections.abc import Callable

#: Exit status of a command that was given something it cannot use.
USER_ERROR_STATUS = 2


class UserError(Exception):
    """Something the user can mend: a path, a config field, a file's content.

    The first line of the message says what is wrong, where, and what was found; the following lines say what to do.
    Commands print it without a traceback and exit with :data:`USER_ERROR_STATUS`.
    """


def message_of(error: BaseException) -> str:
    """The user's text of ``error``, freed of the traceback that torch wraps around errors of its data workers."""
    text = str(error)
    marker = f'{UserError.__module__}.{UserError.__qualname__}: '
    return text.rsplit(marker, 1)[-1].strip() if text.startswith('Caught ') else text


def command(main: Callable[..., int | None]) -> Callable[..., int]:
    """Turn ``main`` into a command: user errors become one message and status 2, Ctrl-C status 130.

    ``REPLK_MM_TRACEBACK=1`` shows the traceback of a user error too, for those who debug the library.
    """

    @functools.wraps(main)
    def wrapped(*args, **kwargs) -> int:
        try:
            return main(*args, **kwargs) or 0
        except UserError as error:
            if os.environ.get('REPLK_MM_TRACEBACK') == '1':
                raise
            print(f'error: {message_of(error)}', file=sys.stderr)
            return USER_ERROR_STATUS
        except KeyboardInterrupt:
            print('interrupted', file=sys.stderr)
            return 130

    return wrapped
