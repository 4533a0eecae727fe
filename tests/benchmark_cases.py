"""What tests of benchmarks share: a small config, what the C library is told, a record of the operator."""
import pytest

from replk_mm.analysis import benchmark, benchmark_op, benchmark_report
from replk_mm.analysis.benchmark_op import Shape

CONVNEXT = """
model = dict(backbone=dict(type='replk_mm.ConvNeXt', arch=dict(depths=[1, 1], channels=[8, 16]), out_indices=(0, 1),
                           gap_before_final_norm=False, init_cfg=dict(type='Pretrained', checkpoint='nowhere.pth')))
test_dataloader = dict()
"""


@pytest.fixture(scope='module', autouse=True)
def allocators():
    """What the C library is told, without telling it: this process runs other tests too."""
    told = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(benchmark, 'keep_freed_memory', lambda keep=True: told.append(keep) or False)
        patch.setattr(benchmark, 'trim', lambda: told.append('trimmed'))
        yield told


@pytest.fixture
def convnext(tmp_path):
    """A config of a small ConvNeXt, whose backbone alone can be measured."""
    path = tmp_path / 'convnext.py'
    path.write_text(CONVNEXT)
    return str(path)


@pytest.fixture(scope='module')
def operators():
    record = benchmark_op.run([Shape(k, size, 4, 1) for size in (8, 12) for k in (3, 9)], implementations=['fft', 'padded'],
                              repeats=3, warmup=0, seconds=0.)
    return {**record, 'environment': benchmark_report.environment(False)}
