"""What :func:`replk_mm.bench.compare.compare` found, as Markdown that is aligned for a terminal."""

from collections.abc import Sequence
from pathlib import Path

from replk_mm.engine import results
from replk_mm.errors import UserError, printable
from replk_mm.files import write_atomic

#: Below so many images an interval is called rough.
FEW_IMAGES = 30


def _number(value: float | None, unit: str, signed: bool = False) -> str:
    return '-' if value is None else f'{value:{"+" if signed else ""}.{2 if unit == "%" else 4}f}'


def _pair(row: dict, unit: str) -> list[str]:
    return [_number(row['a'], unit), _number(row['b'], unit), _number(row['difference'], unit, True)]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table with aligned columns, those after the first to the right."""
    cells = [[cell.replace('|', r'\|') for cell in row] for row in [head, *rows]]
    widths = [max(3, *map(len, column)) for column in zip(*cells, strict=True)]
    cells.insert(1, ['-' * widths[0], *(f'{"-" * (width - 1)}:' for width in widths[1:])])
    return [
        '| '
        + ' | '.join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        + ' |'
        for row in cells
    ]


def lines(found: dict) -> list[str]:
    """All that was found, the conditions before the figures."""
    unit, classes = '%' if found['task'] == 'segmentation' else '', found['per_class']
    out = ['# Two results compared', '']
    for letter in 'ab':
        facts = found[letter]
        iteration = '' if facts['iteration'] is None else f', iteration {facts["iteration"]}'
        out.append(
            f'- {letter.upper()}: {facts["path"]} ({facts["config"]}, {facts["checkpoint"]}{iteration}, '
            f'{facts["images"]} images)'
        )
    if found['a']['sha256'] and found['a']['sha256'] == found['b']['sha256']:
        out.append('- A and B are the same checkpoint.')
    out += _conditions(found['differences'])
    out += [
        '',
        '## Figures',
        '',
        *_table(['metric', 'A', 'B', 'B - A'], [[row['name'], *_pair(row, unit)] for row in found['metrics']]),
    ]
    rows = [
        [row['name'], *_pair(row, unit), '-' if row['size'] is None else f'{row["size"]:,}'] for row in classes['rows']
    ]
    out += [
        '',
        f'## {classes["figure"]} of the classes, what differs most first',
        '',
        *_table(['class', 'A', 'B', 'B - A', classes['size']], rows),
        '',
    ]
    for row in classes['rows']:
        if (row['a'] is None) != (row['b'] is None):
            out.append(f'- {row["name"]}: only {"B" if row["a"] is None else "A"} has a figure')
    for row in found.get('only_predicted', ()):
        who = ' and '.join(f'{letter.upper()} predicts it on {row[letter]:,} pixels' for letter in 'ab' if row[letter])
        out.append(f'- {row["name"]}: in no label; {who}, which counts as IoU 0 in the mIoU')
    if 'images' in found:
        out += ['', '## Images', '', *_images(found)]
        out += ['', '## More than the luck of the images?', '', *_statistics(found['statistics'])]
    return [printable(line).replace('\n', ' ') for line in out]  # names of classes are those of a file


def _conditions(differences: Sequence[dict]) -> list[str]:
    if not differences:
        return ['', 'Measured alike: the same test protocol, iterations, data and environment.']
    title = (
        'NOT MEASURED ALIKE: the figures below differ for these reasons too'
        if any(row['what'] != 'environment' for row in differences)
        else 'Measured in different environments'
    )
    rows = [[row['what'], row['key'], row['a'], row['b']] for row in differences]
    return ['', f'## {title}', '', *_table(['what', 'key', 'A', 'B'], rows)]


def _images(found: dict) -> list[str]:
    images, unit = found['images'], found['images']['unit']
    out = [f'{images["definition"][0].upper()}{images["definition"][1:]}.']
    left_out = images['count'] - images['scored']
    out.append(
        f'{images["scored"]} images: {images["figure"]} is higher in B in {images["higher_in_b"]}, higher in A '
        f'in {images["higher_in_a"]}, equal in {images["equal"]}; median difference '
        f'{_number(images["median_difference"], unit, True)}'
        + (f'; {left_out} without a labelled pixel left out' if left_out else '')
        + '.'
    )
    if 'totals' in found:
        out.append(
            'In all: '
            + '; '.join(
                f'{letter.upper()} {total["found"]:,} found, {total["missed"]:,} missed, {total["false"]:,} false, '
                f'mean F1 '
                f'{total["mean_f1"]:.4f}'
                for letter, total in found['totals'].items()
            )
            + '.'
        )
    if not images['changed']:
        return [*out, 'No image changed.']
    kept = [key for key in ('accuracy', 'found', 'missed', 'false') if f'{key}_a' in images['changed'][0]]
    head = ['image that changed most', f'{images["figure"]} A', 'B', 'B - A', *(f'{key} A, B' for key in kept)]
    digits = '.2f' if 'accuracy' in kept else 'd'
    rows = [
        [row['image'], *_pair(row, unit), *(f'{row[f"{key}_a"]:{digits}}, {row[f"{key}_b"]:{digits}}' for key in kept)]
        for row in images['changed']
    ]
    return [*out, '', *_table(head, rows)]


def _statistics(found: dict) -> list[str]:
    unit = found['unit']
    low, high = (_number(found[key], unit, True) for key in ('low', 'high'))
    verdict = (
        'The interval does not contain 0: more than the luck of which images are in the data.'
        if found['beyond_luck']
        else 'The interval contains 0: other images of the same kind might well turn it round.'
    )
    if found['low'] == found['high'] == 0:
        verdict = 'There is no difference in any resampling.'
    out = [
        f'{found["figure"]}, B - A: {_number(found["difference"], unit, True)}; 95 % of {found["draws"]:,} '
        f'resamplings of the {found["images"]} images (paired bootstrap, seed {found["seed"]}) are between {low} '
        f'and {high}, {100 * found["b_higher"]:.1f} % have B higher. {verdict}',
        'This is over images, not over training seeds, for which several trainings are needed.',
    ]
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
    pictures = found.get('pictures', [])
    files = [out / 'compare.json', out / 'compare.md']
    results.write(found, files[0])
    try:
        shown = [f'\n![Images that changed most]({name})' for name in pictures]
        write_atomic(files[1], '\n'.join([*lines(found), *shown, '']))
    except OSError as error:
        raise UserError(f'{files[1]}: cannot be written ({error.strerror})\nChoose another --out DIR.') from error
    return files + [out / name for name in pictures]
