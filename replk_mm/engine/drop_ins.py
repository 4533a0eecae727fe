"""Data sets, metrics and test-time augmentation of the libraries replaced by ours, which do the same and more."""
from pathlib import Path

from mmengine.config import Config, ConfigDict

from replk_mm.data.checks import as_list, datasets_of

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
    found = [metric for key in ('val_evaluator', 'test_evaluator') for metric in as_list(cfg.get(key))
             if metric.get('type') in _METRICS]
    for metric in found:
        metric['type'] = _METRICS[metric['type']]
    return found


def export_predictions(metrics: list[ConfigDict], folder: Path) -> None:
    """Let metrics write what was predicted: label maps as PNG, or boxes and masks as COCO's result files.

    Args:
        metrics: From :func:`use_drop_ins`.
        folder: ``NAME.png`` for segmentation; ``instances.bbox.json`` and ``instances.segm.json`` for detection.
    """
    for metric in metrics:
        if metric['type'] == 'replk_mm.IoUMetric':
            metric['output_dir'] = str(folder)
        else:
            metric['outfile_prefix'] = str(folder / 'instances')
