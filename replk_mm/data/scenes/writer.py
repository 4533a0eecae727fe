"""Write procedural demo scenes to disk in the layout of a known data set (replk_mm/data/scenes/layouts.py).

A run first writes ``meta.partial.json``, then the scenes, and last renames it to ``meta.json``: an interrupted run is
recognised by the partial file, and the same command resumes it.
"""

import io
import json
import re
from pathlib import Path
from typing import Any

from PIL import Image
from rich.console import Console
from rich.progress import track

from replk_mm.data.scenes.context import CONTEXT
from replk_mm.data.scenes.cue_conflict import CONFLICT
from replk_mm.data.scenes.layouts import (
    JPEG_QUALITY,
    LAYOUTS,
    LISTING,
    MAX_SCENES,
    CocoAnnotations,
    Layout,
    Meta,
    SceneKind,
    stem_of,
)
from replk_mm.data.scenes.render import Scene, make_scene
from replk_mm.data.scenes.spec import GENERATOR_VERSION
from replk_mm.errors import UserError
from replk_mm.files import write_atomic

META, PARTIAL_META = 'meta.json', 'meta.partial.json'
GENERATOR = re.compile(r'replk_mm [a-z]+ scenes')
MIN_SIDE, MAX_SIDE = 64, 2048
# Full-resolution chroma: the scenes' colours and fine textures are part of what a network is to see.
_ENCODING: dict[str, dict[str, Any]] = {
    '.jpg': {'format': 'JPEG', 'quality': JPEG_QUALITY, 'subsampling': 0},
    '.png': {'format': 'PNG'},
}

# Looked up when it is called, as every other name of this module.
DEMO = SceneKind('demo', GENERATOR_VERSION, lambda *key: make_scene(*key))
#: The kinds of procedural scenes, by the names that commands and suites know them by.
SCENES: dict[str, SceneKind] = {kind.name: kind for kind in (DEMO, CONTEXT, CONFLICT)}


def write_demo_data(
    out: str | Path,
    layout: str = 'ade20k',
    train: int = 200,
    val: int = 40,
    seed: int = 0,
    size: tuple[int, int] = (256, 256),
    overwrite: bool = False,
    progress: bool = False,
    kind: SceneKind = DEMO,
) -> Meta:
    """Write ``train`` and ``val`` procedural scenes under ``out``.

    Args:
        out: A folder that does not exist, is empty, or holds an interrupted run of the same settings.
        layout: A key of :data:`LAYOUTS`.
        train: Number of training scenes.
        val: Number of validation scenes.
        seed: Names the data set: the same seed and size give the same scenes, however many are written.
        size: Height and width of a scene in pixels. Defaults to (256, 256).
        overwrite: Remove what an earlier run wrote there, and nothing else, before writing.
        progress: Show a counter on standard error.
        kind: Of the scenes. Defaults to the demo scenes.

    Returns:
        What ``meta.json`` holds: classes, palette, seed, size, number of scenes, version of the generator.

    Raises:
        UserError: An argument is out of range, or ``out`` cannot be written or holds something else.
    """
    out = Path(out)
    meta = _describe(kind, layout, train, val, seed, size)
    try:
        _prepare(out, meta, overwrite)
        for split in meta['scenes']:
            _write_split(out, kind, split, meta, progress)
        if kind.listing:
            write_atomic(out / LISTING, kind.listing(meta))
        (out / PARTIAL_META).replace(out / META)
    except OSError as error:
        raise UserError(f'{error.filename or out}: cannot write the demo data: {error.strerror or error}') from error
    return meta


def _write_split(out: Path, kind: SceneKind, split: str, meta: Meta, progress: bool) -> None:
    count, seed, size = meta['scenes'][split], meta['seed'], (meta['size'][0], meta['size'][1])
    layout = LAYOUTS[meta['layout']]
    annotation_file = layout.annotation_file(split)
    annotations = CocoAnnotations(split, seed) if annotation_file else None
    for index in track(range(count), f'{split} scenes', console=Console(stderr=True), disable=not progress):
        files = [out / file for file in layout.files(split, stem_of(split, index))]
        # A file appears under its name only when whole, so what an interrupted run left is good.
        absent = not all(file.exists() for file in files)
        if absent or annotations:
            scene = kind.make(seed, split, index, size)
            if absent:
                _write_scene(scene, layout, files)
            if annotations:
                annotations.add(index, files[0].name, scene)
    if annotation_file and annotations:
        write_atomic(out / annotation_file, annotations.content())


def _describe(kind: SceneKind, layout: str, train: int, val: int, seed: int, size: tuple[int, int]) -> Meta:
    """Check the settings and lay out the content of ``meta.json``."""
    if layout not in LAYOUTS:
        raise UserError(f'layout: {layout!r} is not known; choose from: {", ".join(LAYOUTS)}')
    if layout not in kind.layouts:
        raise UserError(
            f'layout: {kind.name} scenes cannot be written as {layout}; choose from: {", ".join(kind.layouts)}'
        )
    for name, count in (('train', train), ('val', val)):
        if not 1 <= count <= MAX_SCENES:
            raise UserError(f'{name}: the number of scenes must be from 1 to {MAX_SCENES}, not {count}')
    if seed < 0:
        raise UserError(f'seed: must be 0 or more, not {seed}')
    if len(size) != 2 or not all(MIN_SIDE <= side <= MAX_SIDE for side in size) or max(size) > 2 * min(size):
        raise UserError(
            f'size: must be height and width, each {MIN_SIDE} to {MAX_SIDE} pixels and neither over twice '
            f'the other, not {" ".join(map(str, size))}'
        )
    return {
        'generator': f'replk_mm {kind.name} scenes',
        'generator_version': kind.version,
        'layout': layout,
        'seed': seed,
        'size': list(size),
        'scenes': {'train': train, 'val': val, **{split: each * val for split, each in kind.more.items()}},
        **({'listing': LISTING} if kind.listing else {}),
        **LAYOUTS[layout].meta,
        **kind.meta,
    }


def _prepare(out: Path, meta: Meta, overwrite: bool) -> None:
    """Leave in ``out`` a partial meta file of these settings, and no scene of other settings."""
    if out.is_file():
        raise UserError(f'{out}: is a file, not a folder; choose another path')
    if out.is_dir() and any(out.iterdir()):
        complete, partial = _read_meta(out / META), _read_meta(out / PARTIAL_META)
        if complete is None and partial is None:
            raise UserError(f'{out}: is not empty, and not written by this command; choose another folder')
        if complete or partial != meta:
            if not overwrite:
                found = 'holds demo data already' if complete else 'holds an interrupted run with other settings'
                raise UserError(f'{out}: {found}; choose another folder, or overwrite it (--overwrite)')
            _remove(out)
    write_atomic(out / PARTIAL_META, json.dumps(meta, indent=2) + '\n')


def _read_meta(path: Path) -> Meta | None:
    """The content of a meta file that this command wrote, or None."""
    try:
        meta = json.loads(path.read_text(encoding='utf-8'))
    except (FileNotFoundError, ValueError):
        return None
    known = isinstance(meta, dict) and GENERATOR.fullmatch(str(meta.get('generator'))) and meta.get('layout') in LAYOUTS
    return meta if known else None


def _remove(out: Path) -> None:
    """Remove the scenes of an earlier run, and nothing else."""
    if (out / META).is_file():  # an overwriting run that stops half-way must not leave it looking whole
        (out / META).replace(out / PARTIAL_META)
    for layout in LAYOUTS.values():
        for split in layout.folders:
            for example in layout.files(split, ''):
                for path in (out / example).parent.glob(f'demo_{split}_*'):
                    path.unlink()
            if annotation_file := layout.annotation_file(split):
                (out / annotation_file).unlink(missing_ok=True)
    (out / LISTING).unlink(missing_ok=True)


def _write_scene(scene: Scene, layout: Layout, files: list[Path]) -> None:
    for pixels, file in zip(layout.pixels(scene), files, strict=True):
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, **_ENCODING[file.suffix])
        write_atomic(file, buffer.getvalue())
