"""The suites in configs/suites/: networks on generated scenes take a step and match their labels."""

from pathlib import Path

import pytest
import torch
from mmengine.structures import PixelData
from mmseg.structures import SegDataSample

from replk_mm import published
from replk_mm.bench.schema import read_suite
from replk_mm.bench.suites import plan
from replk_mm.engine.config import build_model, fit_to_machine, load_config

SUITES = Path(__file__).resolve().parents[2] / 'configs' / 'suites'
ROWS = [
    (path.stem, row.name)
    for path in sorted(SUITES.glob('*.yaml'))
    if path.stem != 'published'
    for row in read_suite(path).rows
    if row.protocol == 'finetune' and row.fraction == 100  # the others have the same networks
]


def model_of(suite_name: str, row_name: str):
    suite = read_suite(SUITES / f'{suite_name}.yaml')
    row = next(row for row in suite.rows if row.name == row_name)
    cfg = load_config(plan.config_path(row, suite), dict(row.options) or None)
    fit_to_machine(cfg, None, 'cpu', 1)
    return build_model(cfg), row


@pytest.mark.slow
@pytest.mark.parametrize(('suite', 'row'), ROWS)
def test_row_takes_a_step(suite, row):
    model, _ = model_of(suite, row)
    torch.manual_seed(0)
    sample = SegDataSample(
        gt_sem_seg=PixelData(data=torch.randint(model.decode_head.num_classes, (1, 64, 64))),
        metainfo=dict(img_shape=(64, 64), ori_shape=(64, 64), pad_shape=(64, 64)),
    )
    losses = model.loss(torch.randn(2, 3, 64, 64), [sample, sample])
    total = sum(value for name, value in losses.items() if 'loss' in name)
    total.backward()
    assert torch.isfinite(total)
    assert all(p.grad is not None for p in model.backbone.parameters())


@pytest.mark.parametrize('side', [3, 7, 13, 25, 31])
def test_kernels_match_the_labels(side):
    model, found = model_of('kernel_size', f'replk-{side}')
    blocks = [block.large_kernel for stage in model.backbone.stages for block in stage.blocks[::2]]
    assert {block.lkb_origin.conv.kernel_size for block in blocks} == {(side, side)}
    assert all(hasattr(block, 'small_conv') == (side > 3) for block in blocks)
    assert f'{side}x{side}' in found.label


def test_an_anchor_sees_patches_only():
    model, row = model_of('shape_bias', 'patches')
    image = torch.randn(1, 3, 96, 96, requires_grad=True)
    model.eval().backbone(image)[0][0, :, 12, 12].sum().backward()
    seen = image.grad.abs().sum((0, 1)) > 0
    assert seen.any(0).sum() == seen.any(1).sum() == 11 and '11x11' in row.label


@pytest.mark.slow
def test_rows_of_a_question_differ_in_nothing_else():
    """Same data, budget, seeds and learning rate, for the networks of one family."""
    for path in SUITES.glob('*.yaml'):
        if path.stem in ('published', 'demo', 'backbones', 'protocols'):
            continue
        suite = read_suite(path)
        rates = set()
        for row in suite.rows:
            cfg = load_config(plan.config_path(row, suite), dict(row.options) or None)
            if cfg.model.backbone.type == 'replk_mm.RepLKNet':
                rates.add((cfg.optim_wrapper.optimizer.lr, cfg.train_dataloader.batch_size))
        assert len(rates) <= 1
        assert len({(row.iterations, tuple(row.seeds)) for row in suite.rows}) == 1


def test_the_roadmap_has_the_steps_of_its_quoted_table():
    suite = read_suite(SUITES / 'convnext_roadmap.yaml')
    (name,) = suite.quotes
    group, _, regime = name.partition('.')
    steps = [row['arch'].removeprefix('50-') for row in published.table(group)[regime][1:] if 'arch' in row]
    assert [row.backbone for row in suite.rows] == [f'roadmap-nano-{step}' for step in steps]
    assert published.quote(name).rows[4] == ['depthwise conv', 78.28, 2.35]
