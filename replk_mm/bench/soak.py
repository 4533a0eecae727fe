"""Train, kill, resume and test again and again at random points, and see that nothing is ever lost."""
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from replk_mm import checkpoints
from replk_mm.errors import INTERRUPTED_STATUS, STOPPED_STATUS, UserError

TOOLS = Path(__file__).resolve().parents[2] / 'tools'
#: Signals, and the status with which a training that has begun must end of each.
_STATUS = {signal.SIGKILL: -signal.SIGKILL, signal.SIGTERM: STOPPED_STATUS, signal.SIGINT: INTERRUPTED_STATUS}
#: What disks and crashes leave behind, done to a work directory between two runs.
_HARM = ('nothing', 'nothing', 'last checkpoint cut off', 'record of the last checkpoint empty', 'half a file left')


@dataclass
class Soak:
    """What a soak did.

    Attributes:
        counts: How often what was done, by name.
        losses: What was lost, a line each; empty if all is well.
    """

    counts: Counter = field(default_factory=Counter)
    losses: list[str] = field(default_factory=list)


class Soaker:
    """Runs one training over and over, each time interrupted elsewhere, and compares its end with one that was not.

    Args:
        command: Arguments of tools/train.py: the config and its options, without work directory and seed.
        folder: For the runs.
        seed: Of where and how runs are interrupted.
        say: Called with a line for everything that is done.
    """

    def __init__(self, command: list[str], folder: Path, seed: int, say: Callable[[str], None] = print) -> None:
        self.command, self.folder, self.say = command, folder, say
        self.random = random.Random(seed)
        self.done = Soak()
        self.straight, self.work = folder / 'straight', folder / 'interrupted'
        self.log = folder / 'log.txt'
        self.harmed: dict[Path, int] = {}

    def run(self, seconds: float) -> Soak:
        """Soak for a time, and until one interrupted training is compared; what is under way at its end is finished.

        Args:
            seconds: How long, the uninterrupted run included.

        Raises:
            UserError: If the uninterrupted run or its test fails.
        """
        started = time.monotonic()
        end = started + seconds
        status = self._train(self.straight)
        whole = time.monotonic() - started
        if status:
            raise UserError(f'the run that nothing interrupts ends with status {status}\nIts messages are in {self.log}.')
        self.reference = _checkpoints(self.straight)[-1]
        self.score = self._test(self.straight)
        self.say(f'uninterrupted: {self.reference.name}, {self.score}; {whole:.0f} s')
        while not self.done.losses and (time.monotonic() < end or not self.done.counts['compared']):
            self._one_training(whole, end)
        return self.done

    def _one_training(self, whole: float, end: float) -> None:
        shutil.rmtree(self.work, ignore_errors=True)
        self.harmed.clear()
        before, status = 0, 1
        while status and not self.done.losses:
            # The last one is let through, so that its result can be compared; one at least is not.
            interrupt = time.monotonic() < end or not any(self.done.counts[number.name] for number in _STATUS)
            number = self.random.choice(list(_STATUS)) if interrupt else None
            status = self._train(self.work, number, self.random.uniform(.3, 1.) * whole)
            reached = self._iteration()
            what = f'{number.name} at iteration {reached}' if number and status else f'ended at iteration {reached}'
            self.done.counts[number.name if number and status else 'trained to the end'] += 1
            self.say(f'{what} (status {status})')
            # A signal that comes before training listens to it ends the process as it ends any.
            if status and (number is None or status not in (_STATUS[number], -number)):
                self._lost(f'{what}: ended with status {status}; its messages are in {self.log}')
            if reached < before:
                self._lost(f'{what}: there was a checkpoint of iteration {before}')
            before = self._harm(reached) if status else reached
        if not self.done.losses:
            self._compare()

    def _train(self, work: Path, number: signal.Signals | None = None, delay: float = 0.) -> int:
        resume = ['--resume'] if work == self.work else []
        with self.log.open('a') as log:
            process = subprocess.Popen([sys.executable, str(TOOLS / 'train.py'), *self.command, '--work-dir', str(work),
                                        '--seed', '0', *resume], stdout=log, stderr=log, start_new_session=True)
            try:
                if number is not None:
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        return process.wait(delay)
                    process.send_signal(number)
                return process.wait()
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)

    def _iteration(self) -> int:
        """How far the newest checkpoint is; all of them must be whole, but for those that were harmed since."""
        found = [0]
        for path in _checkpoints(self.work):
            if self.harmed.get(path) == path.stat().st_mtime_ns:
                continue
            try:
                found.append(checkpoints.read(path)['meta']['iter'])
            except Exception as error:
                self._lost(f'{path}: cannot be read, and was not harmed: {str(error).splitlines()[0]}')
        return max(found)

    def _harm(self, reached: int) -> int:
        """Do to the work directory what may happen to one; returns the iteration that must be reached again."""
        kind, files = self.random.choice(_HARM), _checkpoints(self.work)
        if kind == 'last checkpoint cut off' and len(files) > 1:
            files[-1].write_bytes(files[-1].read_bytes()[:1000])
            self.harmed[files[-1]] = files[-1].stat().st_mtime_ns
            reached = self._iteration()
        elif kind == 'record of the last checkpoint empty' and files:
            (self.work / 'last_checkpoint').write_text('')
        elif kind == 'half a file left' and files:
            (self.work / 'iter_999.pth.part').write_bytes(files[-1].read_bytes()[:1000])
        else:
            return reached
        self.done.counts[kind] += 1
        self.say(f'  {kind}')
        return reached

    def _test(self, work: Path) -> dict[str, float]:
        out = work / 'test'
        config, *options = self.command
        kept = [*_option(options, '--data-root'), *_option(options, '--device'), *_option(options, '--cfg-options')]
        with self.log.open('a') as log:
            done = subprocess.run([sys.executable, str(TOOLS / 'test.py'), config, str(_checkpoints(work)[-1]),
                                   '--out', str(out), '--work-dir', str(out), *kept], stdout=log, stderr=log, check=False)
        if done.returncode:
            raise UserError(f'the test of {work} ends with status {done.returncode}\nIts messages are in {self.log}.')
        return json.loads((out / 'metrics.json').read_text())['metrics']

    def _compare(self) -> None:
        last = _checkpoints(self.work)[-1]
        one, other = checkpoints.read(self.reference), checkpoints.read(last)
        for key in ('state_dict', 'optimizer', 'param_schedulers'):
            if not _same(one[key], other[key]):
                self._lost(f'{last}: {key} differs from that of the run without interruption')
        try:
            score = self._test(self.work)
        except UserError as error:
            return self._lost(str(error))
        if not _same(_figures(self.score), _figures(score)):
            self._lost(f'metrics {score} instead of {self.score}')
        self.done.counts['compared'] += 1
        self.say('  the same bits and metrics as without interruption')

    def _lost(self, what: str) -> None:
        self.done.losses.append(what)
        self.say(f'LOST: {what}')


def _checkpoints(work: Path) -> list[Path]:
    return sorted(work.glob('iter_*.pth'), key=lambda path: int(path.stem.partition('_')[2]))


def _figures(metrics: dict[str, float]) -> dict[str, float]:
    return {key: value for key, value in metrics.items() if 'time' not in key}


def _option(arguments: list[str], name: str) -> list[str]:
    """An option and its values among arguments."""
    if name not in arguments:
        return []
    rest = arguments[arguments.index(name) + 1:]
    count = next((i for i, word in enumerate(rest) if word.startswith('--')), len(rest))
    return [name, *rest[:count]]


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, dict):
        return isinstance(other, dict) and one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    return one == other or one != one and other != other
