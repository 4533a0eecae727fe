"""Runs of tools/train.py, one after another, each in a fork of a process that has imported everything.

Reads ``[[arguments, signal], ...]`` from standard input; writes ``[[status, standard error], ...]``: of processes that a
signal has ended, minus its number.
"""
import json
import os
import sys
import tempfile
import traceback
from pathlib import Path
from runpy import run_path

import torch

from replk_mm.engine import prepare, train  # noqa: F401

TRAIN = Path(__file__).resolve().parents[1] / 'tools/train.py'


def run(arguments: list[str], signal: str | None) -> tuple[int, str]:
    with tempfile.TemporaryFile('w+') as errors:
        child = os.fork()
        if not child:
            os.dup2(errors.fileno(), 2)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            if signal:
                os.environ['TEST_SIGNAL'] = signal
            sys.argv = [str(TRAIN), *arguments]
            status = 1
            try:
                run_path(str(TRAIN), run_name='__main__')
            except SystemExit as end:
                status = int(end.code or 0)
            except BaseException:
                traceback.print_exc()
            sys.stderr.flush()
            os._exit(status)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        errors.seek(0)
        return status, errors.read()


if __name__ == '__main__':
    torch.set_num_threads(1)  # threads do not outlive a fork
    print(json.dumps([run(*step) for step in json.load(sys.stdin)]))
