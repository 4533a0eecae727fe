"""Data sets, metrics and test-time augmentation of the libraries replaced by ours, which do the same and more."""
import os
from pathlib import Path

from mmengine.config import Config, ConfigDict

from replk_mm.data.datasets import datasets_of, placed_metrics

_METRICS = {name: f'replk_mm.{kind}' for kind, scope in (('IoUMetric', 'mmseg'), ('CocoMetric', 'mmdet'))
            for name in (kind, f'{scope}.{kind}', f'replk_mm.{kind}')}
_DATASETS = dict.fromkeys(('CocoDataset', 'mmdet.CocoDataset'), 'replk_mm.CocoDataset')


def use_drop_ins(cfg: Config) -> list[ConfigDict]:
    """Let metrics keep the figures of every class, COCO labels go by name, and augmented testing hold one sum of its views.

    Args:
        cfg: Changed in place.

    Returns:
        The configs of the metrics that are ours now.
    """
    for dataset in datasets_of(cfg):
        dataset['type'] = _DATASETS.get(dataset['type'], dataset['type'])
    if 'tta_model' in cfg and cfg.tta_model.get('type') in ('SegTTAModel', 'mmseg.SegTTAModel'):
        cfg.tta_model['type'] = 'replk_mm.SegTTAModel'
    found = []
    for split in ('val', 'test'):
        # A data set of the user's own numbers labels its own way, as mmdet's metric then does.
        by_name = all(dataset['type'] == 'replk_mm.CocoDataset' for dataset in datasets_of(cfg, (split,)))
        for metric in placed_metrics(cfg, split).values():
            ours = _METRICS.get(metric.get('type'))
            if ours == 'replk_mm.IoUMetric' or (ours and by_name):
                metric['type'] = ours
                found.append(metric)
    return found


def export_predictions(cfg: Config, metrics: list[ConfigDict], folder: Path) -> None:
    """Let metrics write what was predicted: label maps as PNG, or boxes and masks as COCO's result files.

    Args:
        cfg: The config, for the place of its images.
        metrics: From :func:`use_drop_ins`.
        folder: For ``NAME.png``, in folders as the images; or for ``instances.bbox.json`` and ``instances.segm.json``.
    """
    roots = [Path(dataset.get('data_root') or '', (dataset.get('data_prefix') or {}).get('img_path') or '').resolve()
             for dataset in datasets_of(cfg, ('test',))]
    detections = 0
    for metric in metrics:
        if metric['type'] == 'replk_mm.IoUMetric':
            metric.update(output_dir=str(folder), images_root=os.path.commonpath(roots))
        else:
            detections += 1
            metric['outfile_prefix'] = str(folder / ('instances' if detections == 1 else f'instances_{detections}'))
