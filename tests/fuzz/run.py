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
import resource
import subprocess
import sys
import tempfile
import time
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


def main() -> int:
    from fuzz.readers import READERS, clean

    p = argparse.ArgumentParser(
        description=__doc__,
        epilog='example:\n  python tests/fuzz/run.py records --executions 10000',
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument('reader', choices=READERS)
    p.add_argument('--executions', type=int, default=10_000, metavar='N')
    p.add_argument('--seed', type=int, default=0, metavar='N')
    p.add_argument('--jobs', type=int, default=1, metavar='N')
    p.add_argument('--failures', type=Path, default=Path(tempfile.gettempdir(), 'fuzz_failures'), metavar='DIR')
    p.add_argument('--replay', type=Path, metavar='FILE', help='run one stored input')
    p.add_argument('--block', type=int, nargs=2, help=argparse.SUPPRESS)  # seed and executions, in a child process
    args = p.parse_args()
    if args.block or args.replay:
        return _child(args)
    blocks = collections.deque(
        (args.seed + i, min(BLOCK, args.executions - i * BLOCK)) for i in range(-(-args.executions // BLOCK))
    )
    counts: collections.Counter[str] = collections.Counter()
    failures: list[str] = []
    start, most, running = time.monotonic(), 0, []
    while blocks or running:
        while blocks and len(running) < args.jobs:
            block = blocks.popleft()
            running.append(
                (
                    block,
                    subprocess.Popen(
                        [sys.executable, __file__, args.reader, '--failures', str(args.failures), '--block', *map(str, block)],
                        stdout=subprocess.PIPE,
                        text=True,
                    ),
                )
            )
        block, process = running.pop(0)
        text = process.communicate()[0]
        try:
            found = json.loads(text.splitlines()[-1])
        except (ValueError, IndexError):
            failures.append(f'the process ended with {process.returncode}; its last input: {_keep(args, process.pid, block)}')
            continue
        finally:
            clean(process.pid)
        counts.update(found['counts'])
        failures += found['failures']
        most = max(most, found['rss'])
        done = sum(counts.values()) + len(failures)
        print(
            f'{args.reader}: {done:,} of {args.executions:,}, {done / (time.monotonic() - start):,.0f} a second, '
            f'{len(failures)} failures',
            flush=True,
        )
    print(
        f'{args.reader}: {sum(counts.values()):,} executions in {time.monotonic() - start:,.0f} s, seed {args.seed}, '
        f'at most {most >> 20:,} MiB; {counts["accepted"]:,} accepted, '
        f'{sum(counts.values()) - counts["accepted"]:,} refused in {len(counts) - ("accepted" in counts)} ways:'
    )
    for kind, count in counts.most_common(40):
        print(f'  {count:8,}  {kind}')
    kinds: dict[str, list[str]] = {}
    for failure in failures:
        kinds.setdefault(failure.partition(': ')[2][-120:], []).append(failure)
    for alike in kinds.values():
        print(f'FAILED {len(alike)} times: {alike[0]}')
    return 1 if failures else 0


def _keep(args: argparse.Namespace, pid: int, block: tuple[int, int]) -> Path:
    from fuzz.readers import last_input

    args.failures.mkdir(parents=True, exist_ok=True)
    kept = args.failures / f'{args.reader}.crash.{block[0]}'
    kept.write_bytes(last_input(pid).read_bytes() if last_input(pid).exists() else b'')
    return kept


def _child(args: argparse.Namespace) -> int:
    from hypothesis import HealthCheck, Phase, given, seed, settings

    from fuzz.guard import Failure
    from fuzz.mutate import RAW, Choices
    from fuzz.readers import READERS, executor

    reader = READERS[args.reader]
    execute = executor(reader)
    if args.replay:
        print(execute(args.replay.read_bytes()))
        return 0
    counts: collections.Counter[str] = collections.Counter()
    failures: list[str] = []

    def one(data: bytes) -> None:
        faulthandler.dump_traceback_later(STUCK, exit=True)
        try:
            counts[execute(data)] += 1
        except Failure as failure:
            args.failures.mkdir(parents=True, exist_ok=True)
            path = args.failures / f'{args.reader}.{args.block[0]}.{len(failures)}'
            if len(failures) < KEPT:
                path.write_bytes(data)
            failures.append(f'{path}: {failure}')

    def stretched(raw: bytes) -> None:
        # A draw takes longer than reading what it makes: each decides several inputs.
        for i in range(STRETCH):
            if sum(counts.values()) + len(failures) < wanted:
                one(reader.build(Choices(hashlib.blake2b(raw, digest_size=64, salt=bytes([i])).digest())))

    # hypothesis passes over what it has drawn before, so that a block may need several rounds.
    number, wanted = args.block
    for turn in range(20):
        missing = wanted - sum(counts.values()) - len(failures)
        if missing <= 0:
            break
        test = given(RAW)(stretched)
        test = settings(
            max_examples=-(-missing // STRETCH),
            database=None,
            deadline=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )(test)
        with contextlib.redirect_stdout(io.StringIO()):
            seed(number * 1000 + turn)(test)()
    faulthandler.cancel_dump_traceback_later()
    print(json.dumps(dict(counts=counts, failures=failures, rss=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)))
    return 0


if __name__ == '__main__':
    sys.exit(main())
