"""The kinds of procedural scenes."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from replk_mm.data.scenes.context import CONTEXT_CLASSES, CONTEXT_PALETTE, CONTEXT_VERSION, make_context_scene
from replk_mm.data.scenes.cue_conflict import CUE_CONFLICT_VERSION, list_objects, make_cue_conflict_scene
from replk_mm.data.scenes.layouts import LAYOUTS, Meta
from replk_mm.data.scenes.render import make_scene
from replk_mm.data.scenes.spec import GENERATOR_VERSION


@dataclass(frozen=True)
class SceneKind:
    """A kind of scenes.

    Attributes:
        name: Its key in :data:`SCENES`; part of file names and of ``meta.json``.
        version: Increases whenever a seed gives other scenes than before.
        make: Draws a scene from (seed, split, index, size). The scene has ``image``, ``label`` and, for the layout of
            COCO, ``instances``, as :class:`~replk_mm.data.scenes.render.Scene`.
        layouts: Keys of :data:`LAYOUTS` that can store it. Defaults to all.
        extra_splits: Further splits, and their scenes per validation scene. Defaults to none.
        list_objects: Gives the content of :data:`LISTING`, from that of ``meta.json``. Defaults to no such file.
        meta: Entries of ``meta.json`` that replace those of the layout. Defaults to none.
    """

    name: str
    version: int
    make: Callable[[int, str, int, tuple[int, int]], Any]
    layouts: tuple[str, ...] = tuple(LAYOUTS)
    extra_splits: Mapping[str, int] = field(default_factory=dict)
    list_objects: Callable[[Meta], str] | None = None
    meta: Mapping[str, Any] = field(default_factory=dict)


_CONTEXT_META = dict(classes=list(CONTEXT_CLASSES), palette=[list(colour) for colour in CONTEXT_PALETTE])
_KINDS = (
    SceneKind('demo', GENERATOR_VERSION, make_scene),
    SceneKind('context', CONTEXT_VERSION, make_context_scene, ('ade20k',), meta=_CONTEXT_META),
    SceneKind('conflict', CUE_CONFLICT_VERSION, make_cue_conflict_scene, ('ade20k',), {'conflict': 2}, list_objects),
)
#: All kinds, by the name that commands and suites use.
SCENES: dict[str, SceneKind] = {kind.name: kind for kind in _KINDS}
