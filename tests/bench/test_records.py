"""Records of a suite: appended whole or not at all, read with what is wrong told, by hand-written lines as well."""

import json
import math

import pytest
import report_records

from replk_mm.bench import records
from replk_mm.bench.schema import MEASUREMENTS


def record(**changes) -> dict:
    return {**report_records.record('r', 0, 'metric', dict(metrics=dict(mIoU=1.5))), 'key': 'k', **changes}


def test_append_and_read_give_the_same(tmp_path):
    path = tmp_path / 'results' / 'r.0.jsonl'
    written = [record(key=str(i), measurement=m, values={'ünï': i}) for i, m in enumerate(MEASUREMENTS)]
    for each in written:
        records.append_record(each, path)
    assert records.read_records([tmp_path]) == (written, [])
    assert [json.loads(line) for line in path.read_text().splitlines()] == written


@pytest.mark.parametrize('values', [{'a': math.nan}, {'a': [1, {'b': -math.inf}]}])
def test_a_non_number_is_rejected(tmp_path, values):
    with pytest.raises(ValueError, match=r'values\.a.* is not a finite number'):
        records.append_record(record(values=values), tmp_path / 'f.jsonl')
    assert not (tmp_path / 'f.jsonl').exists()


def test_a_line_cut_short_harms_no_other(tmp_path):
    path = tmp_path / 'r.jsonl'
    records.append_record(record(key='a'), path)
    whole = path.read_bytes()
    for length in (1, 2, len(whole) // 2, len(whole) - 2, len(whole) - 1):  # a process may end anywhere in its write
        path.write_bytes(whole + whole.replace(b'"a"', b'"b"')[:length])
        records.append_record(record(key='c', measurement='speed'), path)
        found, complaints = records.read_records([path])
        keys = [one['key'] for one in found]
        if length == len(whole) - 1:  # all but the newline
            assert keys == ['b', 'c']
        else:
            assert keys == ['a', 'c']
            assert len(complaints) == 1 and complaints[0].startswith(f'{path}:2: not JSON')


def test_complaints_name_file_line_and_reason(tmp_path):
    path = tmp_path / 'r.jsonl'
    bad = {
        'not a record: list': [1],
        'version 2; this replk_mm reads version 1': record(version=2),
        'row: Field required': {key: value for key, value in record().items() if key != 'row'},
        'seed: Input should be a valid integer': record(seed='0'),
        'seed: Input': record(seed=True),
        'measurement: Input should be': record(measurement='taste'),
        'status: Input should be': record(status='well'),
        'failed without a reason': record(status='failed'),
        'values.x is not a finite': record(values={'x': math.nan}),
        'asked: Input should be a valid list': record(asked=5),
    }
    path.write_text('\n'.join(['', *map(json.dumps, bad.values()), '{"version": 1, ', json.dumps(record())]))
    found, complaints = records.read_records([path, tmp_path / 'absent.jsonl'])
    assert found == [record()]
    for number, (why, complaint) in enumerate(zip([*bad, 'not JSON'], complaints[:-1], strict=True), 2):
        assert complaint.startswith(f'{path}:{number}: ') and why in complaint
    assert complaints[-1].startswith(f'{tmp_path / "absent.jsonl"}: cannot be read')


def test_the_later_record_counts_but_no_failure_takes_the_place_of_a_result(tmp_path):
    early, late = '2030-01-01T00:00:00+00:00', '2030-01-02T00:00:00+00:00'
    failed = dict(status='failed', reason='why')
    cases = [
        ([record(started=early, seconds=1), record(started=late, seconds=2)], 2),
        ([record(started=late, seconds=2), record(started=early, seconds=1)], 2),  # of another machine's file
        ([record(seconds=1), record(started=late, seconds=2, **failed)], 1),
        ([record(seconds=2, started=late, **failed), record(started=early, seconds=1)], 1),
        ([record(seconds=1, **failed), record(started=late, seconds=2, **failed)], 2),
    ]
    for i, (lines, expected) in enumerate(cases):
        path = tmp_path / f'{i}.jsonl'
        path.write_text(''.join(json.dumps(one) + '\n' for one in lines))
        found, complaints = records.read_records([path])
        assert [one['seconds'] for one in found] == [expected] and not complaints


def test_another_definition_of_a_row_gives_way_to_the_later_one(tmp_path):
    first = record(key='old', seconds=1, started='2030-01-01T00:00:00+00:00')
    second = record(key='new', seconds=2, started='2030-01-02T00:00:00+00:00', status='failed', reason='why')
    for name, lines in (('a', [first, second]), ('b', [second, first])):
        path = tmp_path / f'{name}.jsonl'
        path.write_text(''.join(json.dumps(one) + '\n' for one in lines))
        found, complaints = records.read_records([path])
        assert [one['key'] for one in found] == ['new']
        assert len(complaints) == 1 and 'its row is defined differently' in complaints[0]
        assert complaints[0].startswith(f'{path}:{1 + lines.index(first)}:')


def test_files_of_several_machines_merge(tmp_path):
    for machine, seed in (('a', 0), ('b', 1)):
        records.append_record(record(seed=seed, key=f'{seed}'), tmp_path / machine / 'results' / f'r.{seed}.jsonl')
    (tmp_path / 'all').mkdir()
    for file in records.record_files([tmp_path / 'a', tmp_path / 'b']):
        (tmp_path / 'all' / file.name).write_bytes(file.read_bytes())
    merged = records.read_records([tmp_path / 'all'])
    assert merged == records.read_records([tmp_path / 'a', tmp_path / 'b'])
    assert sorted(one['seed'] for one in merged[0]) == [0, 1]
