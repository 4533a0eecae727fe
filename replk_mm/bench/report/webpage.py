"""A report as one HTML page that needs nothing else: no network, no fonts, no other files."""
import base64
import hashlib
from pathlib import Path

from replk_mm.bench.report import gallery
from replk_mm.bench.report.assemble import Report, Suite
from replk_mm.bench.report.details import details
from replk_mm.bench.report.markup import Markup, join, tag
from replk_mm.bench.report.pictures import Album
from replk_mm.bench.report.table import table

_MOST_LISTED = 200


def page(report: Report) -> str:
    """The page's text."""
    style, script = (Markup(Path(__file__).with_name(name).read_text(encoding='utf-8'))
                     for name in ('page.css', 'page.js'))
    album = Album()
    suites = [_suite(suite, report, album, f's{i}') for i, suite in enumerate(report.suites, 1)]
    # Nothing is loaded or sent, and no other script or style than these two takes effect, whatever a record holds.
    policy = ("default-src 'none'; img-src data:; base-uri 'none'; form-action 'none'; "
              f"style-src '{_hash(style)}'; script-src '{_hash(script)}'")
    title = 'Report' + (f': {", ".join(suite.name for suite in report.suites)}' if report.suites else '')
    head = tag('head', tag('meta', charset='utf-8'), tag('meta', http_equiv='Content-Security-Policy', content=policy),
               tag('meta', name='viewport', content='width=device-width, initial-scale=1'), tag('title', title),
               tag('meta', name='color-scheme', content='light dark'), tag('style', style))
    body = tag('body', tag('header', tag('h1', title), _contents(report)), tag('main', _passed_over(report), *suites,
               _problems(album)), tag('script', script))
    return f'<!doctype html>\n{tag("html", head, body, lang="en")}\n'


def _hash(text: str) -> str:
    return f'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'


def _contents(report: Report) -> Markup:
    if len(report.suites) < 2:
        return Markup()
    return tag('nav', tag('ul', *(tag('li', tag('a', suite.name, href=f'#s{i}')) for i, suite in enumerate(report.suites, 1))),
               aria_label='Suites')


def _passed_over(report: Report) -> Markup:
    if not report.complaints:
        return Markup() if report.suites else tag('p', 'There are no records.')
    shown = report.complaints[:_MOST_LISTED]
    more = len(report.complaints) - len(shown)
    return tag('section', tag('h2', f'{len(report.complaints)} passed over'),
               tag('p', 'These records are not in the figures below:'),
               tag('ul', *(tag('li', text) for text in shown), tag('li', f'and {more} more') if more else ''),
               class_='failed box', id='passed-over')


def _problems(album: Album) -> Markup:
    if not album.problems:
        return Markup()
    distinct = list(dict.fromkeys(album.problems))[:_MOST_LISTED]
    return tag('section', tag('h2', 'Pictures that are missing'), tag('ul', *(tag('li', text) for text in distinct)),
               id='missing-pictures')


def _suite(suite: Suite, report: Report, album: Album, prefix: str) -> Markup:
    parts = (('Results', '', [table(suite, prefix)]),
             ('Accuracy and cost', 'figures', list(gallery.plots(suite))),
             ('Learning curves', 'figures', list(gallery.curves(suite))),
             ('Effective receptive fields', 'figures small', list(gallery.heat_maps(suite, report, album))),
             ('Example predictions', '', list(gallery.examples(suite, report, album))),
             ('Where the figures are from', '', [details(suite, row, prefix) for row in suite.rows]))
    sections = [tag('section', tag('h3', title), tag('div', join(content), class_=kind or None))
                for title, kind, content in parts if content]
    return tag('section', tag('h2', suite.name), tag('p', suite.question, class_='question'), *sections, id=prefix)
