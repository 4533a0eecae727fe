"""How far a row has come, in words: done, unfinished or failed, and what of it."""
from collections.abc import Mapping, Sequence
from typing import Any

from replk_mm.bench.records import MEASUREMENTS


def state_of(found: Sequence[Mapping[str, Any]]) -> tuple[str, list[str]]:
    """The state of a row.

    Args:
        found: Its records, at least one.

    Returns:
        The state; and what failed, is not there yet or does not belong together, by seed.
    """
    seeds = sorted({record['seed'] for record in found})
    failures = [record for record in found if record['status'] == 'failed']
    bad = {record['seed'] for record in failures}
    asked = asked_of(found)
    have = {(record['seed'], record['measurement']) for record in found}
    lacking = {seed: names for seed in seeds if seed not in bad
               and (names := [name for name in MEASUREMENTS if name in asked and (seed, name) not in have])}
    problems = [f'seed {record["seed"]}: {record["measurement"]} failed: {record["reason"]}' for record in failures]
    problems += [f'seed {seed}: not recorded yet: {", ".join(names)}' for seed, names in lacking.items()]
    problems += [f'seed {seed}: measured of different weights: {weights}' for seed in seeds
                 if (weights := _different_weights([record for record in found if record['seed'] == seed]))]
    if bad:
        return f'failed, {len(bad)} of {_counted(len(seeds))}', problems
    return f'unfinished, {len(lacking)} of {_counted(len(seeds))}' if lacking else f'done, {_counted(len(seeds))}', problems


def _different_weights(found: Sequence[Mapping[str, Any]]) -> str:
    """What was measured of which weights, as where two machines have trained one seed; '' if there are one."""
    by_weights: dict[str, list[str]] = {}
    for record in found:
        digest = (record['checkpoint'] or {}).get('sha256')
        if record['status'] == 'done' and digest:
            by_weights.setdefault(str(digest)[:12], []).append(record['measurement'])
    return '; '.join(f'{", ".join(names)} of {digest}' for digest, names in by_weights.items()) if len(by_weights) > 1 else ''


def asked_of(found: Sequence[Mapping[str, Any]]) -> list[Any]:
    """The measurements that the suite asked for of a row, by its latest record."""
    # Those of an earlier program do not tell: then what one seed has all of them should have.
    return max(found, key=lambda record: record['started']).get('asked') or [record['measurement'] for record in found]


def _counted(count: int) -> str:
    return f'{count} seed{"s" * (count != 1)}'
