"""COCO's detection metrics with per-class scores, unrounded."""

import contextlib
import io
import re
import tempfile
from pathlib import Path

import numpy as np
from mmdet.datasets.api_wrappers import COCOeval
from mmdet.evaluation import CocoMetric as MMDetCocoMetric
from mmengine.fileio import dump, get_local_path, load
from mmengine.logging import print_log

from replk_mm.data.coco_dataset import CocoIndex
from replk_mm.errors import UserError
from replk_mm.evaluation.gather import GatheringMetric
from replk_mm.evaluation.per_image import DetectionMatches
from replk_mm.files import write_output
from replk_mm.registry import METRICS

#: Index in ``COCOeval.stats`` by mmdet's name. Scores without an IoU in the name average over IoU 0.5 to 0.95.
STATS = {'mAP': 0, 'mAP_50': 1, 'mAP_75': 2, 'mAP_s': 3, 'mAP_m': 4, 'mAP_l': 5}


@METRICS.register_module()
class CocoMetric(GatheringMetric, MMDetCocoMetric):
    """mmdet's COCO metric, computed by pycocotools from the result file that it writes, and not rounded.

    Names and meaning are mmdet's: fractions, at most 100 detections per image; NaN if the annotations contain no object
    of that size, 0 if the model finds nothing. Classes are matched by name, as in :class:`CocoDataset`; classes without
    a category in the annotation file are ignored. COCO's own settings are fixed: use mmdet's ``type='CocoMetric'`` to
    change them.

    Args:
        ann_file: Annotation file; None uses the annotations of the data samples.
        metric: ``'bbox'``, ``'segm'`` or a list of them.
        classwise: Also report ``{class}_precision`` for every class.
        format_only: Write the result files without computing scores.
        outfile_prefix: Prefix of the paths of the result files; None uses a temporary folder.
        backend_args: Arguments of mmengine's file backend.
        collect_device: See :class:`GatheringMetric`.
        prefix: Prefix of the names of the scores. Defaults to ``'coco'``.

    Raises:
        UserError: If ``metric`` has another value.

    Attributes:
        per_class: ``{class: {'bbox_mAP', 'bbox_mAP_50', ..., 'instances'}}`` of the annotated classes: fractions, and
            the number of annotated objects that are not crowds.
    """

    _coco_api: CocoIndex | None
    cat_ids: list[int] | None

    def __init__(
        self,
        ann_file: str | None = None,
        metric: str | list[str] = 'bbox',
        classwise: bool = False,
        format_only: bool = False,
        outfile_prefix: str | None = None,
        backend_args: dict | None = None,
        collect_device: str = 'gpu',
        prefix: str | None = None,
    ) -> None:
        names = [metric] if isinstance(metric, str) else list(metric)
        if not set(names) <= {'bbox', 'segm'}:
            raise UserError(
                f"replk_mm.CocoMetric: metric={metric!r}; it computes 'bbox' and 'segm'\n"
                f"Use mmdet's type='CocoMetric' for others."
            )
        super().__init__(
            metric=names,
            classwise=classwise,
            format_only=format_only,
            outfile_prefix=outfile_prefix,
            backend_args=backend_args,
            collect_device=collect_device,
            prefix=prefix,
        )
        if ann_file is not None:
            with get_local_path(ann_file, backend_args=backend_args) as path:
                self._coco_api = CocoIndex(path)

    def compute_metrics(self, results: list) -> dict[str, float]:
        """Compute the scores from ground truth and detections of all images.

        Raises:
            UserError: If ``metric`` includes ``'segm'`` and the model has no masks.
        """
        truths, found = zip(*results, strict=True)
        if 'segm' in self.metrics and 'masks' not in found[0]:
            raise UserError(
                "evaluator: metric 'segm' needs masks, but the model predicts boxes only\n"
                "Set metric='bbox' in val_evaluator and test_evaluator."
            )
        with tempfile.TemporaryDirectory() as folder:
            prefix = f'{folder}/results'
            if self._coco_api is None:
                self._coco_api = CocoIndex(self.gt_to_coco_json(truths, prefix))
            self.img_ids = sorted({truth['img_id'] for truth in truths})  # of a part of the file, others are not missed
            by_label = self._coco_api.get_cat_ids(self.dataset_meta['classes'])
            # In pycocotools' order.
            self.cat_ids = sorted(category for category in by_label if category is not None)
            kept = [self._select_known_categories(result, by_label) for result in found]
            files = self.results2json(kept, prefix)
            if 'segm' in files:  # pycocotools would take the area of a box for that of the mask
                dump([{k: v for k, v in d.items() if k != 'bbox'} for d in load(files['segm'])], files['segm'])
            for file in Path(folder).glob('*.json') if self.outfile_prefix else ():
                write_output(f'{self.outfile_prefix}{file.name.removeprefix("results")}', file.read_bytes())
            if self.format_only:
                return {}
            metrics: dict[str, float] = {}
            for kind in self.metrics:
                metrics.update(self._evaluate(kind, files[kind]))
        if self.classwise:  # mmdet's names
            metrics.update(
                {f'{name}_precision': figures[f'{self.metrics[-1]}_mAP'] for name, figures in self.per_class.items()}
            )
        return metrics

    def _select_known_categories(self, result: dict, by_label: list[int | None]) -> dict:
        """Detections of the categories of the annotation file, with indices in ``cat_ids`` as labels."""
        assert self.cat_ids is not None
        keep = [i for i, label in enumerate(result['labels']) if by_label[label] is not None]
        chosen = {key: value if key == 'img_id' else [value[i] for i in keep] for key, value in result.items()}
        return {**chosen, 'labels': [self.cat_ids.index(by_label[label]) for label in chosen['labels']]}

    def _evaluate(self, kind: str, file: str) -> dict[str, float]:
        assert self._coco_api is not None and self.cat_ids is not None
        found, empty = load(file), {**self._coco_api.dataset, 'annotations': []}
        with contextlib.redirect_stdout(io.StringIO()) as table:
            detections = self._coco_api.loadRes(found) if found else CocoIndex(empty)  # pycocotools rejects []
            evaluation = COCOeval(self._coco_api, detections, kind)
            evaluation.params.catIds, evaluation.params.imgIds = self.cat_ids, self.img_ids
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
        self.statistics[self.key(f'{kind}_mAP')] = DetectionMatches.from_coco(evaluation)
        lines = [line for line in table.getvalue().splitlines() if line.startswith(' Average')]
        lines = [re.sub(r'= (\d\.\d+)$', lambda found: f'= {100 * float(found[1]):.1f}', line) for line in lines]
        print_log('\n'.join([f'{kind}, in percent:', *lines]), logger='current')
        # (IoU, recall, class, area, most detections); -1 where there is nothing to find
        precision = evaluation.eval['precision'][:, :, :, 0, -1]
        for i, category in enumerate(self.cat_ids):
            of_class = np.where(precision[:, :, i] < 0, np.nan, precision[:, :, i])
            if np.isnan(of_class).all():
                continue
            objects = self._coco_api.loadAnns(self._coco_api.getAnnIds(self.img_ids, [category], iscrowd=False))
            self.per_class.setdefault(self._coco_api.cats[category]['name'], dict(instances=len(objects))).update(
                {
                    f'{kind}_mAP': float(of_class.mean()),
                    f'{kind}_mAP_50': float(of_class[0].mean()),
                    f'{kind}_mAP_75': float(of_class[5].mean()),
                }
            )
        return {
            f'{kind}_{name}': float(evaluation.stats[i]) if evaluation.stats[i] >= 0 else float('nan')
            for name, i in STATS.items()
        }
