"""How a job or its story is shown: metrics, a text, a page, a trace, tables."""
