"""What :func:`replk_mm.bench.compare.compare` found, as text for a terminal and as Markdown."""
from collections.abc import Sequence
from pathlib import Path

from replk_mm.bench.compare.statistics import FEW_IMAGES
from replk_mm.engine import results
from replk_mm.errors import UserError, printable

#: Kinds of difference that make figures incomparable, and what else is said.
_KINDS = {'training': 'trained', 'test': 'test', 'data': 'data', 'environment': 'environment'}


def _number(value: float | None, unit: str, signed: bool = False) -> str:
    if value is None:
        return '-'
    digits = 2 if unit == '%' else 4
    return f'{value:+.{digits}f}' if signed else f'{value:.{digits}f}'


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], markdown: bool) -> list[str]:
    """Columns after the first to the right."""
    if markdown:
        escaped = [[cell.replace('|', r'\|') for cell in row] for row in rows]
        return [f'| {" | ".join(head)} |', f'| --- |{" ---: |" * (len(head) - 1)}', *(f'| {" | ".join(r)} |' for r in escaped)]
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    return ['  ' + '  '.join(cell.ljust(width) if i == 0 else cell.rjust(width)
                             for i, (cell, width) in enumerate(zip(row, widths, strict=True))).rstrip()
            for row in [head, *rows]]


def lines(found: dict, markdown: bool = False) -> list[str]:
    """All that was found, the conditions before the figures."""
    unit = '%' if found['task'] == 'segmentation' else ''

    def section(title: str) -> list[str]:
        return ['', f'## {title}', ''] if markdown else ['', title]

    bullet = '- ' if markdown else ''
    out = ['# Two results compared', ''] if markdown else []
    for letter in 'ab':
        facts = found[letter]
        iteration = '' if facts['iteration'] is None else f', iteration {facts["iteration"]}'
        out.append(f'{bullet}{letter.upper()}: {facts["path"]} ({facts["config"]}, {facts["checkpoint"]}{iteration}, '
                   f'{facts["images"]} images)')
    if found['a']['sha256'] and found['a']['sha256'] == found['b']['sha256']:
        out.append(f'{bullet}A and B are the same checkpoint.')
    out += _conditions(found['differences'], section, markdown)
    out += section('Figures')
    out += _table(['metric', 'A', 'B', 'B - A'],
                  [[row['name'], *(_number(row[key], unit) for key in 'ab'), _number(row['difference'], unit, True)]
                   for row in found['metrics']], markdown)
    classes = found['per_class']
    out += section(f'{classes["figure"]} of the classes, what differs most first')
    out += _table(['class', 'A', 'B', 'B - A', classes['size']],
                  [[row['name'], *(_number(row[key], unit) for key in 'ab'), _number(row['difference'], unit, True),
                    f'{row["size"]:,}' if row['size'] is not None else '-'] for row in classes['rows']], markdown)
    for row in classes['rows']:
        if row['difference'] is None and (row['a'] is None) != (row['b'] is None):
            out.append(f'{bullet}{row["name"]}: only {"B" if row["a"] is None else "A"} has a figure')
    for row in found.get('only_predicted', ()):
        who = ' and '.join(f'{letter.upper()} predicts it on {row[letter]:,} pixels' for letter in 'ab' if row[letter])
        out.append(f'{bullet}{row["name"]}: in no label' + (f'; only {who}' if not (row['a'] and row['b']) else f'; {who}')
                   + ', which counts as IoU 0 in the mIoU')
    if 'images' in found:
        out += section('Images') + _images(found, markdown)
        out += section('More than the luck of the images?') + _statistics(found['statistics'])
    for name in found.get('pictures', ()) if markdown else ():
        out += ['', f'![Images that changed most]({name})']
    return [printable(line).replace('\n', ' ') for line in out]  # names of classes are those of a file


def _conditions(differences: Sequence[dict], section, markdown: bool) -> list[str]:
    if not differences:
        return ['', 'Measured alike: the same test protocol, iterations, data and environment.']
    rows = [[_KINDS[row['what']], row['key'], row['a'], row['b']] for row in differences]
    strict = [row for row in differences if row['what'] != 'environment']
    title = ('NOT MEASURED ALIKE: the figures below differ for these reasons too' if strict else
             'Measured in different environments')
    return section(title) + _table(['what', 'key', 'A', 'B'], rows, markdown)


def _images(found: dict, markdown: bool) -> list[str]:
    images, unit = found['images'], found['images']['unit']
    out = [f'{images["definition"][0].upper()}{images["definition"][1:]}.']
    left_out = images['count'] - images['scored']
    out.append(f'{images["scored"]} images: {images["figure"]} is higher in B in {images["higher_in_b"]}, higher in A in '
               f'{images["higher_in_a"]}, equal in {images["equal"]}; median difference '
               f'{_number(images["median_difference"], unit, True)}'
               + (f'; {left_out} without a labelled pixel left out' if left_out else '') + '.')
    if 'totals' in found:
        out.append('In all: ' + '; '.join(
            f'{letter.upper()} {total["found"]:,} found, {total["missed"]:,} missed, {total["false"]:,} false, mean F1 '
            f'{total["mean_f1"]:.4f}' for letter, total in found['totals'].items()) + '.')
    if not images['changed']:
        return [*out, 'No image changed.']
    if markdown:
        out.append('')
    kept = [key for key in ('accuracy', 'found', 'missed', 'false') if f'{key}_a' in images['changed'][0]]
    head = ['image that changed most', f'{images["figure"]} A', 'B', 'B - A', *(f'{key} A, B' for key in kept)]
    digits = '.2f' if 'accuracy' in kept else 'd'
    rows = [[row['image'], *(_number(row[key], unit) for key in 'ab'), _number(row['difference'], unit, True),
             *(f'{row[f"{key}_a"]:{digits}}, {row[f"{key}_b"]:{digits}}' for key in kept)] for row in images['changed']]
    return out + _table(head, rows, markdown)


def _statistics(found: dict) -> list[str]:
    unit = found['unit']
    low, high = (_number(found[key], unit, True) for key in ('low', 'high'))
    verdict = ('The interval does not contain 0: more than the luck of which images are in the data.' if found['beyond_luck']
               else 'The interval contains 0: other images of the same kind might well turn it round.')
    if found['low'] == found['high'] == 0:
        verdict = 'There is no difference in any resampling.'
    out = [f'{found["figure"]}, B - A: {_number(found["difference"], unit, True)}; 95 % of {found["draws"]:,} resamplings of '
           f'the {found["images"]} images (paired bootstrap, seed {found["seed"]}) are between {low} and {high}, '
           f'{100 * found["b_higher"]:.1f} % have B higher. {verdict}',
           'This is over images, not over training seeds: one checkpoint each says nothing of what another seed would give.']
    if found['images'] < FEW_IMAGES:
        out.append(f'With {found["images"]} images only, the interval is rough, rather too narrow.')
    return out


def write(found: dict, out: Path) -> list[Path]:
    """Write ``compare.json`` and ``compare.md``.

    Args:
        found: What was found.
        out: Folder, which is there; pictures lie in it.

    Returns:
        All files of the comparison.

    Raises:
        UserError: If a file cannot be written.
    """
    files = [out / 'compare.json', out / 'compare.md']
    results.write(found, files[0])
    try:
        files[1].write_text('\n'.join(lines(found, markdown=True)) + '\n', encoding='utf-8')
    except OSError as error:
        raise UserError(f'{files[1]}: cannot be written ({error.strerror})\nChoose another place with --out DIR.') from error
    return files + [out / name for name in found.get('pictures', ())]
