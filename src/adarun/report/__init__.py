"""How a story is shown: on a terminal, as a page, as a trace, as tables."""
