"""Methods by name: options, schedules, constructors, and those in a folder of the user's."""

import subprocess
import sys

import numpy as np
import pytest

from kdjax import methods, plugins
from kdjax.distill import Distiller
from kdjax.errors import UserError

FILE = '''
"""A method."""

from kdjax.distill import Method, Reads


def make(*, weight: float = 1.0) -> Method:
    """Nothing."""
    return Method(lambda key, student, teacher: {}, lambda params, context: {}, {"own": weight}, Reads())
'''


def test_schedule():
    method = methods.build("bckd", weight=2.0, start=10, warmup=4, stop=30, decay=5)
    distiller = Distiller(*[type("Model", (), {"spec": None})] * 2, methods=[method])
    steps = (0, 9, 10, 13, 20, 25, 29, 30, 99)
    at = [distiller.weights(step)["bckd/classes"] / method.weights["classes"] for step in steps]
    np.testing.assert_allclose(at, (0, 0, 0.25, 1, 1, 1, 0.2, 0, 0), rtol=1e-6)
    assert float(methods.build("bckd").scale(0)) == 1.0
    for wrong in (dict(stop=3, start=5), dict(decay=5), dict(warmup=-1)):
        with pytest.raises(UserError, match=r"^mkd: schedule .*not possible"):
            methods.build("mkd", **wrong)


def test_unknown_method_and_option_list_the_valid_ones():
    with pytest.raises(UserError, match=r"mkdd.*mkd"):
        methods.build("mkdd")
    with pytest.raises(UserError, match=r"wieght.*weight"):
        methods.build("mkd", wieght=1.0)


@pytest.mark.parametrize("name", methods.names())
def test_a_constructor_is_build_with_the_name_filled_in(name):
    constructor = getattr(methods, name)
    assert constructor().name == name and constructor().weights == methods.build(name).weights
    assert constructor(start=5).scale(4) == 0
    with pytest.raises(UserError, match=f"^{name}: unknown option 'wieght'.*weight"):
        constructor(wieght=1.0)


def folder(path):
    (path / "methods").mkdir()
    (path / "methods" / "own.py").write_text(FILE)
    return str(path)


def test_a_folder_that_is_named_before_the_import_gives_a_constructor(tmp_path, monkeypatch):
    monkeypatch.setenv(plugins.VARIABLE, folder(tmp_path))
    code = "from kdjax import methods; print('own' in methods.names(), dict(methods.own(weight=2.0).weights))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "True {'own': 2.0}", done.stderr


def test_what_is_no_method_is_no_attribute():
    with pytest.raises(AttributeError, match="mkdd"):
        methods.mkdd  # noqa: B018


def test_a_folder_that_is_named_later_is_found_too(tmp_path, monkeypatch):
    monkeypatch.setattr(methods, "__path__", list(methods.__path__))
    assert "own" not in methods.names()
    monkeypatch.setenv(plugins.VARIABLE, folder(tmp_path))
    try:
        assert "own" in methods.names()
        assert methods.own(weight=2.0).weights == {"own": 2.0}
        assert methods.options("own")["weight"] == 1.0 and methods.build("own").name == "own"
    finally:
        sys.modules.pop("kdjax.methods.own", None)
        vars(methods).pop("own", None)
