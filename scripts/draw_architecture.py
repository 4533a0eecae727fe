"""Draw the packages of replk_mm on their floors, with the imports between them, for docs/architecture.md.

Example:
    python scripts/draw_architecture.py docs/images/architecture.png

Floors and imports are those that tests/test_imports.py reads from the source and checks.
"""

import runpy
import sys
from collections import Counter
from pathlib import Path

import matplotlib

matplotlib.use('Agg')
import matplotlib.pyplot as plt
from matplotlib.patches import FancyBboxPatch

ROOT = Path(__file__).resolve().parents[1]
#: The flow of data: steps and the modules of each.
STEPS = (
    ('config', ('engine.config',)),
    ('prepare', ('engine.prepare',)),
    ('runner', ('engine.runner', 'engine.loops')),
    ('metric', ('evaluation',)),
    ('record', ('engine.record', 'bench.records')),
    ('report', ('bench.report',)),
)
#: Packages whose classes the engine builds by the names in a config, without importing them.
BUILT_BY_NAME = (('engine', 'evaluation'), ('engine', 'heads'))
#: Horizontal places of packages whose arrows would cross a box, from 0 to 10.
PLACES = {'evaluation': 1.4, 'data': 2.2, 'heads': 3.6, 'backbones': 6.6}
LINE = '#35506b'


def package_of(module: str) -> str:
    """The package, or the single file at the top, that a module belongs to. Programs belong to the top."""
    if module.endswith('.__main__'):
        return '__main__'
    return module.split('.')[1] if '.' in module else '__init__'


def direct_edges(edges: set[tuple[str, str]]) -> set[tuple[str, str]]:
    """The edges that no longer path implies: the transitive reduction of a graph without cycles."""

    def reaches(start: str, end: str) -> bool:
        return start == end or any(reaches(b, end) for a, b in edges if a == start)

    return {(a, b) for a, b in edges if not any(reaches(c, b) for x, c in edges if x == a and c != b)}


def draw_box(axes: plt.Axes, x: float, y: float, width: float, title: str, text: str, colour: str) -> None:
    """A box around ``(x, y)`` with a title and a line of text below it."""
    axes.add_patch(
        FancyBboxPatch((x - width / 2, y - 0.3), width, 0.6, boxstyle='round,pad=0.02', fc=colour, ec=LINE, lw=0.8)
    )
    axes.text(x, y + 0.1, title, ha='center', va='center', fontsize=10, fontweight='bold')
    axes.text(x, y - 0.16, text, ha='center', va='center', fontsize=7)


def draw_arrow(axes: plt.Axes, start: tuple[float, float], end: tuple[float, float], **style: object) -> None:
    """An arrow from one point to another."""
    axes.annotate('', end, start, arrowprops=dict(arrowstyle='-|>', color=LINE, shrinkA=0, shrinkB=0, **style))


def main(out: Path) -> None:
    """Draw the picture.

    Args:
        out: The file; its suffix gives the format.
    """
    source = runpy.run_path(str(ROOT / 'tests' / 'test_imports.py'))
    known, floors = source['KNOWN'], source['FLOORS']
    files = Counter(map(package_of, known))
    height = {name: len(floors) - i for i, floor in enumerate(floors) for name in floor}
    edges = {(package_of(a), package_of(b)) for a, others in source['IMPORTS'].items() for b in others}
    edges = {(a, b) for a, b in edges if a != b}
    upward = sorted((a, b) for a, b in edges if height[a] <= height[b])
    missing = [m for _, names in STEPS for m in names if f'replk_mm.{m}' not in known]
    if upward or missing:
        sys.exit(f'error: imports that do not go down: {upward}; modules of STEPS that do not exist: {missing}')

    packages = [[name for name in floor if files[name] > 1 and name != '__main__'] for floor in floors]
    packages = [floor for floor in packages if floor]
    place = {
        name: (PLACES.get(name, 5 + 4 * (i - (len(floor) - 1) / 2)), len(packages) - row)
        for row, floor in enumerate(packages)
        for i, name in enumerate(floor)
    }
    figure, axes = plt.subplots(figsize=(9, 0.85 * (len(packages) + 3)), layout='constrained')
    for name, (x, y) in place.items():
        draw_box(axes, x, y, 2, name, f'{files[name]} files', '#dbe9f6')
    for style, pairs in (
        ('-', direct_edges({(a, b) for a, b in edges if a in place and b in place})),
        ('--', BUILT_BY_NAME),
    ):
        for above, below in sorted(pairs):
            (x1, y1), (x2, y2) = place[above], place[below]
            draw_arrow(axes, (x1, y1 - 0.32), (x2, y2 + 0.32), ls=style, lw=1)
    singles = [name for floor in floors for name in floor if files[name] == 1 and height[name] < height['ops']]
    draw_box(axes, 5, 0, 9, 'single files, imported from every floor', ', '.join(singles), '#f3f3f3')
    top, step = len(packages) + 1.5, 8.3 / (len(STEPS) - 1)
    for i, (title, modules) in enumerate(STEPS):
        draw_box(axes, 0.85 + i * step, top, 1.4, title, '\n'.join(modules), '#fdf0d5')
        if i:
            draw_arrow(axes, (0.85 + i * step - 0.94, top), (0.85 + i * step - 0.72, top))
    axes.text(0.1, top + 0.5, 'Flow of data', fontsize=9, style='italic')
    axes.text(0.1, top - 0.9, 'Imports (dashed: built by the names in a config)', fontsize=9, style='italic')
    axes.set(xlim=(0, 10), ylim=(-0.5, top + 0.8))
    axes.axis('off')
    figure.savefig(out, dpi=110)
    print(f'written: {out}')


if __name__ == '__main__':
    main(Path(sys.argv[1]))
