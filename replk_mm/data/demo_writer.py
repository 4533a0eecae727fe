"""Write procedural demo scenes to disk in the layout of a known data set (replk_mm/data/demo_layouts.py).

A run first writes ``meta.partial.json``, then the scenes, and last renames it to ``meta.json``: an interrupted run is
recognised by the partial file, and the same command carries on where it stopped.
"""
import io
import json
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from replk_mm.data.demo_layouts import JPEG_QUALITY, LAYOUTS, MAX_SCENES, CocoAnnotations, Layout
from replk_mm.data.demo_render import Scene, make_scene
from replk_mm.data.demo_scenes import GENERATOR_VERSION, SPLITS
from replk_mm.errors import UserError

META, PARTIAL_META = 'meta.json', 'meta.partial.json'
GENERATOR = re.compile(r'replk_mm [a-z]+ scenes')
MIN_SIDE, MAX_SIDE = 64, 2048
# Full-resolution chroma: the scenes' colours and fine textures are part of what a network is to see.
_ENCODING: dict[str, dict[str, Any]] = {
    '.jpg': {'format': 'JPEG', 'quality': JPEG_QUALITY, 'subsampling': 0}, '.png': {'format': 'PNG'}}

Meta = dict[str, Any]


@dataclass(frozen=True)
class SceneKind:
    """A kind of scenes that can be written.

    Attributes:
        name: A word; ``meta.json`` calls its generator 'replk_mm NAME scenes'.
        version: Changes whenever the same seed gives other scenes than before.
        make: Draws a scene from (seed, split, index, size): ``image``, ``label`` and, for COCO's layout, ``instances`` as of
            :class:`~replk_mm.data.demo_render.Scene`.
        layouts: The keys of :data:`LAYOUTS` that can hold it.
        more: Further splits, with the number of their scenes for each validation scene.
        listing: Name of a file below the data root, and what writes its content from ``meta.json``'s; None for none.
        meta: What ``meta.json`` says otherwise than for the demo scenes.
    """
    name: str
    version: int
    make: Callable[[int, str, int, tuple[int, int]], Any]
    layouts: tuple[str, ...] = tuple(LAYOUTS)
    more: Mapping[str, int] = field(default_factory=dict)
    listing: tuple[str, Callable[[Meta], bytes]] | None = None
    meta: Mapping[str, Any] = field(default_factory=dict)


# Looked up when it is called, as every other name of this module.
DEMO = SceneKind('demo', GENERATOR_VERSION, lambda *key: make_scene(*key))


def write_demo_data(out: str | Path, layout: str = 'ade20k', train: int = 200, val: int = 40, seed: int = 0,
                    size: tuple[int, int] = (256, 256), overwrite: bool = False, progress: bool = False,
                    kind: SceneKind = DEMO) -> Meta:
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
            name, content = kind.listing
            _write_whole(out / name, content(meta))
        (out / PARTIAL_META).replace(out / META)
    except OSError as error:
        raise UserError(f'{error.filename or out}: cannot write the demo data: {error.strerror or error}') from error
    return meta


def _write_split(out: Path, kind: SceneKind, split: str, meta: Meta, progress: bool) -> None:
    count, seed, size = meta['scenes'][split], meta['seed'], (meta['size'][0], meta['size'][1])
    layout = LAYOUTS[meta['layout']]
    annotation_file = layout.annotation_file(split)
    annotations = CocoAnnotations(split, seed) if annotation_file else None
    for index in range(count):
        files = [out / file for file in layout.files(split, stem_of(split, index))]
        # A file appears under its name only when whole, so what an interrupted run left is good.
        absent = not all(file.exists() for file in files)
        if absent or annotations:
            scene = kind.make(seed, split, index, size)
            if absent:
                _write_scene(scene, layout, files)
            if annotations:
                annotations.add(index, files[0].name, scene)
        if progress and (index % 10 == 9 or index + 1 == count):
            end = '\n' if index + 1 == count else ''
            print(f'\r{split}: {index + 1}/{count} scenes', end=end, file=sys.stderr, flush=True)
    if annotation_file and annotations:
        _write_whole(out / annotation_file, annotations.content())


def _describe(kind: SceneKind, layout: str, train: int, val: int, seed: int, size: tuple[int, int]) -> Meta:
    """Check the settings and lay out the content of ``meta.json``."""
    if layout not in LAYOUTS:
        raise UserError(f'layout: {layout!r} is not known; choose from: {", ".join(LAYOUTS)}')
    if layout not in kind.layouts:
        raise UserError(f'layout: {kind.name} scenes are not written as {layout}; choose from: {", ".join(kind.layouts)}')
    for name, count in (('train', train), ('val', val)):
        if not 1 <= count <= MAX_SCENES:
            raise UserError(f'{name}: the number of scenes must be from 1 to {MAX_SCENES}, not {count}')
    if seed < 0:
        raise UserError(f'seed: must be 0 or more, not {seed}')
    if len(size) != 2 or not all(MIN_SIDE <= side <= MAX_SIDE for side in size) or max(size) > 2 * min(size):
        raise UserError(f'size: must be height and width, each {MIN_SIDE} to {MAX_SIDE} pixels and neither over twice '
                        f'the other, not {" ".join(map(str, size))}')
    return {
        'generator': f'replk_mm {kind.name} scenes',
        'generator_version': kind.version,
        'layout': layout,
        'seed': seed,
        'size': list(size),
        'scenes': {'train': train, 'val': val, **{split: each * val for split, each in kind.more.items()}},
        **({'listing': kind.listing[0]} if kind.listing else {}),
        **LAYOUTS[layout].meta,
        **kind.meta,
    }


def _prepare(out: Path, meta: Meta, overwrite: bool) -> None:
    """Leave in ``out`` a partial meta file of these settings, and no scene of any others."""
    if out.exists() and not out.is_dir():
        raise UserError(f'{out}: is a file, not a folder; choose another path')
    if out.is_dir() and any(out.iterdir()):
        complete, partial = _read_meta(out / META), _read_meta(out / PARTIAL_META)
        old = complete or partial
        if old is None:
            raise UserError(f'{out}: is not empty, and not written by this command; choose another folder')
        ours = _scene_files(out, old)
        if complete or partial != meta:
            if not overwrite:
                found = 'holds demo data already' if complete else 'holds an interrupted run with other settings'
                raise UserError(f'{out}: {found}; choose another folder, or overwrite it (--overwrite)')
            _remove(out, ours, complete=complete is not None)
    out.mkdir(parents=True, exist_ok=True)
    _write_whole(out / PARTIAL_META, (json.dumps(meta, indent=2) + '\n').encode())


def _read_meta(path: Path) -> Meta | None:
    """The content of a meta file that this command wrote, or None."""
    try:
        meta = json.loads(path.read_text(encoding='utf-8'))
    except (FileNotFoundError, ValueError):
        return None
    known = (isinstance(meta, dict) and GENERATOR.fullmatch(str(meta.get('generator'))) and meta.get('layout') in LAYOUTS
             and isinstance(meta.get('scenes'), dict) and {*SPLITS} <= {*meta['scenes']} <= {*LAYOUTS[meta['layout']].folders}
             and all(type(count) is int for count in meta['scenes'].values()))
    return meta if known else None


def _scene_files(out: Path, meta: Meta) -> list[Path]:
    """The scene files under ``out`` that the run of ``meta`` wrote.

    Raises:
        UserError: A stranger lies among them: a data set reader would take it for a scene.
    """
    # A name of a file, nothing that leads elsewhere: what is named here will be removed.
    listing = Path(str(meta.get('listing', ''))).name
    ours = [out / listing] if listing and (out / listing).is_file() else []
    for split in meta['scenes']:
        layout = LAYOUTS[meta['layout']]
        if (annotation_file := layout.annotation_file(split)) and (out / annotation_file).is_file():
            ours.append(out / annotation_file)
        for example in layout.files(split, ''):
            folder, suffix = (out / example).parent, Path(example).name
            pattern = re.compile(rf'demo_{split}_(\d{{6}}){re.escape(suffix)}(\.tmp)?')
            for path in sorted(folder.iterdir()) if folder.is_dir() else []:
                match = pattern.fullmatch(path.name)
                if match is None or int(match[1]) >= meta['scenes'][split]:
                    raise UserError(f'{path}: was not written by this command; move it elsewhere first')
                ours.append(path)
    return ours


def _remove(out: Path, files: list[Path], complete: bool) -> None:
    """Remove the scenes ``files`` of an earlier run."""
    # From here on the old run counts as interrupted: stopping half-way must not leave it looking whole.
    if complete:
        (out / META).replace(out / PARTIAL_META)
    for file in files:
        file.unlink()


def stem_of(split: str, index: int) -> str:
    """What the files of a scene are called, without suffixes."""
    return f'demo_{split}_{index:06d}'


def _write_scene(scene: Scene, layout: Layout, files: list[Path]) -> None:
    for pixels, file in zip(layout.pixels(scene), files, strict=True):
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, **_ENCODING[file.suffix])
        _write_whole(file, buffer.getvalue())


def _write_whole(file: Path, content: bytes) -> None:
    """Write a file that is either whole or not there."""
    file.parent.mkdir(parents=True, exist_ok=True)
    passing = file.with_name(file.name + '.tmp')
    passing.write_bytes(content)
    passing.replace(file)
