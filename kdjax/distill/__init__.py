"""Distillation: the outputs of a teacher and a student are paired, and methods compare them."""

from kdjax.distill.adapters import adapt, init_adapters, init_generators
from kdjax.distill.distiller import Distiller
from kdjax.distill.method import Context, Method, check, check_choice, mean_over_levels, mean_over_positives
from kdjax.distill.pairing import auto, by_hungarian, by_location, by_overlap, by_place
from kdjax.distill.several import Distillers
from kdjax.distill.taps import Pair, Reads, pair, tap
from kdjax.distill.teachers import Custom, Student, Teacher, from_file, mean, on_host, recorded, spec_of

__all__ = [
    "Context",
    "Custom",
    "Distiller",
    "Distillers",
    "Method",
    "Pair",
    "Reads",
    "Student",
    "Teacher",
    "adapt",
    "auto",
    "by_hungarian",
    "by_location",
    "by_overlap",
    "by_place",
    "check",
    "check_choice",
    "from_file",
    "init_adapters",
    "init_generators",
    "mean",
    "mean_over_levels",
    "mean_over_positives",
    "on_host",
    "pair",
    "recorded",
    "spec_of",
    "tap",
]
