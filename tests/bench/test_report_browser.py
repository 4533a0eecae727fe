"""The report's page in a real browser: table, sorting, plots, pictures, widths, colours, print, accessibility."""

import base64
import re
from pathlib import Path

import pytest
from browser import REQUIRED, Browser, find
from report_records import made_up_suite

from replk_mm.bench.report.load import load_report
from replk_mm.bench.report.render import render_html

pytestmark = pytest.mark.slow
WIDE, NARROW = 1280, 390
ORDER = """[...document.querySelectorAll('.results tbody')].map(
    body => [...body.querySelectorAll('tr[data-row]')].map(row => Number(row.dataset.row)))"""
SORTS = "[...document.querySelectorAll('.results thead th')].map(th => th.getAttribute('aria-sort'))"


@pytest.fixture(scope='module')
def page(tmp_path_factory) -> Path:
    """The made-up suite's page."""
    folder = tmp_path_factory.mktemp('page')
    path = folder / 'index.html'
    path.write_text(render_html(load_report([made_up_suite(folder / 'work')])), encoding='utf-8')
    return path


@pytest.fixture(scope='module')
def running(tmp_path_factory):
    browser = Browser(tmp_path_factory.mktemp('profile'))
    yield browser
    browser.close()


@pytest.fixture
def browser(running, page) -> Browser:
    """The page, as wide as a laptop's window, in light colours."""
    running.size(WIDE)
    running.media('light')
    running.open(page)
    return running


def click(browser: Browser, title: str) -> None:
    browser.run(
        f"[...document.querySelectorAll('.results button')].find(b => b.textContent.startsWith({title!r})).click()"
    )


def test_loads_from_a_file_and_asks_for_nothing(browser) -> None:
    asked = [
        event['params']['request']['url'] for event in browser.events if event['method'] == 'Network.requestWillBeSent'
    ]
    assert asked[0].startswith('file:') and all(url.startswith('data:image/') for url in asked[1:])
    wrong = [event for event in browser.events if event['method'] in ('Log.entryAdded', 'Runtime.exceptionThrown')]
    assert wrong == []
    assert browser.run('document.title') == 'Report: made_up'  # no row's label became a script


def test_no_other_script_takes_effect(browser) -> None:
    browser.run(
        "document.body.append(Object.assign(document.createElement('script'), {textContent: 'window.broken = 1'}))"
    )
    assert browser.run('window.broken === undefined') is True
    assert browser.run("fetch('https://example.org').then(() => 'sent', () => 'refused')") == 'refused'


def test_table(browser) -> None:
    assert browser.run("document.querySelectorAll('.results tbody tr[data-row]').length") == 5
    cells = browser.run('[...document.querySelector(\'tr[data-row="1"]\').cells].map(c => c.innerText)')
    assert cells[0] == '1 RepLKNet made up, 31x31' and cells[1].startswith('60.60 ± 0.60')
    assert 'best' in cells[1] and cells[2].startswith('–') and cells[4] == '7.00'
    groups = browser.run("[...document.querySelectorAll('.group')].map(g => g.innerText)")
    assert groups[0].startswith('Protocol A (mIoU, %): task segmentation')
    assert 'Differs from A: iterations: 600 instead of 300' in groups[1]


def test_sorting_keeps_protocols_apart_and_missing_values_last(browser) -> None:
    assert browser.run(ORDER) == [[1, 2, 3], [4], [5]]
    click(browser, 'Parameters')
    assert browser.run(ORDER) == [[3, 2, 1], [4], [5]] and browser.run(SORTS)[4] == 'ascending'
    click(browser, 'Parameters')
    assert browser.run(ORDER) == [[1, 2, 3], [4], [5]] and browser.run(SORTS)[4] == 'descending'
    assert [sort for sort in browser.run(SORTS) if sort] == ['descending']
    said = browser.run("document.querySelector('[role=status]').textContent")
    assert said.startswith('Sorted by Parameters') and 'descending, within each protocol' in said
    click(browser, 'Row')
    assert browser.run(ORDER) == [[3, 2, 1], [4], [5]]  # ConvNeXt, RepLKNet 13, RepLKNet 31
    # A missing figure is last in both directions.
    browser.run("document.querySelector('tr[data-row=\"2\"]').cells[4].dataset.value = ''")
    for order in ([3, 1, 2], [1, 3, 2]):
        click(browser, 'Parameters')
        assert browser.run(ORDER)[0] == order
    # Times of another machine stay apart from the others.
    browser.run("document.querySelector('tr[data-row=\"3\"]').cells[6].dataset.order = 'S2'")
    for order in ([2, 1, 3], [1, 2, 3]):
        click(browser, 'Time')
        assert browser.run(ORDER)[0] == order


def test_sorting_by_keyboard(browser) -> None:
    browser.run("document.querySelector('.results button').focus()")
    for _ in range(4):
        browser.press('Tab', 9)
    assert browser.run('document.activeElement.textContent').startswith('Parameters')
    browser.press('Enter', 13, '\r')
    assert browser.run(ORDER)[0] == [3, 2, 1]
    browser.press(' ', 32, ' ')
    assert browser.run(ORDER)[0] == [1, 2, 3]


def test_plots_have_points_and_names_apart(browser) -> None:
    assert browser.run("[...document.querySelectorAll('svg.plot')].map(p => p.querySelectorAll('.row').length)") == [
        3,
        3,
        3,
        1,
        3,
        3,
    ]
    inside = browser.run("""[...document.querySelectorAll('svg.plot')].every(plot => {
        const all = plot.getBoundingClientRect();
        return [...plot.querySelectorAll('.row > g > path, text')].every(mark => {
            const box = mark.getBoundingClientRect();
            return box.width > 0 && box.left >= all.left - 1 && box.right <= all.right + 1 && box.top >= all.top - 1
                && box.bottom <= all.bottom + 1; }); })""")
    assert inside is True
    overlaps = browser.run("""[...document.querySelectorAll('svg.plot')].flatMap(plot => {
        const boxes = [...plot.querySelectorAll('.name')].map(n => n.getBoundingClientRect());
        return boxes.flatMap((a, i) => boxes.slice(i + 1).filter(b => a.left < b.right && b.left < a.right
            && a.top < b.bottom && b.top < a.bottom)); }).length""")
    assert overlaps == 0
    dashes = browser.run(
        "[...[...document.querySelectorAll('svg.plot')].at(-1).querySelectorAll('.row > path')]"
        '.map(l => getComputedStyle(l).strokeDasharray)'
    )
    assert len(dashes) == len(set(dashes)) == 3


def test_pictures_are_there(browser) -> None:
    sizes = browser.run(
        'Promise.all([...document.images].map(i => i.decode().then(() => [i.naturalWidth, i.clientWidth])))'
    )
    assert len(sizes) == 3 + 6 * 5 and all(natural > 0 and shown > 0 for natural, shown in sizes)


@pytest.mark.parametrize('width', [NARROW, WIDE])
def test_fits_the_window(browser, page, width) -> None:
    browser.size(width)
    browser.open(page)
    browser.run("document.querySelectorAll('details').forEach(d => { d.open = true; })")
    assert browser.run('[innerWidth, document.documentElement.scrollWidth <= innerWidth]') == [width, True]
    regions = browser.run("[...document.querySelectorAll('.scroll')].map(s => [s.tabIndex, s.getAttribute('role')])")
    assert len(regions) == 7 and all(region == [0, 'region'] for region in regions)
    if width == NARROW:
        table = "document.querySelector('.results').parentElement"
        assert browser.run(f'{table}.scrollWidth > {table}.clientWidth') is True
        browser.run(f'{table}.focus()')
        browser.press('ArrowRight', 39)
        browser.run('new Promise(done => setTimeout(done, 300))')
        assert browser.run(f'{table}.scrollLeft') > 0


# Contrast of WCAG 2 of every text, of plots too, against the ground that is drawn under it.
CONTRASTS = """(() => {
    const rgb = text => text.match(/[\\d.]+/g).map(Number);
    const light = c => { const [r, g, b] = c.slice(0, 3).map(v => v / 255).map(v => v <= .04045 ? v / 12.92
        : ((v + .055) / 1.055) ** 2.4); return .2126 * r + .7152 * g + .0722 * b; };
    const ground = node => { for (; node; node = node.parentElement) {
        const c = rgb(getComputedStyle(node).backgroundColor); if (c.length < 4 || c[3] > 0) return c; }
        return [255, 255, 255]; };
    const found = {};
    const note = (node, colour, least) => { const [a, b] = [light(rgb(colour)), light(ground(node))];
        const ratio = (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
        if (ratio < least) found[node.tagName + '.' + (node.getAttribute('class') || '') + ' ' + colour] = ratio; };
    const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    let count = 0;
    while (walker.nextNode()) { const node = walker.currentNode.parentElement;
        if (!walker.currentNode.data.trim() || node.closest('title, desc, script')) continue;
        const style = getComputedStyle(node); count += 1;
        note(node, node.closest('svg') ? style.fill : style.color, 4.5); }
    for (const mark of document.querySelectorAll('.row path')) note(mark, getComputedStyle(mark).stroke, 3);
    return [count, found]; })()"""


@pytest.mark.parametrize('scheme', ['light', 'dark'])
def test_colours_can_be_read(browser, page, scheme) -> None:
    browser.media(scheme)
    browser.open(page)
    ground = browser.run('getComputedStyle(document.body).backgroundColor')
    assert (ground == 'rgb(255, 255, 255)') == (scheme == 'light')
    count, weak = browser.run(CONTRASTS)
    assert count > 300 and weak == {}


def test_print(browser) -> None:
    browser.media('dark', 'print')
    assert browser.run('getComputedStyle(document.body).backgroundColor') == 'rgb(255, 255, 255)'
    browser.media('dark')
    closed = "document.querySelectorAll('details.row:not([open])').length"
    assert browser.run(closed) == 5
    browser.run("dispatchEvent(new Event('beforeprint'))")
    assert browser.run(closed) == 0
    browser.run("dispatchEvent(new Event('afterprint'))")
    assert browser.run(closed) == 5
    pdf = base64.b64decode(browser.send('Page.printToPDF', preferCSSPageSize=True)['data'])
    sheets = len(re.findall(rb'/Type /Page\b(?!s)', pdf))
    assert pdf.startswith(b'%PDF') and 2 < sheets < 30
    # The table is not wider than a sheet within its margins.
    browser.media('light', 'print')
    browser.size(round((297 - 2 * 12) / 25.4 * 96))
    assert browser.run("document.querySelector('.results').scrollWidth <= innerWidth") is True
    assert browser.run('document.documentElement.scrollWidth <= innerWidth') is True


def test_links_open_their_targets(browser) -> None:
    browser.run('document.querySelector(\'tr[data-row="2"] th a\').click()')
    browser.run('new Promise(done => setTimeout(done, 50))')
    assert browser.run("[...document.querySelectorAll('details.row')].map(d => d.open)") == [
        False,
        True,
        False,
        False,
        False,
    ]


def test_accessibility_tree(browser) -> None:
    nodes = browser.send('Accessibility.getFullAXTree')['nodes']
    found = [(node['role']['value'], node.get('name', {}).get('value', '')) for node in nodes if not node['ignored']]
    named = {role: [name for of, name in found if of == role] for role, _ in found}
    assert 'Results of made_up' in named['table'] and 'Results of made_up' in named['region']
    assert [name for name in named['columnheader'] if name.startswith('mIoU, %')] and 'Parameters M' in named['button']
    assert '1 RepLKNet made up, 31x31' in named['rowheader']
    pictures = named.get('image', []) + named.get('img', [])
    assert all(pictures) and 'mIoU against time' in pictures
    assert [name for name in pictures if name.startswith('Receptive field of ConvNeXt made up: 50 %: 40 px')]
    missing = [name for role, name in found if role == 'StaticText' and name.startswith('missing: ')]
    assert 'missing: not measured' in missing and 'missing: training failed: loss is NaN at iteration 12' in missing
    assert 'main' in named and len(named['heading']) >= 8


def test_a_browser_may_be_required(monkeypatch) -> None:
    monkeypatch.setattr('shutil.which', lambda name: None)
    monkeypatch.delenv(REQUIRED, raising=False)
    with pytest.raises(pytest.skip.Exception, match='no browser on PATH'):
        find()
    monkeypatch.setenv(REQUIRED, '1')
    with pytest.raises(pytest.fail.Exception, match='REPLK_MM_REQUIRE_BROWSER=1'):
        find()
