"""Options out of range: a sentence, or a detector that can be initialised."""

import importlib

import jax
import pytest

from kdjax import detectors
from kdjax.detectors.api import flatten
from kdjax.errors import UserError

SMALL = {"base_channels": 4, "neck_channels": 8, "head_channels": 8, "mask_channels": 4, "widen": 0.0625, "groups": 2}
FIRST = {
    family: next(name for name in detectors.names() if name.removeprefix(f"{family}_") in _variants)
    for family in detectors.families()
    for _variants in [importlib.import_module(f"kdjax.detectors.{family}").VARIANTS]
}


@pytest.mark.user_input("Config and flags", "options of a detector that are 0 or below", "refused: with the range")
@pytest.mark.parametrize("family", sorted(FIRST))
def test_numbers_of_zero_and_below(family):
    name = FIRST[family]
    options = detectors.options(name)
    small = {key: value for key, value in SMALL.items() if key in options}
    numbers = [key for key, value in options.items() if isinstance(value, (int, float)) and not isinstance(value, bool)]
    numbers += [key for key in ("widen", "deepen", "neck_channels", "neck_blocks", "head_channels") if key in options]
    for option in sorted(set(numbers) - {"frozen_stages"}):
        for value in (0, -1):
            value = float(value) if isinstance(options[option], float) or option in ("widen", "deepen") else value
            shapes, told = shapes_of(name, small | {option: value})
            assert option in told if told else all(all(shape) for shape in shapes), f"{option}={value}: {told}"


def shapes_of(name, options):
    """The shapes of the parameters, or the error."""
    try:
        detector = detectors.build(name, 2, **options)
    except UserError as error:
        return [], str(error)
    detector.init(jax.random.key(0))
    return [leaf.shape for leaf in flatten(detector.shapes[0]).values()], ""
