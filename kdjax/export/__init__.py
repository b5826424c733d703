"""Models in the formats of other runtimes; the module of each format has `write` and `runner`."""
