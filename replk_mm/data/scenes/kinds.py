"""The kinds of procedural scenes."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from replk_mm.data.scenes.context import CONTEXT_CLASSES, CONTEXT_PALETTE, CONTEXT_VERSION, make_context_scene
from replk_mm.data.scenes.cue_conflict import CUE_CONFLICT_VERSION, list_objects, make_cue_conflict_scene, shape_of
from replk_mm.data.scenes.layouts import Meta
from replk_mm.data.scenes.render import make_scene
from replk_mm.data.scenes.spec import GENERATOR_VERSION, SHAPES


@dataclass(frozen=True)
class SceneKind:
    """A kind of scenes."""

    name: str  #: its key in :data:`SCENES`; part of file names and of ``meta.json``
    version: int  #: increases whenever a seed gives other scenes than before
    #: draws a scene from (seed, split, index, size). The scene has ``image``, ``label`` and, for the layout of
    #: COCO, ``instances``, as :class:`~replk_mm.data.scenes.render.Scene`
    make: Callable[[int, str, int, tuple[int, int]], Any]
    layouts: tuple[str, ...]  #: keys of :data:`LAYOUTS` that can store it, the default first
    #: further splits, and their scenes per validation scene
    extra_splits: Mapping[str, int] = field(default_factory=dict)
    #: gives the content of :data:`LISTING`, from that of ``meta.json``
    list_objects: Callable[[Meta], str] | None = None
    #: gives the class of a scene from the same arguments, for layouts with a folder for each class
    class_of: Callable[[int, str, int, tuple[int, int]], str] | None = None
    #: entries of ``meta.json`` that replace those of the layout
    meta: Mapping[str, Any] = field(default_factory=dict)


_CONTEXT_META = dict(classes=list(CONTEXT_CLASSES), palette=[list(colour) for colour in CONTEXT_PALETTE])
_KINDS = (
    SceneKind('demo', GENERATOR_VERSION, make_scene, ('ade20k', 'coco', 'cityscapes')),
    SceneKind('context', CONTEXT_VERSION, make_context_scene, ('ade20k',), meta=_CONTEXT_META),
    SceneKind('conflict', CUE_CONFLICT_VERSION, make_cue_conflict_scene, ('ade20k',), {'conflict': 2}, list_objects),
    SceneKind(
        'shapes',
        CUE_CONFLICT_VERSION,
        make_cue_conflict_scene,
        ('imagenet',),
        class_of=shape_of,
        meta=dict(classes=sorted(SHAPES)),  # data sets of folders number them in this order
    ),
)
#: All kinds, by the name that commands and suites use.
SCENES: dict[str, SceneKind] = {kind.name: kind for kind in _KINDS}
