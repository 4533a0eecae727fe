"""Does COCO's metric compare detections with the annotations of the same images? Asked before anything is scored."""
import shlex
from collections import Counter
from pathlib import Path

from mmengine.config import Config

from replk_mm.data import coco
from replk_mm.data.datasets import coco_style, datasets_of, placed_metrics
from replk_mm.errors import UserError


def check(cfg: Config, split: str) -> None:
    """Compare the annotation files of a split's data sets, which are there, with that of its metrics.

    The metric has a file of its own, which whoever changes the data set's forgets, and knows images by their ids only.

    Raises:
        UserError: If a metric has another file than the data set; or if there are several data sets, and their ids mean
            different images, or the metric's file does not have all of them.
    """
    metrics = {place: metric for place, metric in placed_metrics(cfg, split).items()
               if str(metric.get('type')).endswith('CocoMetric')}
    datasets = list(datasets_of(cfg, (split,))) if metrics else []
    if len(datasets) == 1 and datasets[0].get('ann_file'):
        file = Path(datasets[0].get('data_root') or '.') / datasets[0]['ann_file']
        for place, metric in metrics.items():
            _compare(place, metric.get('ann_file'), file)
    scope = cfg.get('default_scope', 'mmengine')
    files = [Path(dataset.get('data_root') or '.') / dataset['ann_file'] for dataset in datasets if coco_style(dataset, scope)]
    if len(files) > 1:
        for place, metric in metrics.items():
            _check_ids(place, metric.get('ann_file'), files)


def _compare(place: str, scored: str | None, file: Path) -> None:
    if not scored or Path(scored).resolve() == file.resolve():
        return
    # Of a value on the command line mmengine removes spaces, and splits it at commas.
    plain = not set(str(file)) & set(' ,()[]\'"')
    raise UserError(f'{place}.ann_file={scored!r}: the data set has another annotation file, {file}\n'
                    f'Detections can be scored with the annotations of the same images only: '
                    + (f'--cfg-options {shlex.quote(f"{place}.ann_file={file}")}' if plain else
                       f'set it to {str(file)!r} in the config.'))


def _check_ids(place: str, scored: str | None, files: list[Path]) -> None:
    images = [image for file in files for image in _images(file)]
    names = ', '.join(dict.fromkeys(map(str, files)))
    advice = ('Test one data set at a time, or write the images and annotations of all into one file, with ids of their own, '
              'for data set and metric.')
    shared = [i for i, count in Counter(i for i, _ in images).items() if count > 1]
    if shared:
        raise UserError(f'{place}: {len(files)} data sets are scored together, and {len(shared):,} image ids occur in more '
                        f'than one of them: {coco.some(shared)} ({names})\n'
                        f'Detections would be compared with the objects of other images. {advice}')
    if not scored:
        return
    if not Path(scored).is_file():
        raise UserError(f'{place}.ann_file={scored!r}: no such file\n{advice}')
    known = set(_images(Path(scored)))
    if Path(scored).resolve() not in {file.resolve() for file in files}:
        coco.take(scored)  # no data set will
    lost = [i for i, name in images if (i, name) not in known]
    if lost:
        raise UserError(f'{place}.ann_file={scored!r}: does not have {len(lost):,} of the {len(images):,} images of the '
                        f'{len(files)} data sets that are scored with it ({names}): ids {coco.some(lost)}\n{advice}')


def _images(file: Path) -> list[tuple[int | str, str]]:
    return [(image['id'], image['file_name'].rpartition('/')[2]) for image in coco.read(file)['images']]
