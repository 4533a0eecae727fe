"""Annotation files are read as the type of the data set reads them: its images are where it opens them."""
import contextlib
import io
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from check_data_cases import found, full
from coco_files import change, leaf, write_coco_root
from mmdet.datasets.api_wrappers import COCO
from mmengine.config import Config, ConfigDict
from test_check_data_coco import NAMES, config, root, train  # noqa: F401 (a fixture)

from replk_mm.data.checks import check_data, check_dataset
from replk_mm.data.datasets import coco_style
from replk_mm.registry import DATASETS

# ruff: noqa: F811 (fixtures that come from another file)


def opened(dataset: dict) -> list[str]:
    """The images that the library itself opens."""
    with contextlib.redirect_stdout(io.StringIO()):
        built = DATASETS.build({**dataset, 'pipeline': [], '_scope_': 'mmdet'})
    return [built.get_data_info(i)['img_path'] for i in range(len(built))]


def absolute(folder: Path, levels: int) -> str:
    return f'{folder}/' + f'../{folder.name}/' * levels


@pytest.mark.parametrize('levels', [0, 1])
def test_absolute_names_are_those_that_mmdet_opens(root, levels):
    for split in ('train', 'val'):
        place = absolute(root / f'{split}2017', levels)
        change(root / f'annotations/instances_{split}2017.json', lambda d, place=place: [
            image.update(file_name=f'{place}{image["file_name"]}') for image in d['images']])
    cfg = config(root)
    wanted = {path for split in ('train', 'val') for path in opened(cfg[f'{split}_dataloader'].dataset)}
    assert len(wanted) == 14 and all(Path(path).is_file() for path in wanted)
    result = full(cfg)
    assert not found(result) and {task.image for one in result.sets for task in one.survey.tasks} == wanted
    assert len(check_data(cfg, ('train', 'val'), None)) == 2


def test_absolute_name_of_no_file_is_named_as_it_is(root):
    change(train(root), lambda d: d['images'][2].update(file_name='/none/such.jpg'))
    problem = next(p for _, p in full(config(root)).found() if p.kind == 'image-missing')
    assert [item.path for item in problem.items] == ['/none/such.jpg']


def rewritten(root: Path, kind: str) -> dict:
    """A data set of a type that makes the names of its images from something else in the file, or from other names."""
    names = {'LVISV1Dataset': lambda i: dict(coco_url=f'http://images.cocodataset.org/train2017/{i["file_name"]}'),
             'LVISV05Dataset': lambda i: dict(file_name=f'COCO_train2014_{int(i["file_name"][:3]):012}.jpg'),
             'Objects365V2Dataset': lambda i: dict(file_name=f'images/v1/train2017/{i["file_name"]}')}[kind]
    if kind == 'LVISV05Dataset':
        for path in sorted((root / 'train2017').iterdir()):
            path.rename(path.with_name(f'{int(path.stem):012}.jpg'))

    def rename(d: dict) -> None:
        d['images'] = [dict(id=i['id'], width=i['width'], height=i['height'], not_exhaustive_category_ids=[],
                            neg_category_ids=[], **names(i)) for i in d['images']]

    change(root / 'annotations/instances_train2017.json', rename)
    return leaf(root, type=kind, data_prefix=dict(img='train2017' if kind == 'LVISV05Dataset' else ''),
                metainfo=dict(classes=NAMES))


@pytest.mark.parametrize('kind', ['LVISV1Dataset', 'LVISV05Dataset', 'Objects365V2Dataset'])
def test_types_that_rename_images_are_not_refused(tmp_path, kind, monkeypatch):
    # The package that mmdet reads LVIS with answers as pycocotools' index does.
    monkeypatch.setitem(sys.modules, 'lvis', SimpleNamespace(LVIS=COCO))
    dataset = rewritten(write_coco_root(tmp_path / 'data', NAMES), kind)
    paths = opened(dataset)
    assert len(paths) == 4 and all(Path(path).is_file() for path in paths)
    assert 'annotation file and image folder are there' in check_dataset(dataset, 'mmdet', None)
    cfg = Config(dict(default_scope='mmdet', model=dict(bbox_head=dict(num_classes=3)),
                      train_dataloader=dict(dataset=dataset)), cfg_text=' ', filename='own.py')
    assert not found(full(cfg))


@pytest.mark.parametrize(('kind', 'style'), [
    ('CocoDataset', True), ('replk_mm.CocoDataset', True), ('CityscapesDataset', True), ('DeepFashionDataset', True),
    ('LVISV1Dataset', False), ('LVISV05Dataset', False), ('LVISDataset', False), ('Objects365V2Dataset', False),
    ('CocoPanopticDataset', False), ('VOCDataset', False)])
def test_which_types_read_the_file_as_it_stands(kind, style):
    assert coco_style(ConfigDict(type=kind, ann_file='x.json'), 'mmdet') == style

