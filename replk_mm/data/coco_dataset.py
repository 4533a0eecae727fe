"""COCO-style data whose labels are matched by name."""

from typing import Any

from mmdet.datasets import CocoDataset as MMDetCocoDataset
from mmdet.datasets.api_wrappers import COCO

from replk_mm.registry import DATASETS


def categories_by_name(api: COCO, classes: list[str] | tuple[str, ...]) -> list[int | None]:
    """For each class the id of the annotation file's category of that name, None where the file has none."""
    ids = {category['name']: i for i, category in api.cats.items()}
    return [ids.get(name) for name in classes]


class _ByName(COCO):
    """pycocotools' index, which returns one id for each class asked for."""

    def get_cat_ids(self, cat_names: Any = [], sup_names: Any = [], cat_ids: Any = []) -> list:  # noqa: B006 (mmdet's)
        return categories_by_name(self, cat_names)


@DATASETS.register_module()
class CocoDataset(MMDetCocoDataset):
    """mmdet's data set, where class ``i`` of the metainfo is label ``i`` whatever categories the annotation file has.

    mmdet numbers the categories that a file shares with the metainfo in the file's order: with a file that has only
    some of the 80 classes, or another order, label 2 is another class than in the metainfo and in a checkpoint.
    """

    COCOAPI = _ByName
