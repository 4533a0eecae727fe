"""Registries of the scope ``replk_mm``, children of mmengine's.

mmengine imports this module by itself when it meets a type such as ``replk_mm.RepLKNet``, and the ``locations`` when it
builds one, so a config of any OpenMMLab project can name our modules without ``custom_imports``.
"""
from importlib import import_module

from mmengine.registry import HOOKS as MMENGINE_HOOKS
from mmengine.registry import METRICS as MMENGINE_METRICS
from mmengine.registry import MODELS as MMENGINE_MODELS
from mmengine.registry import OPTIM_WRAPPERS as MMENGINE_OPTIM_WRAPPERS
from mmengine.registry import TRANSFORMS as MMENGINE_TRANSFORMS
from mmengine.registry import Registry

from replk_mm import compat

compat.allow_harmless_pickles()

SCOPE = 'replk_mm'


class ModelRegistry(Registry):
    """A registry whose parts for segmentors, which import mmseg, are imported when one of them is named."""

    segmentation = frozenset({'EncoderDecoder', 'FCNHead', 'UPerHead'})

    def get(self, key: str) -> type | None:
        """The class of that name, with or without the scope before it."""
        if isinstance(key, str) and key.removeprefix(f'{self.scope}.') in self.segmentation:
            import_module('replk_mm.models.segmentation')
        return super().get(key)


#: Backbones and their layers. Building those imports neither mmseg nor mmdet.
MODELS = ModelRegistry('model', scope=SCOPE, parent=MMENGINE_MODELS, locations=['replk_mm.models'])

#: Checks that run inside a data pipeline.
TRANSFORMS = Registry('transform', scope=SCOPE, parent=MMENGINE_TRANSFORMS, locations=['replk_mm.data.transforms'])

#: Training on CPUs in bfloat16.
OPTIM_WRAPPERS = Registry('optim_wrapper', scope=SCOPE, parent=MMENGINE_OPTIM_WRAPPERS,
                          locations=['replk_mm.engine.optim'])

#: What runs beside training. Building from it imports the engine.
HOOKS = Registry('hook', scope=SCOPE, parent=MMENGINE_HOOKS, locations=['replk_mm.engine.runner'])

#: Metrics that keep the figures of every class. Building from it imports mmseg.
METRICS = Registry('metric', scope=SCOPE, parent=MMENGINE_METRICS, locations=['replk_mm.engine.metrics'])
