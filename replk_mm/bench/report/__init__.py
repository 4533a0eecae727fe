"""Results of suites as an HTML page and as Markdown: ``assemble`` arranges records, ``page`` renders them."""
