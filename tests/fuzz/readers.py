"""Who reads data from outside, and the hostile input for each: ``READERS``."""
import functools
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fuzz import checkpoint_files, checkpoints, data, results, typed
from fuzz.guard import Guard
from fuzz.mutate import Build, changed_json


@dataclass(frozen=True)
class Reader:
    """A reader and what it is given.

    Attributes:
        prepare: Makes the function that reads, given the scratch folder and the file that the input goes to.
        inputs: Makes what makes an input of choices.
        memory: Most that an execution may take, bytes.
        seconds: Longest execution.
    """

    prepare: Callable[[Path, Path], Callable[[], object]]
    inputs: Callable[[], Build]
    memory: int = 256 << 20
    seconds: float = 5

    @functools.cached_property
    def build(self) -> Build:
        """Of the input for choices."""
        return self.inputs()


def scratch_of(pid: int) -> Path:
    """The folder that a process writes its input to, in memory where there is such a place."""
    place = Path('/dev/shm')
    return (place if os.access(place, os.W_OK) else Path(tempfile.gettempdir())) / f'fuzz.{pid}'


def last_input(pid: int) -> Path:
    """The input that a process has read last."""
    return scratch_of(pid) / 'input'


def executor(reader: Reader) -> Callable[[bytes], str]:
    """A function that runs a reader once, and says what came of it."""
    folder = scratch_of(os.getpid())
    folder.mkdir(parents=True, exist_ok=True)
    file = last_input(os.getpid())
    read = reader.prepare(folder, file)
    guard = Guard(folder, reader.seconds, reader.memory)

    def execute(data: bytes) -> str:
        file.write_bytes(data)
        return guard.run(lambda _: read(), data)

    return execute


def clean(pid: int) -> None:
    """Remove what a process has written."""
    shutil.rmtree(scratch_of(pid), ignore_errors=True)


READERS: dict[str, Reader] = {
    'checkpoints': Reader(checkpoints.prepare, lambda: checkpoint_files.spoiled),
    'records': Reader(results.lines, results.record_files),
    'report': Reader(results.report, results.record_files),
    'results': Reader(results.results, lambda: changed_json([results.a_result()])),
    'detections': Reader(results.detections, lambda: changed_json([results.some_detections()])),
    'fields': Reader(results.fields, lambda: changed_json([results.a_field()])),
    'annotations': Reader(data.annotations, data.annotation_files),
    # An image of the largest size that is let through has half a gigabyte, and is copied.
    'images': Reader(data.images, data.image_files, memory=3 << 30, seconds=20),
    'overrides': Reader(typed.overrides, typed.options),
    'suites': Reader(typed.suites, typed.suite_files)}
