"""Two segmentation results, image by image: labels and predictions as the test read them."""

import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from mmengine.config import Config
from mmengine.registry import DATASETS
from PIL import Image

from replk_mm.bench.compare.results import DataSource, Result, load_result_config
from replk_mm.bench.records import read_inside
from replk_mm.data.checks.audit import check_data
from replk_mm.data.datasets import as_list, dataset_class, datasets_of, images_root
from replk_mm.data.files import IGNORE_INDEX
from replk_mm.errors import UserError
from replk_mm.evaluation.iou_metric import image_name
from replk_mm.evaluation.per_image import SegmentationCounts, count_pixels
from replk_mm.logs import show_progress


class SegmentationImages:
    """The images of two segmentation results.

    Args:
        pair: The results.
        source: Where data, config and classes are.
        root: Data root, None for the config's own.

    Attributes:
        names: Paths of the images below the image folder, without suffix; predictions have the same names.
        classes: Class names.
        palette: RGB of each class.
        ignore_index: Label of pixels that are not scored.
        labelled: Labelled pixels, ``(images, classes)``.
        predicted: Predicted pixels of A and B, ``(2, images, classes)``.
        intersection: Correctly predicted pixels of A and B, ``(2, images, classes)``.

    Raises:
        UserError: If data or predictions are missing, or are not those of the tests.
    """

    figure = overall_figure = 'mIoU'
    unit = '%'
    definition = (
        'mIoU is the mean IoU over the classes in its labels or its prediction, accuracy the share of its labelled '
        'pixels that are right; both in %, without unlabelled pixels'
    )

    def __init__(self, pair: tuple[Result, Result], source: DataSource, root: str | None) -> None:
        self.pair = pair
        self._open_labels(load_result_config(pair[0], source, root))
        for result in pair:
            self._check_predictions(result)
        shape = self.count, len(self.classes)
        self.labelled = np.zeros(shape, np.int64)
        self.predicted, self.intersection = np.zeros((2, *shape), np.int64), np.zeros((2, *shape), np.int64)
        for i in show_progress(range(self.count), 'images'):
            self._count_pixels(i)
        #: Of A and B.
        self.statistics = tuple(
            SegmentationCounts(
                images=tuple(self.names),
                classes=tuple(self.classes),
                intersection=self.intersection[which],
                predicted=self.predicted[which],
                label=self.labelled,
            )
            for which in (0, 1)
        )
        for which in (0, 1):
            self._check_reproduced(which)

    @property
    def count(self) -> int:
        """Number of images."""
        return len(self.names)

    def _open_labels(self, cfg: Config) -> None:
        check_data(cfg, ('test',))
        scope = cfg.get('default_scope', 'mmengine')
        datasets = []
        for part in datasets_of(cfg, ('test',)):
            if not hasattr(dataset_class(part, scope), 'get_label_map'):
                raise UserError(
                    f'{cfg.filename}: {part["type"]} is not a data set of label maps, unlike that of '
                    f'{self.pair[0].file}\nName the config of the test with --config FILE.'
                )
            with DATASETS.switch_scope_and_registry(scope) as registry:
                datasets.append(registry.build({**part, 'pipeline': [_loading_step(cfg, part)], 'test_mode': True}))
        self._entries: list[tuple[dict, Callable[[dict], dict]]] = [
            (built.get_data_info(i), built.pipeline) for built in datasets for i in range(len(built))
        ]
        metrics: Iterator[dict] = (
            m for m in as_list(cfg.get('test_evaluator')) if str(m.get('type')).endswith('IoUMetric')
        )
        meta = datasets[0].metainfo
        root = images_root(cfg)
        self.names = [str(image_name(info['img_path'], root)) for info, _ in self._entries]
        self.classes = list(meta['classes'])
        self.palette = [list(color) for color in meta['palette']]
        self.ignore_index = next(metrics, dict()).get('ignore_index', IGNORE_INDEX)
        self._first = int(meta['reduce_zero_label'])  # id of the first class in exported label maps

    def _check_predictions(self, result: Result) -> None:
        folder = result.predictions
        there = {str(path.relative_to(folder).with_suffix('')) for path in folder.rglob('*.png')}
        missing, unknown = sorted(set(self.names) - there), sorted(there - set(self.names))
        if missing or unknown:
            example = f'{missing[0]}.png is missing' if missing else f'{unknown[0]}.png belongs to no image'
            raise UserError(
                f'{folder}: not the predictions of the {self.count} images: {len(missing)} missing, {len(unknown)} of '
                f'other images ({example})\nName the data of the test with --data-root DIR, or test again with --out '
                f'{result.file.parent}. --no-images compares metrics only.'
            )

    def image_path(self, index: int) -> Path:
        """The file of an image."""
        return Path(self._entries[index][0]['img_path'])

    def label(self, index: int) -> np.ndarray:
        """Class indices ``(H, W)`` of an image."""
        info, load = self._entries[index]
        return np.asarray(load({**info, 'seg_fields': []})['gt_seg_map'])

    def prediction(self, index: int, result: Result) -> np.ndarray:
        """Class indices ``(H, W)`` that a result predicts; values beyond the classes where it predicts none.

        Raises:
            UserError: If the file cannot be read.
        """
        path = result.predictions / f'{self.names[index]}.png'
        try:
            return np.asarray(Image.open(io.BytesIO(read_inside(path, result.predictions)))) - np.uint8(self._first)
        except Exception as error:  # decoders raise anything
            raise UserError(f'{path}: cannot be read ({error})\nTest again with --out {result.file.parent}.') from error

    def _count_pixels(self, index: int) -> None:
        label = self.label(index)
        for j, result in enumerate(self.pair):
            prediction = self.prediction(index, result)
            if prediction.shape != label.shape:
                raise UserError(
                    f'{result.predictions / self.names[index]}.png: {prediction.shape} pixels, the labels '
                    f'{label.shape} ({self._entries[index][0]["seg_map_path"]})\nName the data of the test with '
                    f'--data-root DIR, or test again.'
                )
            self.intersection[j, index], self.predicted[j, index], self.labelled[index] = count_pixels(
                prediction, label, len(self.classes), self.ignore_index
            )

    def _check_reproduced(self, which: int) -> None:
        """Labels and predictions must give the labelled pixels and the IoU of every class that the result states."""
        result, now = self.pair[which], dict(zip(self.classes, map(int, self.labelled.sum(0)), strict=True))
        then, iou = result.sizes(), self.statistics[which].per_class()[0]
        for name in {**then, **now}:
            if then.get(name, 0) != now.get(name, 0):
                raise UserError(
                    f'{result.file}: the labels are not those of the test: {now.get(name, 0)} pixels of {name} now, '
                    f'{then.get(name, 0)} then\nName data and classes of the test with --data-root, --config, '
                    f'--classes and --cfg-options.'
                )
        for name, value in zip(self.classes, iou, strict=True):
            stated = result.record.per_class.get(name, {}).get('IoU')
            if now[name] and (stated is None or abs(value - stated) > 1e-6):
                raise UserError(
                    f'{result.predictions}: not the predictions of {result.file}: IoU of {name} is {value:.4f} by '
                    f'them, and {stated} there\nTest again with --out {result.file.parent}.'
                )

    def scores(self) -> list[dict[str, Any]]:
        """mIoU and accuracy of each image with labels.

        Raises:
            UserError: If no image has a labelled pixel.
        """
        pixels = self.labelled.sum(1)
        if not pixels.any():
            raise UserError('no image has a labelled pixel\nName data with labels: --data-root DIR.')
        scores, miou = [], [counts.per_image() for counts in self.statistics]
        for i in np.flatnonzero(pixels):
            a, b = (float(of[i]) for of in miou)
            accuracy_a, accuracy_b = map(float, 100 * self.intersection[:, i].sum(1) / pixels[i])
            scores.append(
                dict(image=self.names[i], index=int(i), a=a, b=b, difference=b - a)
                | dict(accuracy_a=accuracy_a, accuracy_b=accuracy_b)
            )
        return scores

    def extras(self) -> dict[str, Any]:
        """Classes that are predicted but in no label; mIoU counts them as 0."""
        labelled, predicted = self.labelled.sum(0), self.predicted.sum(1)
        return dict(
            only_predicted=[
                dict(name=name, a=int(predicted[0, c]), b=int(predicted[1, c]))
                for c, name in enumerate(self.classes)
                if not labelled[c] and predicted[:, c].any()
            ]
        )


def _loading_step(cfg: Config, dataset: dict) -> dict:
    def steps(node) -> Iterator[dict]:
        for part in node if isinstance(node, (list, tuple)) else [node]:
            if isinstance(part, dict):
                yield part
                yield from steps(part.get('transforms', []))
            else:
                yield from steps(part)

    pipelines = steps([dataset.get('pipeline', []), cfg.get('tta_pipeline', [])])
    return next(
        (step for step in pipelines if str(step.get('type')).endswith('LoadAnnotations')), dict(type='LoadAnnotations')
    )
