"""The memory of a training step is known before the first one, and a batch that cannot work is refused."""
import copy

import pytest
import torch
import torch.nn as nn
from mmengine.config import Config
from tiny import tiny  # noqa: F401

from replk_mm.data.datasets import crop_of
from replk_mm.engine import memory
from replk_mm.engine.config import build_model
from replk_mm.errors import UserError

GIB = 2**30


@pytest.fixture(scope='module')
def base(tiny):  # noqa: F811
    cfg = tiny.cfg()
    cfg.train_dataloader.batch_size = 8
    return cfg, build_model(cfg, 'meta')


@pytest.fixture
def cfg(base):
    return copy.deepcopy(base[0])


def first_line(info) -> str:
    return str(info.value).splitlines()[0]


def test_saved_activations_of_a_chain_of_convolutions_are_counted_to_the_byte():
    widths, batch, height, width, classes = [3, 8, 16, 5], 2, 24, 40, 7
    with torch.device('meta'):
        chain = nn.Sequential(*(nn.Conv2d(a, b, 3, padding=1) for a, b in zip(widths, widths[1:], strict=False)))
    # Autograd keeps the input and the weight of each convolution. Weights stay, with a gradient and two moments each.
    inputs = batch * height * width * sum(widths[:-1])
    weights = sum(9 * a * b for a, b in zip(widths, widths[1:], strict=False))
    biases = sum(widths[1:])
    logits = batch * height * width * classes
    by_hand = 4 * inputs + 4 * weights + 12 * (weights + biases) + 4 * 4 * logits
    found = memory.training_bytes(chain, batch, (height, width), classes) - memory._OVERHEAD
    assert found == by_hand


def test_one_tensor_kept_twice_counts_once():
    class Twice(nn.Module):
        def forward(self, x):
            return x.sin() + x.cos()  # both keep x

    assert memory.training_bytes(Twice(), 1, (10, 10), 0) - memory._OVERHEAD == 4 * 300


def test_need_grows_in_proportion_to_the_batch(base):
    need = [memory.training_bytes(base[1], b, (64, 64), 8) for b in (2, 3, 4)]
    steps = [b - a for a, b in zip(need, need[1:], strict=False)]
    assert min(steps) > 0
    assert max(steps) <= 1.02 * min(steps)


def test_recomputing_activations_needs_less(tiny):  # noqa: F811
    plain, saving = (build_model(tiny.cfg({'model.backbone.with_cp': cp}), 'meta') for cp in (False, True))
    assert memory.training_bytes(saving, 4, (64, 64), 8) < memory.training_bytes(plain, 4, (64, 64), 8)


def test_batch_that_fits_stays(cfg, base, monkeypatch):
    monkeypatch.setattr(memory, 'available_bytes', lambda: 64 * GIB)
    assert memory.fit_batch(cfg, base[1], 1) == []
    assert cfg.train_dataloader.batch_size == 8


def test_batch_is_lowered_to_the_largest_that_fits(cfg, base, monkeypatch):
    need = memory.training_bytes(base[1], 5, (64, 64), 8)
    monkeypatch.setattr(memory, 'available_bytes', lambda: int((need + 1) / 0.85) + 2)
    notes = memory.fit_batch(cfg, base[1], 1)
    assert cfg.train_dataloader.batch_size == 5
    assert '5 images a process instead of 8' in notes[0]


def test_processes_share_the_memory(cfg, base, monkeypatch):
    need = memory.training_bytes(base[1], 3, (64, 64), 8)
    monkeypatch.setattr(memory, 'available_bytes', lambda: int((2 * need + 4) / 0.85) + 2)
    memory.fit_batch(cfg, base[1], 2)
    assert cfg.train_dataloader.batch_size == 3


def test_nothing_fits(cfg, base, monkeypatch):
    monkeypatch.setattr(memory, 'available_bytes', lambda: GIB)
    with pytest.raises(UserError) as info:
        memory.fit_batch(cfg, base[1], 1)
    need = memory.training_bytes(base[1], 2, (64, 64), 8) / GIB
    assert first_line(info).startswith('images of 64x64 pixels')
    assert f'{need:.1f} GiB' in first_line(info)
    assert '0.8 GiB are free' in first_line(info)
    assert 'with_cp' in str(info.value)


def test_models_without_a_crop_or_a_dense_head_are_left_alone(cfg, base, monkeypatch):
    monkeypatch.setattr(memory, 'available_bytes', lambda: 0)
    assert memory.fit_batch(cfg, nn.Linear(1, 1), 1) == []
    cfg.model.data_preprocessor.pop('size')
    cfg.pop('crop_size')
    cfg.train_dataloader.dataset.pipeline = []
    assert memory.fit_batch(cfg, base[1], 1) == []


@pytest.mark.parametrize(('size', 'crop'), [((32, 48), (32, 48)), (16, (16, 16))])
def test_crop_of_a_config(size, crop):
    assert crop_of(Config(dict(model=dict(data_preprocessor=dict(size=size))))) == crop
    assert crop_of(Config(dict(model={}, crop_size=size))) == crop
    assert crop_of(Config(dict(model={}))) is None


def test_one_image_cannot_train_batch_norm_on_one_pixel(cfg):
    cfg.train_dataloader.batch_size = 1
    with pytest.raises(UserError, match='batch_size=1.*model.decode_head.*at least 2'):
        memory.check_batch(cfg, build_model(cfg, 'meta'))
    # torch agrees
    model = build_model(cfg).train()
    with pytest.raises(ValueError, match='more than 1 value per channel'):
        model.decode_head(model.extract_feat(torch.zeros(1, 3, 64, 64)))


@pytest.mark.parametrize('options', [
    {'type': 'GN', 'num_groups': 4}, {'type': 'SyncBN'}])
def test_one_image_trains_with_other_norms(cfg, options):
    cfg.train_dataloader.batch_size = 1
    cfg.model.decode_head.norm_cfg = options
    memory.check_batch(cfg, build_model(cfg, 'meta'))
    if options['type'] == 'GN':
        model = build_model(cfg).train()
        model.decode_head(model.extract_feat(torch.zeros(1, 3, 64, 64)))


@pytest.mark.parametrize('change', [dict(norm_cfg=None), dict(pool_scales=(2, 3))])
def test_one_image_trains_without_norm_or_without_pooling_to_a_pixel(cfg, change):
    cfg.train_dataloader.batch_size = 1
    cfg.model.decode_head.update(change)
    memory.check_batch(cfg, build_model(cfg, 'meta'))


def test_available_memory_is_what_the_system_says():
    free = memory.available_bytes()
    assert 0 < free < 2**50
    for line in open('/proc/meminfo') if free else ():  # noqa: SIM115, PTH123
        if line.startswith('MemTotal'):
            assert free <= int(line.split()[1]) * 1024


@pytest.mark.parametrize(('names', 'cache'), [(('memory.max', 'memory.current'), 0), (('memory.max', 'memory.current'), 300),
                                              (('memory.limit_in_bytes', 'memory.usage_in_bytes'), 300)])
def test_limit_of_a_container_counts_and_its_file_cache_does_not(tmp_path, names, cache):
    (tmp_path / names[0]).write_text('1000\n')
    (tmp_path / names[1]).write_text('900\n')
    (tmp_path / 'memory.stat').write_text(f'anon 600\nfile 300\ninactive_file {cache}\n')
    assert memory._left_in_group(tmp_path, *names, 10**9) == 100 + cache


def test_container_without_a_limit(tmp_path):
    (tmp_path / 'memory.max').write_text('max\n')
    (tmp_path / 'memory.current').write_text('900\n')
    assert memory._left_in_group(tmp_path, 'memory.max', 'memory.current', 77) == 77
    assert memory._left_in_group(tmp_path / 'none', 'memory.max', 'memory.current', 77) == 77
