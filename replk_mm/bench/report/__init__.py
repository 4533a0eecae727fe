"""Results of suites as a page and as Markdown: records are assembled to plain data, which the other modules lay out."""
