"""Write procedural scenes in the layout of a known data set.

A run writes ``meta.partial.json``, then the scenes, and finally renames that file to ``meta.json``. The partial file
marks an interrupted run, which the same command resumes.
"""

import io
import json
import re
from pathlib import Path
from typing import Any

from PIL import Image

from replk_mm.data.scenes.kinds import SCENES, SceneKind
from replk_mm.data.scenes.layouts import (
    JPEG_QUALITY,
    LAYOUTS,
    LISTING,
    MAX_SCENES,
    CocoAnnotations,
    Layout,
    Meta,
    scene_stem,
)
from replk_mm.data.scenes.render import Scene
from replk_mm.errors import UserError
from replk_mm.files import write_atomic
from replk_mm.logs import show_progress

META, PARTIAL_META = 'meta.json', 'meta.partial.json'
GENERATOR = re.compile(r'replk_mm [a-z]+ scenes')
MIN_SIDE, MAX_SIDE = 64, 2048
# Full-resolution chroma keeps colours and fine textures.
_ENCODING: dict[str, dict[str, Any]] = {
    '.jpg': {'format': 'JPEG', 'quality': JPEG_QUALITY, 'subsampling': 0},
    '.png': {'format': 'PNG'},
}


def write_demo_data(
    out: str | Path,
    layout: str = 'ade20k',
    train: int = 200,
    val: int = 40,
    seed: int = 0,
    size: tuple[int, int] = (256, 256),
    overwrite: bool = False,
    kind: SceneKind = SCENES['demo'],
) -> Meta:
    """Write ``train`` and ``val`` procedural scenes under ``out``.

    Args:
        out: A folder that does not exist, is empty, or contains an interrupted run with the same settings.
        layout: A key of :data:`LAYOUTS`. Defaults to 'ade20k'.
        train: Number of training scenes. Defaults to 200.
        val: Number of validation scenes. Defaults to 40.
        seed: Scenes depend only on seed and size, not on the number of scenes. Defaults to 0.
        size: Height and width of a scene in pixels. Defaults to (256, 256).
        overwrite: Whether to first remove the files of an earlier run, and no others. Defaults to False.
        kind: The kind of scenes. Defaults to the demo scenes.

    Returns:
        Content of ``meta.json``.

    Raises:
        UserError: If an argument is out of range, or ``out`` cannot be written or contains other files.
    """
    out = Path(out)
    meta = _describe(kind, layout, train, val, seed, size)
    try:
        _prepare(out, meta, overwrite)
        for split in meta['scenes']:
            _write_split(out, kind, split, meta)
        if kind.list_objects:
            write_atomic(out / LISTING, kind.list_objects(meta))
        (out / PARTIAL_META).replace(out / META)
    except OSError as error:
        raise UserError(f'{error.filename or out}: cannot write the demo data: {error.strerror or error}') from error
    return meta


def _write_split(out: Path, kind: SceneKind, split: str, meta: Meta) -> None:
    count, seed, size = meta['scenes'][split], meta['seed'], (meta['size'][0], meta['size'][1])
    layout = LAYOUTS[meta['layout']]
    annotation_file = layout.annotation_file(split)
    annotations = CocoAnnotations(split, seed) if annotation_file else None
    for index in show_progress(range(count), f'{split} scenes'):
        name = kind.class_of(seed, split, index, size) if kind.class_of else ''
        files = [out / file for file in layout.files(split, scene_stem(split, index), name)]
        # Files are written atomically, so that those of an interrupted run are complete.
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
    """Check the settings and return the content of ``meta.json``."""
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
        'scenes': {'train': train, 'val': val, **{split: each * val for split, each in kind.extra_splits.items()}},
        **({'listing': LISTING} if kind.list_objects else {}),
        **LAYOUTS[layout].meta,
        **kind.meta,
    }


def _prepare(out: Path, meta: Meta, overwrite: bool) -> None:
    """Write the partial meta file of these settings, and remove scenes of other settings if ``overwrite``."""
    if out.is_file():
        raise UserError(f'{out}: is a file, not a folder\nChoose another path.')
    if out.is_dir() and any(out.iterdir()):
        complete, partial = _read_meta(out / META), _read_meta(out / PARTIAL_META)
        if complete is None and partial is None:
            raise UserError(f'{out}: is not empty, and was not written by this command\nChoose another folder.')
        if complete or partial != meta:
            if not overwrite:
                found = 'demo data' if complete else 'an interrupted run with other settings'
                raise UserError(f'{out}: contains {found}\nChoose another folder, or overwrite it (--overwrite).')
            _remove(out)
    write_atomic(out / PARTIAL_META, json.dumps(meta, indent=2) + '\n')


def _read_meta(path: Path) -> Meta | None:
    """The content of a meta file of this command; None if it does not exist or is another file."""
    try:
        meta = json.loads(path.read_text(encoding='utf-8'))
    except (FileNotFoundError, ValueError):
        return None
    known = isinstance(meta, dict) and GENERATOR.fullmatch(str(meta.get('generator'))) and meta.get('layout') in LAYOUTS
    return meta if known else None


def _remove(out: Path) -> None:
    """Remove the scenes of an earlier run, and no other files."""
    if (out / META).is_file():  # a run that stops half-way must not look complete
        (out / META).replace(out / PARTIAL_META)
    for layout in LAYOUTS.values():
        for split in layout.folders:
            for example in layout.files(split, '', '*'):
                for path in out.glob(f'{Path(example).parent}/demo_{split}_*'):
                    path.unlink()
            if annotation_file := layout.annotation_file(split):
                (out / annotation_file).unlink(missing_ok=True)
    (out / LISTING).unlink(missing_ok=True)


def _write_scene(scene: Scene, layout: Layout, files: list[Path]) -> None:
    for pixels, file in zip(layout.pixels(scene), files, strict=True):
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, **_ENCODING[file.suffix])
        write_atomic(file, buffer.getvalue())
