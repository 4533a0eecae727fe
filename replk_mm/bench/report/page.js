'use strict';
// Sorts the tables, opens what a link leads to, and for the printer where the figures are from.
for (const table of document.querySelectorAll('table.results')) {
  const said = table.closest('section').querySelector('.sorted');
  const headings = [...table.tHead.rows[0].cells];
  const valueOf = (row, column) => {
    const text = row.cells[column].dataset.value;
    return text === '' || text === undefined ? null : (isNaN(text) ? text : Number(text));
  };
  const compare = (column, sign) => (one, other) => {
    const [a, b] = [valueOf(one, column), valueOf(other, column)];
    if (a === null || b === null) return (a === null) - (b === null);
    // Figures of different protocols are not ranked: those of one stay together.
    const [p, q] = [one.cells[column].dataset.order || '', other.cells[column].dataset.order || ''];
    if (p !== q) return p.localeCompare(q, 'en', {numeric: true});
    if (typeof a === 'number' && typeof b === 'number') return sign * (a - b);
    return sign * String(a).localeCompare(String(b), 'en', {numeric: true});
  };
  headings.forEach((heading, column) => {
    const button = heading.querySelector('button');
    button.addEventListener('click', () => {
      const opposite = {ascending: 'descending', descending: 'ascending'};
      const direction = opposite[heading.getAttribute('aria-sort')] || button.dataset.first;
      for (const other of headings) other.removeAttribute('aria-sort');
      heading.setAttribute('aria-sort', direction);
      for (const body of table.tBodies) {
        const rows = [...body.rows].filter(row => !row.classList.contains('group'));
        body.append(...rows.sort(compare(column, direction === 'ascending' ? 1 : -1)));
      }
      const name = [...button.childNodes].map(node => node.textContent).join(' ');
      said.textContent = `Sorted by ${name}, ${direction}, within each protocol; what is missing comes last.`;
    });
  });
}

const openTarget = () => {
  const target = location.hash && document.getElementById(decodeURIComponent(location.hash.slice(1)));
  const part = target && target.closest('details');
  if (part) part.open = true;
};
addEventListener('hashchange', openTarget);
openTarget();

let closed = [];
addEventListener('beforeprint', () => {
  closed = [...document.querySelectorAll('details:not([open], .values)')];
  for (const part of closed) part.open = true;
});
addEventListener('afterprint', () => { for (const part of closed) part.open = false; });
