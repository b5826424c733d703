"""Distillation methods: one published method a file, losses wired to taps."""
