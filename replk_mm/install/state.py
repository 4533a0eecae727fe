"""What set-up remembers between its runs, and that there is one run at a time."""
import fcntl
import json
from pathlib import Path
from typing import Any, TextIO


def alone(folder: Path) -> TextIO:
    """An open file whose lock one process holds at a time; waits for another one, and says so."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = (folder / 'lock').open('w')
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print('another set-up of this clone is running: waiting for it', flush=True)
        fcntl.flock(lock, fcntl.LOCK_EX)
    return lock


def read_json(path: Path) -> Any:
    """What :func:`write_json` wrote; an empty dict if there is nothing or it is torn."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}


def write_json(path: Path, content: dict) -> None:
    """Write at once: readers see the old file or the whole new one."""
    part = path.with_suffix('.part')
    part.write_text(json.dumps(content))
    part.replace(path)
