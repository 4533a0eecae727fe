"""Rows of a suite that train nothing, but take time, crash, hang and die as their options say.

python -m suite_fake TASK
"""

import os
import signal
import sys
import time

from replk_mm.bench.records import write_json
from replk_mm.bench.suites import worker
from replk_mm.bench.suites.task import Task
from replk_mm.bench.suites.worker import MeasurementResult
from replk_mm.errors import UserError


def pretend(name: str, task: Task) -> MeasurementResult:
    given = task.row.options.get('fake', {})
    time.sleep(given.get('seconds', 0))
    how = given.get(name)
    marker = task.folder / f'{name}.once'
    if how and how.endswith(' once'):
        how = None if marker.exists() else how.removesuffix(' once')
        marker.touch()
    if how == 'user error':
        raise UserError('it cannot be\nDo something else.')
    if how == 'crash':
        raise ZeroDivisionError('division by nothing\nsecond line')
    if how == 'exit':
        print('the last words')
        sys.stdout.flush()
        os._exit(7)
    if how == 'kill':
        print('a line before the end')
        sys.stdout.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    if how == 'hang':
        time.sleep(60)
    if name == 'train':
        write_json(task.folder / 'train' / 'progress.json', dict(iteration=3, iterations=12, seconds=1.0))
    value = float('nan') if how == 'nan' else 2.5
    found = dict(
        metric=dict(primary='mIoU', unit='%', metrics=dict(mIoU=value)),
        complexity=dict(inference_parameters=2_000_000, macs=value),
        speed=dict(forms=dict(training=dict(median_ms=value))),
    )
    return MeasurementResult(
        found.get(name, dict(value=value)), dict(crop=[8, 8]), dict(threads=os.environ.get('OMP_NUM_THREADS'))
    )


TABLE = {
    name: (lambda task, name=name: pretend(name, task))
    for name in ('train', 'complexity', 'metric', 'curve', 'erf', 'speed', 'memory')
}


def environment() -> dict:
    return dict(fake=True)


if __name__ == '__main__':
    sys.exit(worker.main(sys.argv[1], 'suite_fake', float(os.environ.get('SUITE_FAKE_PATIENCE', 20))))
