"""The answer in plain language: planted winners and ties, limits, and what is not decided. All records are made up."""

from pathlib import Path

import numpy as np
from report_records import counted, write

from replk_mm.analysis.statistics import Plan
from replk_mm.bench.answer import Answer, answer
from replk_mm.bench.report.load import load_report

ROWS = ('a', 'b', 'c', 'd')


def answered(folder: Path, records: list[dict], **options) -> Answer:
    return answer(load_report([write(folder, records)]).suites[0], **options)


def simulated(folder: Path, winner: str | None) -> list[Answer]:
    """Answers of 20 tables: with a winner 0.1 ahead in the share of right pixels, or with four equal rows."""
    found = []
    for i in range(20):
        name = f'{winner}{i}'
        qualities = {row: 0.8 if row == winner else 0.7 for row in ROWS}
        # the same draws wherever the tests run
        spread = np.random.default_rng([i, len(name)]).normal(0, 0.01, (len(ROWS), 3))
        records = [
            counted(folder / name, row, 100 * i + seed, qualities[row] + spread[k, seed], 20)
            for k, row in enumerate(ROWS)
            for seed in range(3)
        ]
        found.append(answered(folder / name, [{**one, 'label': f'Row {one["row"]}'} for one in records]))
    return found


def test_planted_winners_are_named(tmp_path) -> None:
    found = simulated(tmp_path, 'c')
    assert [one.take for one in found] == ['c'] * 20
    assert all(one.verdict.startswith('Take Row c: mIoU ') for one in found)


def test_planted_ties_cannot_be_told_apart(tmp_path, monkeypatch) -> None:
    """A 95 % family-wise level allows one wrong winner in 20 tables of equal rows."""
    monkeypatch.setattr('replk_mm.bench.answer.plan', lambda scores, points: Plan(seeds=5, images=9, detectable=1.0))
    found = simulated(tmp_path, None)
    tied = [one for one in found if one.take is None and 'the 4 rows cannot be told apart' in one.verdict]
    assert len(tied) >= 19 and all(set(one.candidates) == set(ROWS) for one in tied)
