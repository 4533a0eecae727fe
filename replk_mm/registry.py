"""Registries of the scope ``replk_mm``, children of mmengine's.

mmengine imports this module by itself when it meets a type such as ``replk_mm.RepLKNet``, and the ``locations`` when it
builds one, so a config of any OpenMMLab project can name our modules without ``custom_imports``.
"""

from importlib import import_module

from mmengine.registry import DATASETS as MMENGINE_DATASETS
from mmengine.registry import HOOKS as MMENGINE_HOOKS
from mmengine.registry import LOOPS as MMENGINE_LOOPS
from mmengine.registry import METRICS as MMENGINE_METRICS
from mmengine.registry import MODELS as MMENGINE_MODELS
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS as MMENGINE_OPTIM_WRAPPER_CONSTRUCTORS
from mmengine.registry import OPTIM_WRAPPERS as MMENGINE_OPTIM_WRAPPERS
from mmengine.registry import TRANSFORMS as MMENGINE_TRANSFORMS
from mmengine.registry import Registry

SCOPE = 'replk_mm'


class LazyRegistry(Registry):
    """A registry some of whose modules, which import mmseg or mmdet, are imported when a class of theirs is named.

    Args:
        modules: Names of classes, by the module that registers them.
    """

    def __init__(self, *args, modules: dict[str, tuple[str, ...]], **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.modules = {name: module for module, names in modules.items() for name in names}

    def get(self, key: str) -> type | None:
        """The class of that name, with or without the scope before it."""
        module = self.modules.get(key.removeprefix(f'{self.scope}.')) if isinstance(key, str) else None
        if module is not None:
            import_module(module)
        return super().get(key)


#: Backbones and their layers. Building those imports neither mmseg nor mmdet.
MODELS = LazyRegistry(
    'model',
    scope=SCOPE,
    parent=MMENGINE_MODELS,
    locations=['replk_mm.backbones'],
    modules={'replk_mm.heads.segmentation': ('EncoderDecoder', 'FCNHead', 'SegTTAModel', 'UPerHead')},
)

#: Data sets that extend mmdet's, which they import.
DATASETS = LazyRegistry(
    'dataset', scope=SCOPE, parent=MMENGINE_DATASETS, modules={'replk_mm.data.coco_dataset': ('CocoDataset',)}
)

#: Checks that run inside a data pipeline.
TRANSFORMS = Registry('transform', scope=SCOPE, parent=MMENGINE_TRANSFORMS, locations=['replk_mm.data.transforms'])

#: Training on CPUs in bfloat16.
OPTIM_WRAPPERS = Registry(
    'optim_wrapper', scope=SCOPE, parent=MMENGINE_OPTIM_WRAPPERS, locations=['replk_mm.engine.optim']
)

#: Learning rates by layer. Building from it imports neither mmseg nor mmdet.
OPTIM_WRAPPER_CONSTRUCTORS = Registry(
    'optimizer wrapper constructor',
    scope=SCOPE,
    parent=MMENGINE_OPTIM_WRAPPER_CONSTRUCTORS,
    locations=['replk_mm.engine.optim'],
)

#: What runs beside training. Building from it imports the engine.
HOOKS = Registry(
    'hook',
    scope=SCOPE,
    parent=MMENGINE_HOOKS,
    locations=['replk_mm.engine.hooks', 'replk_mm.engine.nonfinite', 'replk_mm.engine.preflight'],
)

#: Training that can be stopped anywhere. Building from it imports the engine.
LOOPS = Registry('loop', scope=SCOPE, parent=MMENGINE_LOOPS, locations=['replk_mm.engine.loops'])

#: Metrics that keep the figures of every class. Building one imports the library whose metric it extends.
METRICS = LazyRegistry(
    'metric',
    scope=SCOPE,
    parent=MMENGINE_METRICS,
    modules={'replk_mm.evaluation.iou_metric': ('IoUMetric',), 'replk_mm.evaluation.coco_metric': ('CocoMetric',)},
)
