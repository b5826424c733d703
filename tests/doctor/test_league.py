"""What the doctor recommends, and that its table says what the log says."""

import math
import re
import statistics

import pytest

from kdjax import methods
from kdjax.doctor import league
from kdjax.doctor.findings import OK
from tests.shared import ROOT
from tests.test_pages import joined, sections

# Student's t: 97.5 % for one degree of freedom less than seeds.
QUANTILES = {2: 12.7062, 3: 4.3027, 4: 3.1824, 5: 2.7764, 6: 2.5706, 7: 2.4469, 8: 2.3646, 9: 2.306, 10: 2.2622}
LOG = sections((ROOT / "benchmarks" / "README.md").read_text())


@pytest.mark.parametrize("row", league.read(), ids=lambda row: f"{row.log}-{row.method}-{row.weight}")
def test_a_row_is_what_the_log_says(row):
    section = LOG[row.log]
    assert row.command in [line.strip() for line in joined(section).splitlines()]
    assert all(name in section for name in (row.student, row.teacher, str(row.images)))
    assert row.families == (league.family_of(row.student), league.family_of(row.teacher))
    assert row.method in methods.names() and (row.weight in ("published", "auto") or float(row.weight) > 0)
    kinds = {"published": "", "auto": ", auto"}  # as `kdjax study methods` names its rows
    cell = row.method + kinds.get(row.weight, f", weight {row.weight}")
    [line] = [one.replace("−", "-") for one in section.splitlines() if one.lower().startswith(f"| {cell} |")]
    told = float(re.search(r"\| ([+-]\d+\.\d+) [±|]", line)[1])
    gains = [float(one) for one in re.search(r"[+-]\d+\.\d+(?:, [+-]\d+\.\d+)+", line)[0].split(", ")]
    assert row.seeds == len(gains) and row.gain == told == pytest.approx(statistics.mean(gains), abs=0.011)
    half = QUANTILES[len(gains)] * statistics.stdev(gains) / math.sqrt(len(gains))
    # Gains by seed are rounded in the log, to 0.005.
    middle = statistics.mean(gains)
    assert row.interval == pytest.approx((middle - half, middle + half), abs=0.02)
    low, high = row.interval
    assert row.verdict == (league.HELPS if low > 0 else league.HURTS if high < 0 else league.NOT_SHOWN)


def test_no_study_is_told_twice():
    rows = [(row.study, row.method, row.weight) for row in league.read()]
    assert len(set(rows)) == len(rows)


def row(
    method, gain, *, images=200, weight="published", student="rtmdet_pico", teacher="rtmdet_micro", seeds=3, **other
):
    low, high = gain - 2.0, gain + 2.0
    verdict = league.HELPS if low > 0 else league.HURTS if high < 0 else league.NOT_SHOWN
    families = league.family_of(student), league.family_of(teacher)
    given = dict(data="scenes", log="methods", command="kdjax study") | other
    return league.Row(
        images=images, student=student, teacher=teacher, families=families, method=method, weight=weight, seeds=seeds,
        gain=gain, interval=(low, high), verdict=verdict, **given,
    )  # fmt: skip


def test_the_best_is_tried_first_and_numbers_are_beside_it():
    rows = [row("mkd", 3.02, seeds=5), row("pfi", 1.0), row("cwd", 4.1, weight="auto", log="auto"), row("ssim", -5.0)]
    [finding] = league.check_methods("rtmdet_tiny", "rtmdet_s", 300, rows)
    assert finding.level == OK and finding.message == (
        "on 200 images of scenes, rtmdet_micro teaching rtmdet_pico, cwd with weight=auto +4.1 [+2.1, +6.1] (3 seeds), "
        "mkd +3.0 [+1.0, +5.0] (5 seeds): try cwd with weight=auto first; not shown to help: pfi; hurt: ssim -5.0 "
        "[-7.0, -3.0] (3 seeds) (AP points over the twin with their 95 % intervals: benchmarks/README.md#auto and "
        "benchmarks/README.md#methods)"
    )


def test_a_study_in_which_nothing_helped_says_so():
    [finding] = league.check_methods("rtmdet_tiny", "rtmdet_s", 300, [row("mkd", 0.7, data="nuclei", seeds=2)])
    assert finding.message.startswith(
        "on 200 images of nuclei, rtmdet_micro teaching rtmdet_pico, no method was shown to help; "
        "mkd +0.7 [-1.3, +2.7] (2 seeds) ("
    )
    [finding] = league.check_methods("rtmdet_tiny", "rtmdet_s", 300, [row("ssim", -5.0)])
    assert ", no method was shown to help; hurt: ssim -5.0" in finding.message


def test_the_same_families_come_first_and_then_the_number_of_images():
    fcos = dict(teacher="fcos_r50")
    rows = [row("mkd", 3.0, images=n) for n in (100, 2000, 900)] + [row("cwd", 9.0, images=1000, **fcos)]
    found = [finding.message for finding in league.check_methods("rtmdet_tiny", "rtmdet_s", 1000, rows)]
    assert [message.partition(" images")[0] for message in found] == ["on 900", "on 2,000"]
    [message] = [one.message for one in league.check_methods("rtmdet_tiny", "fcos_r101-center", 1000, rows)]
    assert message.startswith("on 1,000 images of scenes, fcos_r50 teaching rtmdet_pico, cwd +9.0 ")


def test_nothing_comparable():
    rows = [row("mkd", 3.0), row("cwd", 5.0, images=20)]
    [finding] = league.check_methods("rtmdet_tiny", "rtmdet_s", 118287, rows)
    start = "nothing comparable was measured with 118,287 training images; the nearest: on 200 images of scenes, "
    assert finding.message.startswith(start)
    for student, teacher in (
        ("rtmdet_tiny", "yolox_s"),
        ("fcos_r18", "rtmdet_s"),
        ("rtmdet_tiny", "file of detections"),
    ):
        [finding] = league.check_methods(student, teacher, 200, rows)
        assert finding.message.startswith("nothing comparable was measured: no study has a teacher like ")
        assert student in finding.message and teacher in finding.message


def test_a_family_is_the_longest_name_that_fits():
    names = ("rtmdet_ins_pico", "rtmdet_tiny", "fcos_r18-center", "rtdetr_r50_m", "mean")
    assert [league.family_of(name) for name in names] == ["rtmdet_ins", "rtmdet", "fcos", "rtdetr", ""]
