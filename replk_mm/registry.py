"""Registries of the scope ``replk_mm``, children of mmengine's.

mmengine imports this module when it finds a type such as ``replk_mm.RepLKNet``, and imports the ``locations`` when it
builds one. Configs of any OpenMMLab project can therefore use our types without ``custom_imports``.
"""

from importlib import import_module

from mmengine import registry as mmengine_registry
from mmengine.registry import Registry

SCOPE = 'replk_mm'


class LazyRegistry(Registry):
    """A registry that imports a module only when one of its classes is requested, because it imports mmseg or mmdet.

    Args:
        modules: The class names that each module registers.
    """

    def __init__(self, *args, modules: dict[str, tuple[str, ...]], **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.modules = {name: module for module, names in modules.items() for name in names}

    def get(self, key: str) -> type | None:
        """Return the class of that name, with or without the scope as prefix."""
        module = self.modules.get(key.removeprefix(f'{self.scope}.')) if isinstance(key, str) else None
        if module is not None:
            import_module(module)
        return super().get(key)


#: Backbones, layers, heads and segmentors. Building a backbone imports neither mmseg nor mmdet.
MODELS = LazyRegistry(
    'model',
    scope=SCOPE,
    parent=mmengine_registry.MODELS,
    locations=['replk_mm.backbones'],
    modules={
        'replk_mm.heads.linear': ('LinearHead',),
        'replk_mm.heads.segmentation': ('EncoderDecoder', 'FCNHead', 'SegTTAModel', 'UPerHead'),
    },
)

#: Data sets. Building one imports mmdet.
DATASETS = LazyRegistry(
    'dataset', scope=SCOPE, parent=mmengine_registry.DATASETS, modules={'replk_mm.data.coco_dataset': ('CocoDataset',)}
)

#: Steps of data pipelines.
TRANSFORMS = Registry(
    'transform', scope=SCOPE, parent=mmengine_registry.TRANSFORMS, locations=['replk_mm.data.transforms']
)

#: Optimizer wrappers, such as bfloat16 training on CPUs.
OPTIM_WRAPPERS = Registry(
    'optim_wrapper', scope=SCOPE, parent=mmengine_registry.OPTIM_WRAPPERS, locations=['replk_mm.engine.optim']
)

#: Optimizer constructors, such as layer-wise learning-rate decay.
OPTIM_WRAPPER_CONSTRUCTORS = Registry(
    'optimizer wrapper constructor',
    scope=SCOPE,
    parent=mmengine_registry.OPTIM_WRAPPER_CONSTRUCTORS,
    locations=['replk_mm.engine.optim'],
)

#: Hooks of training.
HOOKS = LazyRegistry(
    'hook',
    scope=SCOPE,
    parent=mmengine_registry.HOOKS,
    locations=['replk_mm.engine.hooks', 'replk_mm.engine.nonfinite', 'replk_mm.engine.preflight'],
    modules={'replk_mm.bench.suites.progress': ('ProgressFileHook',)},  # in the saved configs of a suite
)

#: Training loops.
LOOPS = Registry('loop', scope=SCOPE, parent=mmengine_registry.LOOPS, locations=['replk_mm.engine.loops'])

#: Metrics. Building one imports mmseg, mmdet or mmpretrain.
METRICS = LazyRegistry(
    'metric',
    scope=SCOPE,
    parent=mmengine_registry.METRICS,
    modules={
        'replk_mm.evaluation.iou_metric': ('IoUMetric',),
        'replk_mm.evaluation.coco_metric': ('CocoMetric',),
        'replk_mm.evaluation.accuracy': ('Accuracy',),
    },
)
