"""Reading a config and fitting it to a machine: errors name the field, each change is logged."""

import copy
import logging
import sys
from functools import cache

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import PARAM_SCHEDULERS
from tiny import ROOT, tiny  # noqa: F401

from replk_mm import register_configs
from replk_mm.engine import config
from replk_mm.engine.config import (
    build_model,
    fit_to_machine,
    load_config,
    replace_type,
    set_data_root,
    shorten_schedule,
)
from replk_mm.engine.config_errors import explain_build_errors
from replk_mm.engine.prepare import prepare_training
from replk_mm.engine.process import RunOptions
from replk_mm.errors import UserError

SMALL = """
model = dict(decode_head=dict(in_channels=[1, 2]))
crop_size = (8, 8)
param_scheduler = [dict(type='PolyLR')]
train_dataloader = dict(batch_size=1)
optim_wrapper = dict(optimizer=dict(lr=1))
test_dataloader = dict()
"""
NANO = str(ROOT / 'configs' / 'upernet_replk-nano_ade20k.py')


@cache
def _nano() -> Config:
    return load_config(NANO)


def nano(options: dict | None = None) -> Config:
    """The nano config, read once."""
    cfg = copy.deepcopy(_nano())
    cfg.merge_from_dict(options or {})
    return cfg


def first_line(info) -> str:
    return str(info.value).splitlines()[0]


def write(folder, text: str, name: str = 'mine.py') -> str:
    (folder / name).write_text(text)
    return str(folder / name)


# -- reading ----------------------------------------------------------------------------------------------------------
def test_missing_config_is_named_with_its_neighbour():
    with pytest.raises(UserError, match='no such config') as info:
        load_config(NANO.replace('replk-nano', 'replknano'))
    assert 'upernet_replknano_ade20k.py' in first_line(info)
    assert NANO in str(info.value)


@pytest.mark.parametrize(
    'text',
    [
        'model = dict(\n',
        '_base_ = "./gone.py"\n',
        '_base_ = "mmseg::_base_/gone.py"\n',
        '_base_ = "nothere::x.py"\n',
        'model = undefined_name\n',
        'x = 1 / 0\n',
        'x = int("a")\n',
    ],
)
def test_unreadable_config_is_named(tmp_path, text):
    path = write(tmp_path, text)
    with pytest.raises(UserError, match='cannot be read') as info:
        load_config(path)
    assert path in first_line(info)


def test_installed_name_reads_the_same_config():
    assert load_config('replk_mm::upernet_replk-nano_ade20k.py').model == nano().model


@pytest.mark.parametrize('name', ['_base_/default_runtime.py', 'upernet/upernet_r50_4xb4-80k_ade20k-512x512.py'])
def test_bases_of_other_packages_without_pkg_resources(name, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, 'pkg_resources', None)  # as setuptools 82
    register_configs()
    assert load_config(write(tmp_path, f"_base_ = 'mmseg::{name}'"), needs=()).default_scope == 'mmseg'


def test_names_of_other_packages():
    cfg = load_config('mmseg::upernet/upernet_r50_4xb4-80k_ade20k-512x512.py')
    assert (cfg.model.type, cfg.model.backbone.depth) == ('EncoderDecoder', 50)
    with pytest.raises(UserError, match="'nothere'"):
        load_config('nothere::x.py')
    with pytest.raises(UserError, match='no such config') as info:
        load_config('mmseg::upernet/upernet_r50_4xb4-80k_ade20k-512.py')
    assert 'upernet_r50_4xb4-80k_ade20k-512x512.py' in str(info.value)


def test_parts_of_a_config_are_no_config(tmp_path):
    part = str(ROOT / 'configs/_base_/schedules/nano.py')
    with pytest.raises(UserError, match="no 'model'"):
        load_config(part)
    backbone = write(tmp_path, "model = dict(type='replk_mm.RepLKNet', arch='nano')\n")
    assert load_config(backbone, needs=('model',)).model.arch == 'nano'
    with pytest.raises(UserError, match="no 'test_dataloader'"):
        load_config(backbone)


def test_overrides_reach_the_config():
    cfg = load_config(NANO, {'model.backbone.arch': '31B', 'param_scheduler.0.end': 7, 'my_own': 3})
    assert (cfg.model.backbone.arch, cfg.param_scheduler[0].end, cfg.my_own) == ('31B', 7, 3)


def test_a_list_of_yaml_replaces_a_tuple():
    """mmcv takes a list for several scales."""
    scale = 'test_dataloader.dataset.pipeline.1.scale'
    cfg = load_config(NANO, {scale: [480, 360], 'model.decode_head.in_channels': [1, 2, 3, 4]})
    assert cfg.test_dataloader.dataset.pipeline[1].scale == (480, 360)
    assert cfg.model.decode_head.in_channels == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ('options', 'named'),
    [
        ({'param_scheduler.9.end': 3}, 'param_scheduler.9.end'),
        ({'model.decode_head.in_channels.x': 3}, 'in_channels.x'),
        ({'crop_size.x.y': 3}, 'crop_size.x.y'),
        ({'model': 3}, 'model'),
        ({'train_dataloder.batch_size': 3}, 'train_dataloder'),
        ({'optim_wraper.optimizer.lr': 3}, 'optim_wraper'),
    ],
)
def test_override_that_does_not_fit_is_named(tmp_path, options, named):
    with pytest.raises(UserError) as info:
        load_config(write(tmp_path, SMALL), options)
    assert '--cfg-options' in first_line(info)
    assert named in first_line(info)


def test_misspelt_override_gets_a_suggestion(tmp_path):
    with pytest.raises(UserError, match='Did you mean train_dataloader'):
        load_config(write(tmp_path, SMALL), {'train_dataloder.batch_size': 3})


@pytest.mark.parametrize(
    'name', ['optim_wraper', 'train_dataloder', 'default_hook', 'val_evaluater', 'param_schedulers']
)
def test_misspelt_field_is_named(name, tmp_path):
    with pytest.raises(UserError, match=f'{name}: no such field\nDid you mean'):
        load_config(write(tmp_path, f'{SMALL}{name} = dict()\n'))


def test_variables_of_ones_own_are_accepted(tmp_path):
    names = ('optimizer', 'train_pipeline', 'train_dataset', 'val_evaluator_dice', 'conv_cfg', 'max_iters', 'norm_cfg')
    load_config(write(tmp_path, SMALL + ''.join(f'{name} = dict()\n' for name in names)))


@pytest.mark.parametrize(('field', 'value'), [('optim_wrapper.clip_grad', 'max_norm'), ('model.neck', 'channels')])
def test_override_sets_fields_of_none(field, value, tmp_path):
    text = SMALL + 'optim_wrapper.update(clip_grad=None)\nmodel.update(neck=None)\n'
    assert load_config(write(tmp_path, text), {f'{field}.{value}': 1}).get(field.split('.')[0])[
        field.split('.')[1]
    ] == {value: 1}


@pytest.mark.parametrize('base', ['upernet_replk31b_ade20k.py', 'cascade-mask-rcnn_convnext-tiny_coco.py'])
def test_child_config_can_clip_gradients(base, tmp_path):
    child = f'_base_ = {str(ROOT / "configs" / base)!r}\noptim_wrapper = dict(clip_grad=dict(max_norm=1))\n'
    assert load_config(write(tmp_path, child)).optim_wrapper.clip_grad == {'max_norm': 1}


def test_missing_custom_import_is_named(tmp_path):
    text = SMALL + "custom_imports = dict(imports=['no_such_package_at_all'], allow_failed_imports=False)\n"
    with pytest.raises(UserError, match="cannot be read: No module named 'no_such_package_at_all'\nInstall"):
        load_config(write(tmp_path, text))


# -- the model --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ('options', 'named', 'suggestion'),
    [
        ({'model.backbone.with_pc': True}, 'model.backbone.with_pc', 'with_cp'),
        ({'model.decode_head.num_clases': 3}, 'model.decode_head.num_clases', 'num_classes'),
        ({'model.auxiliary_head.num_conv': 3}, 'model.auxiliary_head.num_conv', 'num_convs'),
        ({'model.bakbone.arch': 3}, 'model.bakbone', 'backbone'),
        ({'model.backbone.type': 'replk_mm.RepLKNat'}, "model.backbone.type='replk_mm.RepLKNat'", 'replk_mm.RepLKNet'),
        ({'model.decode_head.type': 'UPerHed'}, "model.decode_head.type='UPerHed'", 'UPerHead'),
    ],
)
def test_unknown_argument_or_type_names_its_field(options, named, suggestion):
    with pytest.raises(UserError) as info:
        build_model(nano(options), 'meta')
    assert named in first_line(info)
    assert NANO in first_line(info)
    assert f'Did you mean {suggestion}' in str(info.value)


@pytest.mark.parametrize(
    'options',
    [
        {'model.backbone.frozen_stages': 9},
        {'model.backbone.arch': '32B'},
        {'model.decode_head.in_channels': [8, 16]},
        {'model.decode_head.channels': -3},
        {'model.decode_head.num_classes': 'many'},
        {'model.backbone': 3},
        {'model.backbone.out_indices': [0, 7]},
    ],
)
def test_bad_value_is_a_user_error_with_the_config_and_a_reason(options):
    with pytest.raises(UserError, match='the model cannot be built: .') as info:
        build_model(nano(options), 'meta')
    assert NANO in first_line(info)


CONVNEXT = {
    '_delete_': True,
    'type': 'replk_mm.ConvNeXt',
    'arch': dict(depths=[1, 1, 1, 1], channels=[32, 64, 128, 48]),
    'out_indices': (0, 1, 2, 3),
    'gap_before_final_norm': False,
}
RESNET = {'_delete_': True, 'type': 'mmseg.ResNetV1c', 'depth': 18, 'norm_cfg': dict(type='BN')}
MASK_RCNN, FCOS = 'cascade-mask-rcnn_replk-nano_coco.py', 'fcos_replk31b_coco.py'


@pytest.mark.parametrize(
    ('name', 'options', 'told'),
    [
        (
            NANO,
            {'model.backbone': CONVNEXT},
            'model.decode_head.*built for 256 channels, its input has 48\n.*32, 64, 128, 48',
        ),
        (
            NANO,
            {'model.backbone': RESNET},
            'model.decode_head.*built for 32 channels, its input has 64\n.*64, 128, 256, 512',
        ),
        (
            NANO,
            {'model.auxiliary_head.in_channels': 9},
            'model.auxiliary_head.*built for 9 channels, its input has 128',
        ),
        (
            NANO,
            {'model.backbone': CONVNEXT | {'gap_before_final_norm': True}},
            'pooled .*\n.*gap_before_final_norm=False',
        ),
        (NANO, {'model.backbone.in_channels': 4}, 'model.backbone.*built for 4 channels, its input has 3\n.*data_prep'),
        (NANO, {'model.data_preprocessor.mean': [1.0] * 5}, 'model.backbone.*built for 3 channels, its input has 5'),
        (
            MASK_RCNN,
            {'model.neck.in_channels': [32, 64, 128, 255]},
            'model.neck.*built for 255 channels, its input has 256',
        ),
        (MASK_RCNN, {'model.neck.out_channels': 8}, 'model.rpn_head.* 8\nSet .* to model.neck.out_channels'),
        (FCOS, {'model.bbox_head.in_channels': 8}, 'model.bbox_head.*built for 8 channels, its input has 256'),
        (NANO, {'model.auxiliary_head.in_index': 4}, r'model.auxiliary_head.in_index=4: there are 4 feature maps'),
        (NANO, {'model.backbone.out_indices': (1, 2, 3)}, r'model.decode_head.in_index=\[0, 1, 2, 3\]: there are 3 '),
    ],
)
def test_parts_that_do_not_fit_together_are_named(name, options, told):
    cfg = nano(options) if name == NANO else load_config(f'replk_mm::{name}', options)
    with pytest.raises(UserError, match=told):
        build_model(cfg, 'meta')


@pytest.mark.parametrize('options', [{}, {'model.backbone.in_channels': 4, 'model.data_preprocessor.mean': [1.0] * 4}])
def test_parts_that_fit_together(options):
    assert not build_model(nano(options), 'meta').training


def test_package_of_a_type_that_is_not_installed_is_named():
    with pytest.raises(
        UserError, match='model.backbone.type=.no_such_package.ConvNeXt.: the package no_such_package is'
    ):
        build_model(nano({'model.backbone.type': 'no_such_package.ConvNeXt'}), 'meta')


@pytest.mark.parametrize(
    ('module', 'cause'),
    [
        ("raise RuntimeError('operator torchvision::nms does not exist')", 'operator torchvision::nms does not exist'),
        ('import no_such_package_at_all', "No module named 'no_such_package_at_all'"),
        ('from torch import no_such_name', "cannot import name 'no_such_name'"),
        ("assert False, 'MMCV==9 is used but incompatible'", 'MMCV==9 is used but incompatible'),
    ],
)
def test_import_that_fails_while_building_is_the_cause(module, cause, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(write(tmp_path, module, 'imported_late.py').rpartition('/')[0])
    with (
        pytest.raises(UserError, match='a package cannot be imported: ') as info,
        explain_build_errors(nano(), 'model'),
    ):
        import imported_late  # noqa: F401
    assert cause in first_line(info) and 'doctor' in str(info.value) and 'fields of' not in str(info.value)


@pytest.mark.parametrize(
    ('error', 'told'),
    [
        (TypeError('hook should be a dict, but got 42'), 'TypeError: hook should be a dict, but got 42'),
        (KeyError('lr'), 'KeyError: lr'),
        (RuntimeError('timm is not installed'), 'timm is not installed\nInstall'),
        (FileNotFoundError(2, 'No such file or directory', 'teacher.py'), ".*No such file or directory: 'teacher.py'"),
        (AssertionError(), 'AssertionError at engine/test_config.py:[0-9]+: raise error'),
    ],
)
def test_true_cause_is_shown(error, told):
    """The scope of a type, such as replk_mm.CheckedLoad, may not be imported yet; its types are not unknown."""
    cfg = nano({'custom_hooks': [dict(type='mmdet.NotImportedYet')]})
    with pytest.raises(UserError, match=f'the run cannot be built: {told}'), explain_build_errors(cfg, 'run'):
        raise error


def test_loop_that_is_built_with_its_loader_is_named():
    cfg = nano({'train_cfg': {'_delete_': True, 'type': 'replk_mm.EpochBasedTrainLoop', 'max_iters': 2}})
    with (
        pytest.raises(UserError, match='train_cfg.max_iters: replk_mm.EpochBasedTrainLoop does not'),
        explain_build_errors(cfg, 'train_dataloader'),
    ):
        raise TypeError("EpochBasedTrainLoop.__init__() got an unexpected keyword argument 'max_iters'")


# -- shortening -------------------------------------------------------------------------------------------------------
def rates(cfg: Config, iterations: int, base: float = 1.0) -> list[float]:
    """Learning rate of every iteration, from mmengine's own schedulers."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=base)
    schedulers = [
        PARAM_SCHEDULERS.build(copy.deepcopy(s), default_args=dict(optimizer=optimizer)) for s in cfg.param_scheduler
    ]
    found = []
    for _ in range(iterations):
        found.append(optimizer.param_groups[0]['lr'])
        optimizer.step()
        for scheduler in schedulers:
            scheduler.step()
    return found


def expected(iterations: int, warm_up: int, start: float = 1e-3) -> list[float]:
    """By hand: a line from 1 to 0 over all iterations, times a line from ``start`` to 1 over the first ``warm_up``."""
    decay = [1 - i / (iterations - 1) for i in range(iterations)]
    rise = [min(1.0, start + (1 - start) * i / (warm_up - 1)) if warm_up > 1 else 1.0 for i in range(iterations)]
    return [d * r for d, r in zip(decay, rise, strict=True)]


# 100 of 2000 iterations are warm-up; of 20, that is one, which has no room to rise.
@pytest.mark.parametrize(('iterations', 'warm_up'), [(4, 0), (20, 0), (200, 10), (2000, 100)])
def test_shortened_schedule_gives_the_table_by_hand(iterations, warm_up):
    cfg = nano()
    cfg.train_cfg.max_iters = 2000
    cfg.param_scheduler = [
        dict(type='LinearLR', start_factor=1e-3, by_epoch=False, begin=0, end=100),
        dict(type='PolyLR', power=1.0, eta_min=0.0, by_epoch=False, begin=0, end=2000),
    ]
    line, _ = shorten_schedule(cfg, iterations)
    assert str(iterations) in line
    assert '2000' in line
    found = rates(cfg, iterations)
    assert found == pytest.approx(expected(iterations, warm_up), abs=1e-6)
    assert found[-1] == pytest.approx(0, abs=1e-6)
    if warm_up:
        assert found[warm_up - 1] == pytest.approx(1 - (warm_up - 1) / (iterations - 1), abs=1e-6)


@pytest.mark.parametrize(('iterations', 'interval'), [(4, 1), (60, 3), (1000, 20)])
def test_shortened_run_logs_on_its_way(iterations, interval):
    cfg = nano()
    assert cfg.default_hooks.logger.interval == 20
    shorten_schedule(cfg, iterations)
    assert cfg.default_hooks.logger.interval == interval


def epoch_config(**scheduler) -> Config:
    return Config(
        dict(
            train_cfg=dict(type='EpochBasedTrainLoop', max_epochs=12, val_interval=1),
            param_scheduler=[
                dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=500),
                dict(type='MultiStepLR', begin=0, end=12, by_epoch=True, milestones=[8, 11], gamma=0.1, **scheduler),
            ],
            default_hooks=dict(checkpoint=dict(type='CheckpointHook', interval=1)),
        )
    )


@pytest.mark.parametrize('more', [{}, {'convert_to_iter_based': True}])
def test_epochs_become_iterations_in_proportion(more):
    cfg = epoch_config(**more)
    shorten_schedule(cfg, 120)
    found = rates(cfg, 120)
    rise = [min(1.0, 0.01 + 0.99 * i / 11) for i in range(120)]  # a tenth of the run
    steps = [1.0 if i < 80 else 0.1 if i < 110 else 0.01 for i in range(120)]
    assert found == pytest.approx([r * s for r, s in zip(rise, steps, strict=True)], rel=1e-4)
    assert cfg.train_cfg.type == 'IterBasedTrainLoop'
    assert cfg.default_hooks.checkpoint.by_epoch is False
    assert cfg.log_processor.by_epoch is False
    assert cfg.default_hooks.checkpoint.interval == 120


def test_shortening_a_step_schedule_moves_its_steps():
    cfg = Config(
        dict(
            train_cfg=dict(type='IterBasedTrainLoop', max_iters=1000),
            param_scheduler=dict(type='StepLR', by_epoch=False, step_size=300, gamma=0.1),
        )
    )
    shorten_schedule(cfg, 10)
    assert rates(cfg, 10) == pytest.approx([1.0] * 3 + [0.1] * 3 + [0.01] * 3 + [0.001])
    assert cfg.default_hooks.checkpoint.interval == 10


def test_shortening_without_a_length_is_rejected():
    with pytest.raises(UserError, match='--max-iters'):
        shorten_schedule(Config(dict(train_cfg=dict(type='IterBasedTrainLoop'))), 3)


# -- this machine -----------------------------------------------------------------------------------------------------
def machine_config(**optim) -> Config:
    norm = dict(type='SyncBN', requires_grad=True)
    return Config(
        dict(
            model=dict(
                backbone=dict(norm_cfg=dict(norm)),
                heads=[dict(norm_cfg=dict(norm), convs=[dict(type='MMSyncBN')])],
                decode_head=dict(norm_cfg=dict(type='GN', num_groups=4)),
            ),
            env_cfg=dict(dist_cfg=dict(backend='nccl')),
            optim_wrapper=dict(type='OptimWrapper', optimizer=dict(type='SGD', lr=1.0)) | optim,
            **{f'{s}_dataloader': dict(num_workers=999, persistent_workers=True) for s in ('train', 'val', 'test')},
        )
    )


def test_synchronized_norms_become_plain_ones_everywhere():
    cfg = machine_config()
    notes = fit_to_machine(cfg, None, 'cpu', 1)
    assert 'SyncBN' not in str(cfg.model)
    assert cfg.model.decode_head.norm_cfg.type == 'GN'
    assert any('SyncBN' in n and '3 places' in n for n in notes)


def test_one_gpu_alone_gets_plain_norms_and_several_keep_them():
    alone, several = machine_config(), machine_config()
    several.launcher = 'pytorch'
    assert any('SyncBN' in n for n in fit_to_machine(alone, None, 'cuda', 1))
    assert not any('SyncBN' in n for n in fit_to_machine(several, None, 'cuda', 8))
    assert (alone.model.backbone.norm_cfg.type, several.model.backbone.norm_cfg.type) == ('BN', 'SyncBN')


def test_processes_on_cpus_are_joined_by_gloo():
    cfg = machine_config()
    cfg.launcher = 'pytorch'
    notes = fit_to_machine(cfg, None, 'cpu', 2)
    assert cfg.env_cfg.dist_cfg.backend == 'gloo'
    assert any('gloo' in n for n in notes)
    assert any('replk_mm.SyncBN instead' in n and 'statistics of all processes' in n for n in notes)
    cfg = machine_config()
    fit_to_machine(cfg, None, 'cuda', 2)
    assert cfg.env_cfg.dist_cfg.backend == 'nccl'


def test_workers_fit_the_cores(monkeypatch):
    monkeypatch.setattr(config, 'usable_cores', lambda: 8)
    for device, processes, workers in (('cpu', 1, 4), ('cpu', 2, 2), ('cpu', 16, 1), ('cuda', 1, 8), ('cuda', 2, 4)):
        cfg = machine_config()
        notes = fit_to_machine(cfg, None, device, processes)
        for split in ('train', 'val', 'test'):
            assert cfg[f'{split}_dataloader'].num_workers == workers
            assert f'{split} data workers: {workers} instead of 999' in '\n'.join(notes)
            assert cfg[f'{split}_dataloader'].persistent_workers
    cfg = machine_config()
    cfg.val_dataloader.num_workers = 0
    assert 'val data workers: none, so no persistent_workers' in fit_to_machine(cfg, None, 'cpu', 1)
    assert 'persistent_workers' not in cfg.val_dataloader


AMP = dict(type='AmpOptimWrapper', loss_scale='dynamic')
BF16 = 'replk_mm.BFloat16OptimWrapper'


@pytest.mark.parametrize(
    ('configured', 'amp', 'device', 'kind', 'said'),
    [
        (AMP, None, 'cpu', 'OptimWrapper', 'float32 instead of float16'),
        (AMP | dict(dtype='float16'), None, 'cpu', 'OptimWrapper', 'float32 instead of float16'),
        (AMP | dict(dtype='bfloat16'), None, 'cpu', BF16, 'bfloat16'),
        (AMP, 'bf16', 'cpu', BF16, 'bfloat16'),
        ({}, 'bf16', 'cpu', BF16, 'bfloat16'),
        ({}, None, 'cpu', 'OptimWrapper', None),
        (dict(type=BF16), None, 'cpu', BF16, 'bfloat16'),
        (dict(type='TheirOwnWrapper', key=1), None, 'cpu', 'TheirOwnWrapper', None),
        (AMP, None, 'cuda', 'AmpOptimWrapper', None),
        ({}, 'fp16', 'cuda', 'AmpOptimWrapper', 'float16'),
        ({}, 'bf16', 'cuda', 'AmpOptimWrapper', 'bfloat16'),
        (dict(type=BF16), None, 'cuda', 'AmpOptimWrapper', 'bfloat16'),
    ],
)
def test_precision_follows_the_device(configured, amp, device, kind, said, monkeypatch):
    monkeypatch.setattr(config, 'has_bfloat16_instructions', lambda: True)
    cfg = machine_config(**configured)
    notes = [n for n in fit_to_machine(cfg, amp, device, 1) if n.startswith('precision')]
    assert cfg.optim_wrapper.type == kind
    assert (said in notes[0]) if said else not notes
    if device == 'cpu' and kind != 'TheirOwnWrapper':
        assert set(cfg.optim_wrapper) == {'type', 'optimizer'}
    if device == 'cuda' and kind == 'AmpOptimWrapper':
        wanted = 'bfloat16' if amp == 'bf16' or configured.get('type') == BF16 else cfg.optim_wrapper.get('dtype')
        assert cfg.optim_wrapper.get('dtype') == wanted


def test_half_precision_on_a_cpu_is_rejected():
    with pytest.raises(UserError, match='--amp fp16.*cpu'):
        fit_to_machine(machine_config(), 'fp16', 'cpu', 1)


@pytest.mark.parametrize('configured', [{}, AMP | dict(dtype='bfloat16'), dict(type=BF16)], ids=str)
def test_bfloat16_without_instructions_is_float32(configured, monkeypatch):
    monkeypatch.setattr(config, 'has_bfloat16_instructions', lambda: False)
    cfg = machine_config(**configured)
    (note,) = [n for n in fit_to_machine(cfg, 'bf16', 'cpu', 1) if n.startswith('precision')]
    assert cfg.optim_wrapper.type == 'OptimWrapper' and set(cfg.optim_wrapper) == {'type', 'optimizer'}
    assert 'float32 instead of bfloat16' in note and 'AVX-512' in note and note.level == logging.WARNING


def test_replace_type_counts():
    node = [dict(type='A', x=[dict(type='A'), (dict(type='B'),)])]
    assert replace_type(node, {'A': 'C', 'B': 'D'}) == 3
    assert node == [dict(type='C', x=[dict(type='C'), (dict(type='D'),)])]


def test_data_root_reaches_wrapped_sets_and_evaluators():
    leaf = dict(type='X', data_root='data/coco/', ann_file='a.json')
    cfg = Config(
        dict(
            model={},
            data_root='data/coco/',
            test_dataloader=dict(dataset=dict(leaf)),
            train_dataloader=dict(
                dataset=dict(
                    type='RepeatDataset', dataset=dict(type='ConcatDataset', datasets=[dict(leaf), dict(leaf)])
                )
            ),
            val_evaluator=dict(type='CocoMetric', ann_file='data/coco/annotations/val.json'),
            test_evaluator=[dict(type='CocoMetric', ann_file='elsewhere/val.json')],
        )
    )
    set_data_root(cfg, 'my\\1/data')
    assert cfg.data_root == cfg.test_dataloader.dataset.data_root == 'my\\1/data'
    assert [d.data_root for d in cfg.train_dataloader.dataset.dataset.datasets] == ['my\\1/data'] * 2
    assert cfg.val_evaluator.ann_file == 'my\\1/data/annotations/val.json'
    assert cfg.test_evaluator[0].ann_file == 'elsewhere/val.json'


@pytest.mark.parametrize('name', ['upernet_convnext-tiny_ade20k.py', 'upernet_replk31b_ade20k.py'])
def test_config_for_eight_gpus_is_ready_for_one_cpu(name, tiny, tmp_path):  # noqa: F811
    cfg = load_config(str(ROOT / 'configs' / name))
    notes = '\n'.join(
        prepare_training(
            cfg, RunOptions(data_root=str(tiny.data), work_dir=str(tmp_path), pretrained='none', device='cpu')
        )
    )
    assert 'SyncBN' not in str(cfg.model)
    assert cfg.optim_wrapper.type == 'OptimWrapper'
    assert 'init_cfg' not in cfg.model.backbone
    for said in ('SyncBN runs on GPUs only; BN instead', 'weights: random', '4 with labels', 'learning rate'):
        assert said in notes
    build_model(cfg, 'meta')


def test_ctrl_c_that_mmengine_reports_as_a_faulty_config_stays_an_interruption():
    with pytest.raises(KeyboardInterrupt), explain_build_errors(Config(dict(model=dict())), 'model'):
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            raise SyntaxError('Failed to format the config file')  # noqa: B904 (as mmengine does)
