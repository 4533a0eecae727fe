"""The table of faults in docs/faults.md: ``pytest -m "slow or not slow" --write-faults=docs/faults.md`` writes it.

A test that injects a fault says so with the fixture ``fault``; what it passes on is what the code under test has said.
"""
import re
import tempfile
from pathlib import Path

import pytest

from replk_mm.pages import renew

_RECORDS: pytest.StashKey[list[tuple[str, str, str]]] = pytest.StashKey()
_ROWS: pytest.StashKey[list[tuple[str, str, str, str]]] = pytest.StashKey()
_SHOWN = 200


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption('--write-faults', metavar='PAGE', type=Path, help='renew the table of faults of this page')


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_ROWS] = []


@pytest.fixture
def fault(request: pytest.FixtureRequest):
    """``fault(what, sees, lost='nothing')``: what was injected, what the user was told of it, what was lost.

    ``sees`` is a message (or an exception) as the code under test gave it; its first line goes into the table.
    """
    records = request.node.stash.setdefault(_RECORDS, [])

    def record(what: str, sees: object, lost: str = 'nothing') -> None:
        text = next(line for line in str(sees).strip().splitlines() if line.strip())
        records.append((what, plain(text), lost))

    return record


def plain(text: str) -> str:
    """A line of a message without the folders of this machine."""
    text = text.replace(f'{Path(__file__).resolve().parents[1]}/', '').removeprefix('error: ')  # it may be a temporary one
    text = re.sub(rf'{re.escape(tempfile.gettempdir())}/(?:pytest-of-[^/\s]+/pytest-\d+/)?(?:[^/\s:]+/)?', '', text)
    return text if len(text) <= _SHOWN else f'{text[:_SHOWN].rsplit(" ", 1)[0]} ...'


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo):
    report = yield
    if report.when == 'call' and report.passed:
        item.config.stash[_ROWS] += [(*record, item.nodeid) for record in item.stash.get(_RECORDS, [])]
    return report


def pytest_sessionfinish(session: pytest.Session) -> None:
    page, rows = session.config.getoption('--write-faults'), session.config.stash[_ROWS]
    if page and rows:
        renew(page, 'faults', table(rows))


def table(rows: list[tuple[str, str, str, str]]) -> str:
    """Markdown of faults, in the order of the tests' files."""
    def cell(text: str) -> str:
        return text.replace('|', '\\|').replace('<', '&lt;')

    lines = [f'{len(rows)} faults, every one injected by the test beside it.', '',
             '| | Fault | What the user sees | Lost | Test |', '| ---: | --- | --- | --- | --- |']
    lines += [f'| {i} | {cell(what)} | {cell(sees)} | {cell(lost)} | `{node.replace("tests/", "", 1)}` |'
              for i, (what, sees, lost, node) in enumerate(sorted(rows, key=lambda row: row[3].partition('[')[0]), 1)]
    return '\n'.join([*lines, ''])
