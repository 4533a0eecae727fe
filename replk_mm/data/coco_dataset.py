"""COCO-style data with labels that are matched by name."""

import contextlib
import functools
from pathlib import Path
from typing import Any

from mmdet.datasets import CocoDataset as MMDetCocoDataset
from mmdet.datasets.api_wrappers import COCO

from replk_mm.data.coco import annotation_path, invalidate_cache, read_annotations
from replk_mm.registry import DATASETS


class CocoIndex(COCO):
    """The index of pycocotools with a category id per class, in the order of the classes, and annotation ids from 1.

    Args:
        source: Annotation file for :func:`replk_mm.data.coco.read_annotations`, or its content.
        images: Folder of the images.
    """

    def __init__(self, source: str | Path | dict | None = None, images: str | None = None) -> None:
        super().__init__()
        if source is not None:
            data: Any = source
            if not isinstance(source, dict):
                data = read_annotations(Path(source), None if images is None else Path(images))
                invalidate_cache()
            objects = [{'iscrowd': 0, **a, 'id': i} for i, a in enumerate(data.get('annotations', ()), 1)]
            self.dataset = {**data, 'annotations': objects}
            with contextlib.redirect_stdout(None):  # pycocotools prints
                self.createIndex()
            self.img_ann_map, self.cat_img_map = self.imgToAnns, self.catToImgs

    def get_cat_ids(self, cat_names: Any = [], sup_names: Any = [], cat_ids: Any = []) -> list:  # noqa: B006 (mmdet's)
        """The category id of each class; None for classes that the annotation file lacks."""
        ids = {category['name']: i for i, category in self.cats.items()}
        return [ids.get(name) for name in cat_names]


@DATASETS.register_module()
class CocoDataset(MMDetCocoDataset):
    """The data set of mmdet, but label ``i`` is always class ``i`` of the metainfo.

    mmdet numbers the categories in the order of the annotation file. If the file lacks some of the 80 classes, or has
    another order, its labels are other classes than in the metainfo and in checkpoints.
    """

    ann_file: str
    COCOAPI: Any = CocoIndex

    def load_data_list(self) -> list[dict]:
        """The images with their objects."""
        self.ann_file = str(annotation_path(Path(self.ann_file))) if '://' not in self.ann_file else self.ann_file
        self.COCOAPI = functools.partial(CocoIndex, images=self.data_prefix['img'])
        return super().load_data_list()
