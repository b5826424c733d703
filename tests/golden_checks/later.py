"""Reference files of detectors that kdjax does not have yet: remove a line with the detector that it waits for."""

from tests.golden_checks.api import LATER_TRANSFORMERS, skip_file

CHECKS = [
    ("model/dfine_*.npz", skip_file(LATER_TRANSFORMERS)),
]
