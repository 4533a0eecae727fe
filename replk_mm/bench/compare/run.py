"""Compare two results: folders that ``tools/test.py --out DIR`` wrote.

What is found is plain data, which :mod:`replk_mm.bench.compare.text` lays out.
"""
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from replk_mm.bench.compare import results, statistics
from replk_mm.bench.compare.results import Result, Source
from replk_mm.errors import UserError

#: Resamplings of the images.
DRAWS = 1000


def silent(done: int, of: int) -> None:
    """Show no progress."""


def compare(path_a: str, path_b: str, source: Source | None = None, *, images: int | None = 8, kind: str = 'bbox',
            score: float = 0.3, seed: int = 0, out: Path | None = None, progress: Callable[[int, int], None] = silent) -> dict:
    """Compare two results.

    Args:
        path_a: See :func:`replk_mm.bench.compare.results.open_result`.
        path_b: The other.
        source: Where data, config and classes are, if not where the results say.
        images: How many of the most changed images are listed and shown; None looks at no image.
        kind: Of detections: what IoU is taken of, and which AP classes are compared by, ``'bbox'`` or ``'segm'``.
        score: Detections less sure are left out when images are compared.
        seed: Of the resampling.
        out: Folder for pictures of the most changed images.
        progress: Called with images done and images in all.

    Returns:
        Plain data for JSON; see docs/compare.md.

    Raises:
        UserError: If the results cannot be compared, data or predictions are missing, or ``seed`` is negative.
    """
    if seed < 0:
        raise UserError(f'--seed {seed}: must be 0 or more')
    a, b = results.open_result(path_a, 'A'), results.open_result(path_b, 'B')
    results.check_comparable(a, b)
    source = source or Source()
    figure = 'IoU' if a.task == 'segmentation' else f'{kind}_mAP'
    found: dict[str, Any] = dict(
        version=1, task=a.task, a=a.facts(), b=b.facts(), differences=results.differences(a, b),
        metrics=results.metrics(a, b),
        per_class=dict(figure=figure, size=results.SIZE[a.task], rows=results.per_class(a, b, figure)))
    if images is None:
        return found
    root = results.data_root(a, b, source)
    if a.task == 'segmentation':
        return found | _segmentation((a, b), source, root, images, seed, out, progress)
    return found | _detection((a, b), source, root, images, seed, out, progress, kind, score)


def _segmentation(pair: tuple[Result, Result], source: Source, root: str | None, images: int, seed: int, out: Path | None,
                  progress: Callable[[int, int], None]) -> dict:
    from replk_mm.bench.compare import segmentation
    from replk_mm.bench.compare.labels import check_same, open_labels

    labels, others = (open_labels(result, source, root) for result in pair)
    check_same(labels, others, f'{pair[0].file} and {pair[1].file}')
    counts = segmentation.count(labels, pair, progress)
    for which, result in enumerate(pair):
        segmentation.check_reproduced(result, labels, counts, which)
    miou, accuracy = segmentation.scores(counts)
    scored = np.flatnonzero(~np.isnan(miou[0]))
    scores = [dict(image=labels.names[i], a=float(miou[0, i]), b=float(miou[1, i]), difference=float(miou[1, i] - miou[0, i]),
                   accuracy_a=float(accuracy[0, i]), accuracy_b=float(accuracy[1, i])) for i in scored]
    changed = _most_changed(scores, images)
    interval = statistics.paired_bootstrap(segmentation.miou_difference(counts), len(labels.names), DRAWS, seed)
    summary = _summary('mIoU', '%', segmentation.DEFINITION, scores, len(labels.names))
    found: dict[str, Any] = dict(
        only_predicted=_only_predicted(labels.classes, counts), images=summary | dict(changed=changed, scores=scores),
        statistics=dict(figure='mIoU', unit='%', **asdict(interval), beyond_luck=interval.is_beyond_luck))
    if out:
        from replk_mm.bench.compare.pictures import label_rows, write_sheets
        places = {name: i for i, name in enumerate(labels.names)}
        found['pictures'] = write_sheets(out, label_rows(labels, pair, [(places[c['image']], c) for c in changed]),
                                         _titles(pair))
    return found


def _detection(pair: tuple[Result, Result], source: Source, root: str | None, images: int, seed: int, out: Path | None,
               progress: Callable[[int, int], None], kind: str, score: float) -> dict:
    from replk_mm.bench.compare import detection

    objects = detection.open_objects(pair[0], source, root, kind)
    detections = tuple(detection.open_detections(result, objects, kind, score) for result in pair)
    ids = list(objects.images)
    of = np.stack([detection.counts(detection.match(objects, part, ids, kind, progress).values()) for part in detections])
    f1 = detection.f1(of)
    scores = [dict(image=objects.images[i]['file_name'], id=i, a=float(f1[0, n]), b=float(f1[1, n]),
                   difference=float(f1[1, n] - f1[0, n]), **{
                       f'{what}_{letter}': int(of[j, n, k]) for j, letter in enumerate('ab')
                       for k, what in enumerate(('found', 'missed', 'false'))}) for n, i in enumerate(ids)]
    # Equal F1 may still hide a change: then by objects found less false detections.
    changed = _most_changed(scores, images, lambda s: s['found_b'] - s['false_b'] - s['found_a'] + s['false_a'])
    interval = statistics.paired_bootstrap(statistics.mean_difference(*f1), len(ids), DRAWS, seed)
    totals = {letter: dict(zip(('found', 'missed', 'false'), map(int, of[j].sum(0)), strict=True), mean_f1=float(f1[j].mean()))
              for j, letter in enumerate('ab')}
    found: dict[str, Any] = dict(
        totals=totals,
        images=_summary('F1', '', f'{detection.DEFINITION}; score threshold {score:g}, IoU of '
                        + ('boxes' if kind == 'bbox' else 'masks'), scores, len(ids)) | dict(changed=changed, scores=scores),
        statistics=dict(figure='mean F1 of the images', unit='', **asdict(interval), beyond_luck=interval.is_beyond_luck))
    if out:
        from replk_mm.bench.compare.pictures import object_rows, write_sheets
        found['pictures'] = write_sheets(out, object_rows(objects, detections, changed, kind), _titles(pair))
    return found


def _most_changed(scores: list[dict], images: int, also: Callable[[dict], float] = lambda score: 0) -> list[dict]:
    changed = [score for score in scores if score['difference'] or also(score)]
    return sorted(changed, key=lambda s: (-abs(s['difference']), -abs(also(s)), s['image']))[:images]


def _summary(figure: str, unit: str, definition: str, scores: list[dict], images: int) -> dict:
    if not scores:
        raise UserError('no image has a labelled pixel, so that none can be compared\nName data with labels: --data-root DIR.')
    signs = [np.sign(score['difference']) for score in scores]
    return dict(figure=figure, unit=unit, definition=definition, count=images, scored=len(scores),
                higher_in_b=signs.count(1), higher_in_a=signs.count(-1), equal=signs.count(0),
                median_difference=float(np.median([score['difference'] for score in scores])))


def _only_predicted(classes: list[str], counts: Any) -> list[dict]:
    """Classes that are in no label but predicted: mIoU counts them as 0 for who predicts them."""
    labelled, predicted = counts.labelled.sum(0), counts.predicted.sum(1)
    return [dict(name=name, a=int(predicted[0, c]), b=int(predicted[1, c])) for c, name in enumerate(classes)
            if not labelled[c] and predicted[:, c].any()]


def _titles(pair: tuple[Result, Result]) -> list[str]:
    return ['image', 'ground truth', *(f'{result.letter}: {result.name}' for result in pair), 'where they differ']
