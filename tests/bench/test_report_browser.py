"""The report's page in Chromium: table, sorting, pictures, widths, colours, print. Skipped without Chromium."""

import html
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from report_records import made_up_suite

from replk_mm.bench.report.load import load_report
from replk_mm.bench.report.render import render_html

CHROMIUM = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome', 'chrome'))), None)
REQUIRED = bool(os.environ.get('REPLK_MM_REQUIRE_BROWSER'))  # set by CI: fail instead of skip
pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None and not REQUIRED, reason='no Chromium on PATH')]
#: Functions for the scripts of the tests.
HELPERS = """
const all = (what, where = document) => [...where.querySelectorAll(what)];
const order = () => all('.results tbody').map(body => all('tr[data-row]', body).map(row => Number(row.dataset.row)));
const sorts = () => all('.results thead th').map(th => th.getAttribute('aria-sort')).filter(Boolean);
const click = title => { all('.results button').find(b => b.textContent.startsWith(title)).click(); return order(); };
"""


@pytest.fixture(scope='module')
def page(tmp_path_factory) -> Path:
    """The made-up suite's page."""
    folder = tmp_path_factory.mktemp('page')
    path = folder / 'index.html'
    path.write_text(render_html(load_report([made_up_suite(folder / 'work')])), encoding='utf-8')
    return path


def chromium(path: Path, *options: str) -> str:
    """Open a page; returns what Chromium prints."""
    profile = f'--user-data-dir={path.parent / "profile"}'
    command = [CHROMIUM, '--headless', '--no-sandbox', '--disable-gpu', '--disable-dev-shm-usage', profile, *options]
    return subprocess.run([*command, path.as_uri()], capture_output=True, text=True, timeout=120, check=True).stdout


@pytest.fixture
def run(page, tmp_path):
    """Return the value of a script's ``return`` in the page, whose policy would not allow the script."""

    def run(script: str, *options: str):
        text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', '', page.read_text(encoding='utf-8'))
        script = (
            f'{HELPERS}(async () => {{ {script} }})().then(v => {{ document.body.textContent = JSON.stringify(v); }})'
        )
        copy = tmp_path / 'copy.html'
        copy.write_text(text.replace('</body>', f'<script>{script}</script></body>'), encoding='utf-8')
        dom = chromium(copy, '--virtual-time-budget=5000', '--dump-dom', *options)
        return json.loads(html.unescape(dom.partition('<body>')[2].partition('</body>')[0]))

    return run


def test_no_other_script_takes_effect(page, tmp_path):
    """The label of a row is a script, and a second one is appended."""
    path = tmp_path / 'page.html'
    script = '<script>document.title = "broken"</script></body>'
    path.write_text(page.read_text(encoding='utf-8').replace('</body>', script), encoding='utf-8')
    assert '<title>Report: made_up</title>' in chromium(path, '--dump-dom')


def test_table_and_pictures(run):
    rows, cells, groups, pictures = run("""return [
        all('.results tbody tr[data-row]').length,
        [...all('tr[data-row="1"]')[0].cells].map(cell => cell.innerText),
        all('.group').map(group => group.innerText),
        [...document.images].map(image => [image.naturalWidth, image.clientWidth, image.currentSrc === image.src])];""")
    assert rows == 5 and cells[0] == '1 RepLKNet made up, 31x31' and cells[1].startswith('60.60 ±\u00a00.60')
    assert 'best' not in cells[1] and cells[5].startswith('7.00') and 'front' in cells[5]
    assert groups[0].startswith('Protocol A: 300 iterations, no pretraining')
    assert 'Differs from A: iterations: 600 instead of 300' in groups[1]
    # Receptive fields, examples, plots with a legend for each row.
    assert len(pictures) == 3 + 5 * 5 + 7 + 7 * 3 and all(min(sizes) > 0 for sizes in pictures), 'loaded, light ones'


def test_sorting_keeps_protocols_apart_and_missing_values_last(run):
    found = run("""
        const found = [order(), click('Parameters'), sorts(), click('Parameters'), sorts(),
                       all('[role=status]')[0].textContent, click('Row')];
        all('tr[data-row="2"]')[0].cells[5].dataset.value = '';
        found.push(click('Parameters')[0], click('Parameters')[0]);
        all('tr[data-row="3"]')[0].cells[2].dataset.order = 'S2';
        return [...found, click('Time')[0], click('Time')[0]];""")
    best_first, up, sorted_up, down, sorted_down, said, by_label, *others = found
    assert best_first == down == [[1, 2, 3], [4], [5]] and up == by_label == [[3, 2, 1], [4], [5]]
    assert (sorted_up, sorted_down) == (['ascending'], ['descending'])
    assert said.startswith('Sorted by Parameters') and 'descending, within each protocol' in said
    assert others[:2] == [[3, 1, 2], [1, 3, 2]], 'a missing figure is last in both directions'
    assert others[2:] == [[2, 1, 3], [1, 2, 3]], 'times of another machine stay apart'


@pytest.mark.parametrize('width', [500, 1280])  # headless Chromium is at least 500 pixels wide
def test_fits_the_window(run, width):
    fits, regions = run(
        """all('details').forEach(part => { part.open = true; });
        return [document.documentElement.scrollWidth <= innerWidth,
                all('.scroll').map(part => [part.tabIndex, part.getAttribute('role')])];""",
        f'--window-size={width},900',
    )
    assert fits and len(regions) == 6 and all(region == [0, 'region'] for region in regions)


def test_a_phone_shows_answer_name_score_and_time(run):
    verdict, ends = run(
        """document.documentElement.style.width = '390px';
        return [all('.verdict')[0].getBoundingClientRect().bottom,
                all('tr[data-row]')[0].cells[2].getBoundingClientRect().right];""",
        '--window-size=500,844',
    )
    assert verdict < 500 and ends <= 390


def test_links_and_the_printer_open_details(run):
    opened = "all('details.row').map(part => part.open)"
    found = run(f"""
        all('tr[data-row="2"] th a')[0].click();
        await new Promise(done => setTimeout(done, 50));
        const found = [{opened}];
        for (const name of ['beforeprint', 'afterprint']) {{ dispatchEvent(new Event(name)); found.push({opened}); }}
        return found;""")
    linked = [False, True, False, False, False]
    assert found == [linked, [True] * 5, linked]


def test_a_picture_of_the_gallery_fills_the_window_and_closes(run):
    before, opened, after = run("""
        const summary = all('.zoom summary')[3], image = summary.querySelector('img'), sizes = [];
        for (let i = 0; i < 3; i++) {
            const box = summary.getBoundingClientRect();
            const width = document.documentElement.clientWidth;  // without the scroll bar
            sizes.push([box.width === width && box.height === innerHeight, image.clientHeight]);
            summary.click();
        }
        return sizes;""")
    assert not before[0] and opened[0] and opened[1] > 2 * before[1] and after == before


def test_print(page, tmp_path):
    chromium(page, f'--print-to-pdf={tmp_path / "page.pdf"}')
    pdf = (tmp_path / 'page.pdf').read_bytes()
    assert pdf.startswith(b'%PDF') and 2 < len(re.findall(rb'/Type /Page\b(?!s)', pdf)) < 30


@pytest.mark.parametrize('scheme', ['light', 'dark'])
def test_colours_can_be_read(scheme):
    """Contrast of WCAG 2 level AA: 4.5 of texts on both grounds, 3 of the markers in plots."""
    from replk_mm.bench.report import plots

    css = Path(plots.__file__).with_name('page.css').read_text()
    blocks = re.findall(r':root \{([^}]*)\}', css)
    values = dict(re.findall(r'--([\w-]+): (#\w+)', blocks[scheme == 'dark']))

    def light(colour: str) -> float:
        digits = colour[1:] if len(colour) == 7 else ''.join(2 * digit for digit in colour[1:])
        parts = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    def contrast(colour: str, ground: str) -> float:
        low, high = sorted([light(colour), light(values[ground])])
        return (high + 0.05) / (low + 0.05)

    for name in ('ink', 'faint', 'link', 'bad'):
        assert all(contrast(values[name], ground) >= 4.5 for ground in ('ground', 'panel')), name
    assert contrast(values['good'], 'good-ground') >= 4.5
    style = plots._DARK if scheme == 'dark' else plots._LIGHT
    assert all(contrast(colour, 'ground') >= 3 for colour in style['axes.prop_cycle'].by_key()['color'])
    assert all(contrast(style[name], 'ground') >= 4.5 for name in ('text.color', 'axes.labelcolor'))
