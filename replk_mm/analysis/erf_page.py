"""Effective receptive fields as tables, alone and side by side."""
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from replk_mm import pages
from replk_mm.analysis.erf_plot import image_count
from replk_mm.analysis.erf_result import SHARES, Erf, areas, paper_scale
from replk_mm.errors import UserError


def told_apart(found: Sequence[Erf], paths: Sequence[Path]) -> list[Erf]:
    """Receptive fields with the name of their folder beside that of backbones which a table could not tell apart otherwise:
    networks of one family whose kernels differ, for one."""
    alike = Counter((erf.backbone, erf.weights, erf.stage) for erf in found)
    return [replace(erf, backbone=f'{erf.backbone} ({path.resolve().parent.name})')
            if alike[erf.backbone, erf.weights, erf.stage] > 1 else erf for erf, path in zip(found, paths, strict=True)]


def tables(found: Sequence[Erf]) -> str:
    """Receptive fields as Markdown: the smallest centred squares in both scales, and what belongs to them."""
    head = f'| Backbone | Weights | Map | {" | ".join(f"{100 * share:g} %" for share in SHARES)} |'
    rule = f'|{" --- |" * (3 + len(SHARES))}'
    lines: list[str] = []
    for title, scale in (('in the scale of the RepLKNet paper, log10(score + 1)', paper_scale),
                         ('of the contribution scores themselves', lambda scores: scores)):
        lines += [f'Smallest centred square that holds a share {title}: side in pixels, share of the image', '', head, rule]
        for erf in found:
            cells = [f'{area["side"]} ({100 * area["ratio"]:.1f} %)' if area['side'] else 'none'
                     for area in areas(scale(erf.scores)).values()]
            name = f'output {erf.stage}, stride {erf.stride:g}, {erf.channels} channels'
            lines.append(f'| {erf.backbone} | {"" if erf.trained else "**untrained**: "}{erf.weights} | {name} | '
                         f'{" | ".join(cells)} |')
        lines.append('')
    offsets = (f'{erf.backbone} {erf.offset[0]:+.1f}, {erf.offset[1]:+.1f}' for erf in found if erf.offset)
    lines += [f'Centre of gravity of the scores, pixels below and right of the middle: {"; ".join(offsets) or "none"}.', '']
    sets = sorted({erf.image_set[:12] for erf in found})
    lines.append(f'Images: {image_count(found)} brought to {found[0].size} x {found[0].size} pixels; '
                 f'SHA-256 of the set {" and ".join(sets)}.')
    return '\n'.join(lines) + '\n'


def remarks(found: Sequence[Erf]) -> list[str]:
    """What keeps receptive fields from being compared as they are.

    Raises:
        UserError: If their images differ in size, which nothing can be compared across.
    """
    sizes = {erf.size for erf in found}
    if len(sizes) > 1:
        raise UserError('--compare: the images differ in size: '
                        + ', '.join(f'{erf.backbone} ({erf.config}) {erf.size}' for erf in found) + ' pixels\n'
                        'A share of the image means another thing at each. Measure all with one --size.')
    lines = []
    untrained = [erf.backbone for erf in found if not erf.trained]
    if untrained:
        every = len(untrained) == len(found)
        lines.append(f'warning: untrained weights: {"all" if every else ", ".join(untrained)}'
                     + ('' if every else '; the others are trained: these are not the same question'))
    if len({erf.image_set for erf in found}) > 1:
        lines.append('warning: the images are not the same ones')
    if len({erf.stride for erf in found}) > 1:
        lines.append('strides of the maps differ: ' + ', '.join(f'{erf.backbone} {erf.stride:g}' for erf in found))
    return lines


def renew(page: Path, name: str, text: str, picture: Path) -> None:
    """Renew a block of a Markdown page; see :mod:`replk_mm.pages`.

    Args:
        page: The page.
        name: Of the block.
        text: What goes in, after the picture.
        picture: File that the page shows.

    Raises:
        UserError: If the page has not one such block.
    """
    link = Path(os.path.relpath(picture, page.parent)).as_posix()
    pages.renew(page, name, f'![Heat maps of effective receptive fields]({link})\n\n{text}')


def write(page: Path, text: str) -> None:
    """Write a page of its own.

    Raises:
        UserError: If it cannot be written.
    """
    try:
        page.write_text(text, encoding='utf-8')
    except OSError as error:
        raise UserError(f'{page}: cannot be written ({error.strerror})\nChoose another place with --out DIR.') from error
