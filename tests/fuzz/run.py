"""Feed readers hostile input and count what they make of it.

The input comes from hypothesis; a process for each job runs blocks of it, so that a crash in compiled code is seen and its
input kept. What fails is stored in a file, which ``--replay FILE`` runs again.
"""
import argparse
import collections
import contextlib
import faulthandler
import hashlib
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault('OMP_NUM_THREADS', '1')

#: Executions between two lines of progress; each block has a seed of its own.
BLOCK = 10_000
#: Inputs that one draw of hypothesis decides.
STRETCH = 16
#: Failing inputs of a block that are stored.
KEPT = 50
#: Seconds after which a process that no signal reaches is ended.
STUCK = 60
_HEAD = ['| Reader | Inputs | Accepted | Refused, in ways | Failures | Seconds | Most memory, MiB |',
         '| --- | ---: | ---: | ---: | ---: | ---: | ---: |']


@dataclass
class Run:
    """What came of a run.

    Attributes:
        reader: Its name.
        seed: Of the first block.
        counts: Executions by outcome.
        failures: A text each, the stored file first.
        memory: Most that a process had, bytes.
        seconds: It took.
    """

    reader: str
    seed: int
    counts: collections.Counter[str] = field(default_factory=collections.Counter)
    failures: list[str] = field(default_factory=list)
    memory: int = 0
    seconds: float = 0

    def figures(self) -> list[str]:
        """Executions, those accepted, those refused, in how many ways, failures, seconds, MiB."""
        total, accepted = sum(self.counts.values()), self.counts['accepted']
        return [f'{n:,.0f}' for n in (total + len(self.failures), accepted, total - accepted,
                                      len(self.counts) - ('accepted' in self.counts), len(self.failures), self.seconds,
                                      self.memory >> 20)]

    def text(self) -> str:
        """For a terminal: the figures, the most frequent outcomes, and each kind of failure once."""
        total, accepted, refused, ways, failures, seconds, memory = self.figures()
        lines = [f'{self.reader}: {total} executions in {seconds} s, seed {self.seed}, at most {memory} MiB; '
                 f'{accepted} accepted, {refused} refused in {ways} ways, {failures} failures']
        lines += [f'  {count:8,}  {kind}' for kind, count in self.counts.most_common(40)]
        kinds: dict[str, list[str]] = {}
        for failure in self.failures:
            kinds.setdefault(failure.partition(': ')[2][-120:], []).append(failure)
        return '\n'.join([*lines, *(f'FAILED {len(alike)} times: {alike[0]}' for alike in kinds.values())])

    def write(self, page: Path) -> None:
        """Renew this reader's line in the table of a page."""
        from replk_mm.pages import renew

        block = page.read_text(encoding='utf-8').partition('<!-- runs:begin -->')[2].partition('<!-- runs:end -->')[0]
        known = [line for line in block.splitlines() if line.startswith('| `')]
        total, accepted, refused, ways, *rest = self.figures()
        line = f'| {" | ".join([f"`{self.reader}`", total, accepted, f"{refused}, {ways}", *rest])} |'
        renew(page, 'runs', '\n'.join([*_HEAD, *(other for other in known if f'`{self.reader}`' not in other), line, '']))


def main() -> int:
    from fuzz.readers import READERS

    p = argparse.ArgumentParser(description=__doc__, epilog='example:\n  python tests/fuzz/run.py records --executions 10000',
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('reader', choices=READERS)
    p.add_argument('--executions', type=int, default=10_000, metavar='N', help='how many inputs (default: 10000)')
    p.add_argument('--seed', type=int, default=0, metavar='N', help='of the input (default: 0)')
    p.add_argument('--jobs', type=int, default=1, metavar='N', help='processes at a time (default: 1)')
    p.add_argument('--failures', type=Path, default=Path(tempfile.gettempdir(), 'fuzz_failures'), metavar='DIR',
                   help='where inputs that fail are stored')
    p.add_argument('--page', type=Path, metavar='FILE', help='renew the line of the reader in the table of this page')
    p.add_argument('--replay', type=Path, metavar='FILE', help='run one stored input')
    p.add_argument('--block', type=int, nargs=2, help=argparse.SUPPRESS)  # seed and executions, in a child process
    args = p.parse_args()
    if args.block or args.replay:
        return _child(args)
    found = _all_blocks(args)
    print(found.text())
    if args.page:
        found.write(args.page)
    return 1 if found.failures else 0


def _all_blocks(args: argparse.Namespace) -> Run:
    """Run the blocks in processes of their own, so many at a time."""
    from fuzz.readers import clean

    blocks = collections.deque((args.seed + i, min(BLOCK, args.executions - i * BLOCK))
                               for i in range(-(-args.executions // BLOCK)))
    found, start = Run(args.reader, args.seed), time.monotonic()
    running: list[tuple[tuple[int, int], subprocess.Popen]] = []
    while blocks or running:
        while blocks and len(running) < args.jobs:
            block = blocks.popleft()
            running.append((block, subprocess.Popen(
                [sys.executable, __file__, args.reader, '--failures', str(args.failures), '--block', *map(str, block)],
                stdout=subprocess.PIPE, text=True)))
        block, process = running.pop(0)
        text = process.communicate()[0]
        try:
            said = json.loads(text.splitlines()[-1])
        except (ValueError, IndexError):
            kept = _keep(args, process.pid, block)
            found.failures.append(f'{kept}: the process ended with {process.returncode}; that was its last input')
        else:
            found.counts.update(said['counts'])
            found.failures += said['failures']
            found.memory = max(found.memory, said['memory'])
        clean(process.pid)
        found.seconds = time.monotonic() - start
        done = sum(found.counts.values()) + len(found.failures)
        print(f'{args.reader}: {done:,} of {args.executions:,}, {done / found.seconds:,.0f} a second, '
              f'{len(found.failures)} failures', flush=True)
    return found


def _keep(args: argparse.Namespace, pid: int, block: tuple[int, int]) -> Path:
    from fuzz.readers import last_input

    args.failures.mkdir(parents=True, exist_ok=True)
    kept = args.failures / f'{args.reader}.crash.{block[0]}'
    kept.write_bytes(last_input(pid).read_bytes() if last_input(pid).exists() else b'')
    return kept


def _child(args: argparse.Namespace) -> int:
    from hypothesis import HealthCheck, Phase, given, seed, settings

    from fuzz.guard import Failure, peak
    from fuzz.mutate import RAW, Choices
    from fuzz.readers import READERS, clean, executor

    reader = READERS[args.reader]
    execute = executor(reader)
    if args.replay:
        print(execute(args.replay.read_bytes()))
        clean(os.getpid())
        return 0
    counts: collections.Counter[str] = collections.Counter()
    failures: list[str] = []
    number, wanted = args.block

    def one(data: bytes) -> None:
        faulthandler.dump_traceback_later(STUCK, exit=True)
        try:
            counts[execute(data)] += 1
        except Failure as failure:
            args.failures.mkdir(parents=True, exist_ok=True)
            path = args.failures / f'{args.reader}.{number}.{len(failures)}'
            if len(failures) < KEPT:
                path.write_bytes(data)
            failures.append(f'{path}: {failure}')

    def stretched(raw: bytes) -> None:
        # A draw takes longer than reading what it makes: each decides several inputs.
        for i in range(STRETCH):
            if sum(counts.values()) + len(failures) < wanted:
                one(reader.build(Choices(hashlib.blake2b(raw, digest_size=64, salt=bytes([i])).digest())))

    # hypothesis passes over what it has drawn before, so that a block may need several rounds.
    turn = 0
    while (missing := wanted - sum(counts.values()) - len(failures)) > 0:
        test = settings(max_examples=-(-missing // STRETCH), database=None, deadline=None, phases=[Phase.generate],
                        suppress_health_check=list(HealthCheck))(given(RAW)(stretched))
        with contextlib.redirect_stdout(io.StringIO()):
            seed(number * 1000 + turn)(test)()
        turn += 1
    faulthandler.cancel_dump_traceback_later()
    print(json.dumps(dict(counts=counts, failures=failures, memory=peak())))
    return 0


if __name__ == '__main__':
    sys.exit(main())
