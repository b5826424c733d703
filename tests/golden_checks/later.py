"""Reference files that wait for a later issue, and the reason. Who brings the code takes the line out."""

from tests.golden_checks.api import LATER_MASKS, LATER_TWO_STAGE, skip_file

CHECKS = [
    ("loss/det_mask_*.npz", skip_file(LATER_MASKS)),
    ("model/faster_*.npz", skip_file(LATER_TWO_STAGE, "all but the features of regions")),
    ("model/mask_*.npz", skip_file(LATER_TWO_STAGE, "all but the features of regions")),
    ("model/rtmdetins_*.npz", skip_file(LATER_MASKS)),
    ("tables/rtmdet-ins_*_state.json", skip_file(LATER_MASKS)),
]
