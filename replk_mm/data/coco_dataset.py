"""COCO-style data with labels that are matched by name."""

from typing import Any

from mmdet.datasets import CocoDataset as MMDetCocoDataset
from mmdet.datasets.api_wrappers import COCO

from replk_mm.registry import DATASETS


def categories_by_name(api: COCO, classes: list[str] | tuple[str, ...]) -> list[int | None]:
    """The category id of each class; None for classes that the annotation file lacks."""
    ids = {category['name']: i for i, category in api.cats.items()}
    return [ids.get(name) for name in classes]


class _ByName(COCO):
    """The index of pycocotools, with one id per class in the order of the classes."""

    def get_cat_ids(self, cat_names: Any = [], sup_names: Any = [], cat_ids: Any = []) -> list:  # noqa: B006 (mmdet's)
        return categories_by_name(self, cat_names)


@DATASETS.register_module()
class CocoDataset(MMDetCocoDataset):
    """The data set of mmdet, but label ``i`` is always class ``i`` of the metainfo.

    mmdet numbers the categories in the order of the annotation file. If the file lacks some of the 80 classes, or has
    another order, its labels are other classes than in the metainfo and in checkpoints.
    """

    COCOAPI = _ByName
