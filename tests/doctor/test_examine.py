"""The doctor's checks in their order, and its command."""

import pytest

from kdjax import cli
from kdjax.doctor import examine, gradients
from kdjax.doctor.findings import ERROR, OK, WARNING, Finding
from tests.support.findings import errors

LOSSES = ("loss_box", "loss_cls", "mkd/alignment", "mkd/feature", "mkd/frequency", "mkd/multiscale")
MEASURED = gradients.Measured(dict.fromkeys(LOSSES, 1.0), dict.fromkeys(LOSSES, 1.0), 0.01)


def test_a_run_that_does_not_start_has_one_finding(tiny):
    config = tiny[0].config.copy_and_resolve_references()
    config.batch_size = -1
    [finding] = examine.examine(config)
    assert finding.level == ERROR and "config.batch_size must be >= 1, not -1" in finding.message


@pytest.mark.filterwarnings("ignore:the classifiers of")
def test_all_findings_in_order(tiny, other_weights, monkeypatch):
    """A student with weights of other classes is sound; its teacher is random."""
    monkeypatch.setattr(gradients, "measure_gradients", lambda *_: MEASURED)  # slow, tested in test_gradients.py
    config = tiny[0].config.copy_and_resolve_references()
    config.student.weights = str(other_weights)
    config.optimizer.lr = 0.0
    findings = list(examine.examine(config, image_count=8))
    assert [finding.subject for finding in findings] == [
        "train data", "val data", "small objects", "learning rate", "moving average", "teacher's class map", "teacher",
        "sizes", "mkd's taps", "what to try", "student's class map", "memory", "programs", "student's head", *LOSSES,
    ]  # fmt: skip
    assert set(errors(findings)) <= {"teacher", "moving average"}
    messages = {finding.subject: finding.message for finding in findings}
    names = ", ".join(tiny[0].dataset.classes)
    assert messages["teacher's class map"] == f"the weights have, in the same order, the 6 classes of the data: {names}"
    assert messages["student's class map"] == (
        f"the classifiers are re-initialised for the 6 classes of the data: {names}; "
        "the weights have 2 others: cat, dog"
    )


def test_nothing_is_measured_that_does_not_fit(tiny, monkeypatch):
    monkeypatch.setattr(examine, "check_weights", lambda *_: [])
    monkeypatch.setattr(examine, "check_memory", lambda *_: [Finding(ERROR, "memory", "none")])
    monkeypatch.setattr(gradients, "measure_gradients", lambda *_: pytest.fail("computed"))
    assert list(examine.examine(tiny[0].config))[-1].subject == "memory"


def test_the_command_checks_the_run_of_its_arguments(monkeypatch, capsys):
    configs = []
    command = ["doctor", "--config=quickstart:ssim", "--config.optimizer.lr=0.25"]
    for level, code in ((WARNING, 0), (ERROR, 1)):
        findings = [Finding(OK, "sizes", "good"), Finding(level, "mkd", "look at start")]
        monkeypatch.setattr(examine, "examine", lambda config, found=findings: configs.append(config) or found)
        assert cli.main(command) == code
        out = capsys.readouterr().out
        assert f"mkd{' ' * 19}look at start\n" in out
        assert out.endswith(("0 errors, 1 warning, 1 ok\n", "1 error, 0 warnings, 1 ok\n")[code])
    assert list(configs[0].methods) == ["ssim"] and configs[0].optimizer.lr == 0.25
    for wrong, words in (
        ("--config.optimizer.lrr=1", "unknown setting config.optimizer.lrr (did you mean config.optimizer.lr?)"),
        ("nonsense", "unexpected argument 'nonsense'"),
    ):
        assert cli.main([*command, wrong]) == 2
        [line] = capsys.readouterr().err.splitlines()
        assert line.startswith("kdjax: ") and words in line
