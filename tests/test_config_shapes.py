"""Data sets and metrics that a config writes in another shape than they have are named by their field."""
import pytest
from check_data_cases import full, seg_config
from coco_files import leaf, write_coco_root
from many_pairs import write
from mmengine.config import Config
from test_check_data_command import CONFIG, data, run  # noqa: F401 (a fixture)

from replk_mm.data import metric_files
from replk_mm.data.checks import check_data
from replk_mm.data.datasets import placed_datasets, placed_metrics
from replk_mm.engine.config import set_data_root
from replk_mm.engine.drop_ins import use_drop_ins
from replk_mm.errors import UserError

# ruff: noqa: F811 (fixtures that come from another file)
DATASET = 'train_dataloader.dataset'
NAMES = ('person', 'car', 'dog')


@pytest.mark.parametrize(('field', 'value', 'said'), [
    ('data_prefix', 'images', f"{DATASET}.data_prefix='images': a str"),
    ('data_prefix', ['images'], f"{DATASET}.data_prefix=['images']: a list"),
    ('data_prefix', dict(img_path=['a', 'b']), f"{DATASET}.data_prefix.img_path=['a', 'b']: a list"),
    ('ann_file', ['a.txt', 'b.txt'], f"{DATASET}.ann_file=['a.txt', 'b.txt']: a list"),
    ('data_root', ['a'], f"{DATASET}.data_root=['a']: a list"), ('data_root', 3, f'{DATASET}.data_root=3: a int'),
    ('metainfo', ['road'], f"{DATASET}.metainfo=['road']: a list"),
    ('filter_cfg', 32, f'{DATASET}.filter_cfg=32: a int'),
    ('type', None, f'{DATASET} has no type')])
def test_fields_of_a_data_set(tmp_path, field, value, said):
    write(tmp_path, 'training', 2)
    cfg = seg_config(tmp_path)
    cfg.pop('val_dataloader')
    cfg.train_dataloader.dataset[field] = value
    for ask in (lambda: check_data(cfg, ('train',), 8), lambda: full(cfg)):
        with pytest.raises(UserError) as info:
            ask()
        assert str(info.value).startswith(said) and len(str(info.value).splitlines()) > 1


@pytest.mark.parametrize(('loader', 'said'), [
    (dict(dataset=None), f'{DATASET}=None: a NoneType'), (dict(dataset='ADE20K'), f"{DATASET}='ADE20K': a str"),
    (dict(batch_size=2), f'{DATASET} is missing'),
    ('train', "train_dataloader='train': a str"),
    (dict(dataset=dict(type='ConcatDataset', datasets=['a', 'b'])), f"{DATASET}.datasets.0='a': a str"),
    (dict(dataset=dict(type='RepeatDataset', dataset=dict(data_root='x'))), f'{DATASET}.dataset has no type')])
def test_where_no_data_set_is(loader, said):
    cfg = Config(dict(default_scope='mmseg', train_dataloader=loader))
    with pytest.raises(UserError) as info:
        list(placed_datasets(cfg))
    assert str(info.value).startswith(said)


def test_what_libraries_take_is_not_refused(tmp_path):
    """No folder of labels, as of test images; no data root; folders without a key of their own."""
    for changes in (dict(data_prefix=dict(img_path='x', seg_map_path=None)), dict(data_root=None), dict(ann_file=None),
                    dict(metainfo=None), dict(filter_cfg=None), dict(ann_file=''), dict(data_prefix=None),
                    dict(data_root=tmp_path)):
        cfg = seg_config(tmp_path)
        cfg.train_dataloader.dataset.update(changes)
        assert [place for place, _ in placed_datasets(cfg)] == [DATASET, 'val_dataloader.dataset']
    cfg = Config(dict(val_evaluator=[dict(type='IoUMetric'), dict(type='CocoMetric')],
                      test_evaluator=dict(metrics=[dict(type='IoUMetric')])))
    assert list(placed_metrics(cfg, 'val')) == ['val_evaluator.0', 'val_evaluator.1']
    assert list(placed_metrics(cfg, 'test')) == ['test_evaluator'] and placed_metrics(cfg, 'train') == {}


@pytest.mark.parametrize(('metric', 'said'), [
    ('CocoMetric', "val_evaluator='CocoMetric': a str"), (['CocoMetric'], "val_evaluator.0='CocoMetric': a str"),
    (dict(metric='bbox'), 'val_evaluator has no type'), ([dict(type='CocoMetric'), 3], 'val_evaluator.1=3: a int'),
    (dict(type='CocoMetric', ann_file=['a.json']), "val_evaluator.ann_file=['a.json']: a list")])
def test_metrics(tmp_path, metric, said):
    root = write_coco_root(tmp_path / 'data', NAMES)
    cfg = Config(dict(default_scope='mmdet', model=dict(bbox_head=dict(num_classes=3)), val_dataloader=dict(
        dataset=leaf(root, 'val', metainfo=dict(classes=NAMES))), val_evaluator=metric), cfg_text=' ', filename='own.py')
    for ask in (lambda: check_data(cfg, ('val',), None), lambda: metric_files.check(cfg, 'val'), lambda: full(cfg),
                lambda: set_data_root(cfg, str(root)), lambda: use_drop_ins(cfg)):
        with pytest.raises(UserError) as info:
            ask()
        assert str(info.value).startswith(said) and len(str(info.value).splitlines()) > 1


def test_through_the_tool(data, monkeypatch, capsys):
    assert run(monkeypatch, CONFIG, '--data-root', data, '--cfg-options', f'{DATASET}.data_prefix=images') == 2
    assert capsys.readouterr().err.startswith(f"error: {DATASET}.data_prefix='images': a str")
