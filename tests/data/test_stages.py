"""Checks of the settings of batches."""

import numpy as np
import pytest

from kdjax import data
from kdjax.errors import UserError
from tests.support.data import settings


@pytest.mark.user_input(
    "Config and flags",
    "augmentation out of range, NaN, not two sides",
    "refused: the setting, what it must be, what it is",
)
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(image_size=(0, 64)), "^image_size must be .height, width. of the canvas in pixels, not .0, 64."),
        (dict(image_size=("a", None)), "^image_size must be .height, width. of the canvas in pixels, not .'a', None."),
        (
            dict(image_size=(64, 62), masks=True),
            "^image_size must be multiples of 4 px where masks is True, not .64, 62.",
        ),
        (dict(augment=dict(flip=1.5)), "^augment.flip must be a probability in 0 .. 1, not 1.5"),
        (dict(augment=dict(scale=(2.0, 0.5))), "augment.scale"),
        (dict(augment=dict(scale=(1.0, np.inf))), "augment.scale"),
        (dict(augment=dict(hsv=(-1.0, 0.0, 0.0))), "augment.hsv"),
        (dict(augment=dict(zoom_out=1.5)), "augment.zoom_out"),
        (dict(augment=dict(hsv=(0.0, np.nan, 0.0))), "augment.hsv"),
        (dict(augment=dict(mixup=-0.5)), "augment.mixup must be a probability in 0 .. 1, not -0.5"),
        (dict(augment=dict(cache=0)), "augment.cache must be at least 1 image, not 0"),
        (dict(stage2=dict(start=-3)), "stage2.start must be a step, .* not -3"),
        (dict(stage2=dict(start=3, augment=dict(flip=2.0))), "^stage2.augment.flip must be"),
    ],
)
def test_settings_out_of_range_are_refused(changes, words):
    data.check_settings(settings(""))
    with pytest.raises(UserError, match=words):
        data.check_settings(settings("", **changes))
