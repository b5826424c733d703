"""The selection for GPUs exists, and says so where there is none."""

import os
import subprocess
import sys

import pytest

from tests import on_gpu
from tests.shared import ROOT


@pytest.mark.parametrize("chosen", on_gpu.SELECTION)
def test_the_selection_exists(chosen):
    file, _, name = chosen.partition("::")
    assert f"def {name or 'test_'}" in (ROOT / file).read_text()


@pytest.mark.skipif(os.environ.get("KDJAX_TEST_PLATFORM", "cpu") != "cpu", reason="there is a GPU")
def test_without_a_gpu_one_sentence_says_so():
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tests.on_gpu"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and not done.stdout
    [line] = done.stderr.splitlines()
    assert line.startswith("make test-gpu: JAX finds no GPU, so nothing was tested")


def test_without_a_choice_tests_run_on_the_cpu():
    code = "import tests.conftest as c, jax; print(c.PLATFORM, len(jax.devices()), jax.devices()[0].platform)"
    environment = {
        name: value for name, value in os.environ.items() if name not in ("KDJAX_TEST_PLATFORM", "XLA_FLAGS")
    }
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.stdout.split() == ["cpu", "8", "cpu"], done.stderr
