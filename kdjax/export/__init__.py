"""Models in the formats of other runtimes: a module a format, `write` and `runner` in each."""
