"""Records of a suite: appended whole or not at all, read with what is wrong told, by hand-written lines as well."""
import json
import math
import multiprocessing
import random
from datetime import datetime, timezone

import pytest

from replk_mm.bench import records


def record(**changes) -> dict:
    return {**dict(
        version=1, suite='s', question='', row='r', label='R', seed=0, measurement='metric', status='done', reason=None,
        values={'metrics': {'mIoU': 1.5}}, protocol={}, facts={}, config={}, checkpoint=None, published=None, git=None,
        environment={}, started='2030-01-01T00:00:00+00:00', seconds=1.5, files={}, key='k'), **changes}


def test_append_and_read_give_the_same(tmp_path):
    path = tmp_path / 'results' / 'r.0.jsonl'
    written = [record(key=str(i), measurement=m, values={'ünï': i}) for i, m in enumerate(records.MEASUREMENTS)]
    for each in written:
        records.append(each, path)
    assert records.read([tmp_path]) == (written, [])
    assert [json.loads(line) for line in path.read_text().splitlines()] == written


@pytest.mark.parametrize('values', [{'a': math.nan}, {'a': [1, {'b': -math.inf}]}])
def test_a_number_that_is_none_is_refused(tmp_path, values):
    with pytest.raises(ValueError, match=r'values\.a.* is not a finite number'):
        records.append(record(values=values), tmp_path / 'f.jsonl')
    assert not (tmp_path / 'f.jsonl').exists()


def test_a_line_cut_short_harms_no_other(tmp_path):
    path = tmp_path / 'r.jsonl'
    records.append(record(key='a'), path)
    whole = path.read_bytes()
    for length in range(1, len(whole)):  # a process may be ended anywhere in its write
        path.write_bytes(whole + whole.replace(b'"a"', b'"b"')[:length])
        records.append(record(key='c', measurement='speed'), path)
        found, complaints = records.read([path])
        keys = [one['key'] for one in found]
        if length == len(whole) - 1:  # all but the newline
            assert keys == ['b', 'c']
        else:
            assert keys == ['a', 'c']
            assert len(complaints) == 1 and complaints[0].startswith(f'{path}:2: not JSON')


def test_complaints_name_file_line_and_reason(tmp_path):
    path = tmp_path / 'r.jsonl'
    missing = record()
    del missing['row']
    bad = [('[1]', 'not a record: list'), (json.dumps(record(version=2)), 'version 2; this replk_mm reads version 1'),
           (json.dumps(missing), 'row: Field required'), (json.dumps(record(seed='0')), 'seed: Input should be a valid integer'),
           (json.dumps(record(seed=True)), 'seed: '), (json.dumps(record(measurement='taste')), "measurement: Input should be 't"),
           (json.dumps(record(status='well')), 'status: Input'), (json.dumps(record(status='failed')), 'without a reason'),
           (json.dumps(record(values={'x': math.nan})), 'values.x is not a finite'), ('{"version": 1, ', 'not JSON')]
    path.write_text('\n'.join(['', *(line for line, _ in bad), json.dumps(record())]))
    found, complaints = records.read([path, tmp_path / 'absent.jsonl'])
    assert found == [record()]
    assert len(complaints) == len(bad) + 1
    for number, ((_, why), complaint) in enumerate(zip(bad, complaints, strict=False), 2):
        assert complaint.startswith(f'{path}:{number}: ') and why in complaint
    assert complaints[-1].startswith(f'{tmp_path / "absent.jsonl"}: cannot be read')


def test_the_later_record_counts_but_no_failure_takes_the_place_of_a_result(tmp_path):
    early, late = '2030-01-01T00:00:00+00:00', '2030-01-02T00:00:00+00:00'
    failed = dict(status='failed', reason='why')
    cases = [([record(started=early, seconds=1), record(started=late, seconds=2)], 2),
             ([record(started=late, seconds=2), record(started=early, seconds=1)], 2),  # of another machine's file
             ([record(seconds=1), record(started=late, seconds=2, **failed)], 1),
             ([record(seconds=2, started=late, **failed), record(started=early, seconds=1)], 1),
             ([record(seconds=1, **failed), record(started=late, seconds=2, **failed)], 2)]
    for i, (given, expected) in enumerate(cases):
        path = tmp_path / f'{i}.jsonl'
        path.write_text(''.join(json.dumps(one) + '\n' for one in given))
        found, complaints = records.read([path])
        assert [one['seconds'] for one in found] == [expected] and not complaints


def test_another_definition_of_a_row_gives_way_to_the_later_one(tmp_path):
    first = record(key='old', seconds=1, started='2030-01-01T00:00:00+00:00')
    second = record(key='new', seconds=2, started='2030-01-02T00:00:00+00:00', status='failed', reason='why')
    for name, given in (('a', [first, second]), ('b', [second, first])):
        path = tmp_path / f'{name}.jsonl'
        path.write_text(''.join(json.dumps(one) + '\n' for one in given))
        found, complaints = records.read([path])
        assert [one['key'] for one in found] == ['new']
        assert len(complaints) == 1 and 'its row is defined differently' in complaints[0]
        assert complaints[0].startswith(f'{path}:{1 + given.index(first)}:')


def test_files_of_several_machines_merge(tmp_path):
    for machine, seed in (('a', 0), ('b', 1)):
        records.append(record(seed=seed, key=f'{seed}'), tmp_path / machine / 'results' / f'r.{seed}.jsonl')
    (tmp_path / 'all').mkdir()
    for file in records.files_in([tmp_path / 'a', tmp_path / 'b']):
        (tmp_path / 'all' / file.name).write_bytes(file.read_bytes())
    merged = records.read([tmp_path / 'all'])
    assert merged == records.read([tmp_path / 'a', tmp_path / 'b'])
    assert sorted(one['seed'] for one in merged[0]) == [0, 1]


def _append_many(path, writer: int) -> None:
    for i in range(30):
        text = 'x' * random.Random(i).randint(0, 9000)
        records.append(record(key=f'{writer}.{i}', row=f'r{writer}.{i}', facts={'text': text}), path)


def test_several_processes_write_to_one_file(tmp_path):
    context = multiprocessing.get_context('fork')
    writers = [context.Process(target=_append_many, args=(tmp_path / 'f.jsonl', i)) for i in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    found, complaints = records.read([tmp_path / 'f.jsonl'])
    assert not complaints
    assert {one['key'] for one in found} == {f'{writer}.{i}' for writer in range(4) for i in range(30)}


def test_since(tmp_path):
    path = tmp_path / 'f.jsonl'
    assert records.since(path, 0) == []
    records.append(record(key='a'), path)
    size = path.stat().st_size
    assert records.since(path, size) == []
    records.append(record(key='b'), path)
    assert [one['key'] for one in records.since(path, size)] == ['b']
    assert [one['key'] for one in records.since(path, 0)] == ['a', 'b']


def test_keys_tell_definitions_apart():
    same = [records.key_of(d, 0, 'metric') for d in ({'a': 1, 'b': [2]}, {'b': [2], 'a': 1})]
    assert same[0] == same[1]
    others = {records.key_of({'a': 1, 'b': [3]}, 0, 'metric'), records.key_of({'a': 1, 'b': [2]}, 1, 'metric'),
              records.key_of({'a': 1, 'b': [2]}, 0, 'speed'), same[0]}
    assert len(others) == 4


def test_spread_by_hand():
    found = records.spread([1., 2., 6.])
    assert (found.mean, found.count) == (3., 3)
    assert found.deviation == pytest.approx(math.sqrt((4 + 1 + 9) / 2))
    assert records.spread([4.]) == records.Spread(4., None, 1)


def test_by_suite_keeps_order():
    given = [record(suite='b', key='1'), record(suite='a', key='2'), record(suite='b', key='3')]
    assert {name: [one['key'] for one in of] for name, of in records.by_suite(given).items()} == {'b': ['1', '3'], 'a': ['2']}


def test_times_sort_as_text():
    # What `read` relies on: the texts that a task writes sort as the times do.
    times = [datetime(2030, 1, 1, 0, 0, 0, us, timezone.utc) for us in (0, 1, 10, 999999)]
    texts = [time.isoformat(timespec='microseconds') for time in times]
    assert texts == sorted(texts)
