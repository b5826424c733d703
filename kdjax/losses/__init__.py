"""Losses as pure functions: arrays in, unreduced float32 array out."""
