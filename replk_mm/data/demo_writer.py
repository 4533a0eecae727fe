"""Write procedural demo scenes to disk in the layout of a known data set.

A run first writes ``meta.partial.json``, then the scenes, and last renames it to ``meta.json``: an interrupted run is
recognised by the partial file, and the same command carries on where it stopped.
"""
import io
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

from replk_mm.data.demo_render import Scene, make_scene
from replk_mm.data.demo_scenes import DEMO_CLASSES, DEMO_PALETTE, GENERATOR_VERSION, SPLITS
from replk_mm.errors import UserError

META, PARTIAL_META = 'meta.json', 'meta.partial.json'
GENERATOR = 'replk_mm demo scenes'
JPEG_QUALITY = 95
MAX_SCENES = 999_999
MIN_SIDE, MAX_SIDE = 64, 2048

Meta = dict[str, Any]


def _ade20k_files(split: str, stem: str) -> tuple[str, str]:
    """Where the ADE20K layout keeps a scene: its image and its label map."""
    folder = {'train': 'training', 'val': 'validation'}[split]
    return f'images/{folder}/{stem}.jpg', f'annotations/{folder}/{stem}.png'


#: The files (image, label map) of a scene, by layout.
LAYOUTS: dict[str, Callable[[str, str], tuple[str, str]]] = {'ade20k': _ade20k_files}


def write_demo_data(out: str | Path, layout: str = 'ade20k', train: int = 200, val: int = 40, seed: int = 0,
                    size: tuple[int, int] = (256, 256), overwrite: bool = False, progress: bool = False) -> Meta:
    """Write ``train`` and ``val`` demo scenes under ``out``.

    Args:
        out: A folder that does not exist, is empty, or holds an interrupted run of the same settings.
        layout: One of :data:`LAYOUTS`.
        train: Number of training scenes.
        val: Number of validation scenes.
        seed: Names the data set: the same seed and size give the same scenes, however many are written.
        size: Height and width of a scene in pixels. Defaults to (256, 256).
        overwrite: Remove what an earlier run wrote there, and nothing else, before writing.
        progress: Show a counter on standard error.

    Returns:
        What ``meta.json`` holds: classes, palette, seed, size, number of scenes, version of the generator.

    Raises:
        UserError: An argument is out of range, or ``out`` cannot be written or holds something else.
    """
    out = Path(out)
    meta = _describe(layout, train, val, seed, size)
    scenes = [(split, index) for split in SPLITS for index in range(meta['scenes'][split])]
    try:
        _prepare(out, meta, overwrite)
        for done, (split, index) in enumerate(scenes, 1):
            files = [out / file for file in LAYOUTS[layout](split, _stem(split, index))]
            # A file appears under its name only when whole, so what an interrupted run left is good.
            if not all(file.exists() for file in files):
                _write_scene(make_scene(seed, split, index, (size[0], size[1])), *files)
            if progress and (done % 10 == 0 or done == len(scenes)):
                end = '\n' if done == len(scenes) else ''
                print(f'\r{done}/{len(scenes)} scenes', end=end, file=sys.stderr, flush=True)
        (out / PARTIAL_META).replace(out / META)
    except OSError as error:
        raise UserError(f'{error.filename or out}: cannot write the demo data: {error.strerror or error}') from error
    return meta


def _describe(layout: str, train: int, val: int, seed: int, size: tuple[int, int]) -> Meta:
    """Check the settings and lay out the content of ``meta.json``."""
    if layout not in LAYOUTS:
        raise UserError(f'layout: {layout!r} is not known; choose from: {", ".join(LAYOUTS)}')
    for name, count in (('train', train), ('val', val)):
        if not 1 <= count <= MAX_SCENES:
            raise UserError(f'{name}: the number of scenes must be from 1 to {MAX_SCENES}, not {count}')
    if seed < 0:
        raise UserError(f'seed: must be 0 or more, not {seed}')
    if len(size) != 2 or not all(MIN_SIDE <= side <= MAX_SIDE for side in size) or max(size) > 2 * min(size):
        raise UserError(f'size: must be height and width, each {MIN_SIDE} to {MAX_SIDE} pixels and neither over twice '
                        f'the other, not {" ".join(map(str, size))}')
    return {
        'generator': GENERATOR,
        'generator_version': GENERATOR_VERSION,
        'layout': layout,
        'seed': seed,
        'size': list(size),
        'scenes': {'train': train, 'val': val},
        'classes': list(DEMO_CLASSES),
        'palette': [list(colour) for colour in DEMO_PALETTE],
        'reduce_zero_label': True,
        'jpeg_quality': JPEG_QUALITY,
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
    known = (isinstance(meta, dict) and meta.get('generator') == GENERATOR and meta.get('layout') in LAYOUTS
             and isinstance(meta.get('scenes'), dict) and all(type(meta['scenes'].get(s)) is int for s in SPLITS))
    return meta if known else None


def _scene_files(out: Path, meta: Meta) -> list[Path]:
    """The scene files under ``out`` that the run of ``meta`` wrote.

    Raises:
        UserError: A stranger lies among them: a data set reader would take it for a scene.
    """
    ours = []
    for split in SPLITS:
        for example in LAYOUTS[meta['layout']](split, _stem(split, 0)):
            folder, suffix = (out / example).parent, Path(example).suffix
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


def _stem(split: str, index: int) -> str:
    return f'demo_{split}_{index:06d}'


def _write_scene(scene: Scene, image_file: Path, label_file: Path) -> None:
    # Full-resolution chroma: the scenes' colours and fine textures are part of what a network is to see.
    for pixels, file, options in ((scene.image, image_file, {'format': 'JPEG', 'quality': JPEG_QUALITY,
                                                             'subsampling': 0}),
                                  (scene.label, label_file, {'format': 'PNG'})):
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, **options)
        file.parent.mkdir(parents=True, exist_ok=True)
        _write_whole(file, buffer.getvalue())


def _write_whole(file: Path, content: bytes) -> None:
    """Write a file that is either whole or not there."""
    passing = file.with_name(file.name + '.tmp')
    passing.write_bytes(content)
    passing.replace(file)
