"""The kinds of procedural scenes, by the names that commands and suites know them by."""
from replk_mm.data.demo_conflict import CONFLICT
from replk_mm.data.demo_context import CONTEXT
from replk_mm.data.demo_writer import DEMO, SceneKind

SCENES: dict[str, SceneKind] = {kind.name: kind for kind in (DEMO, CONTEXT, CONFLICT)}
