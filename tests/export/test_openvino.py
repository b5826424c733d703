"""OpenVINO's files compute what the JAX model computes, in OpenVINO's own runtime."""

import re
import shutil
import subprocess
import sys

import numpy as np
import pytest

from kdjax import cli
from kdjax.commands import latency
from kdjax.data import records
from kdjax.export import onnx, openvino, packages, verify
from kdjax.inference import predict as prediction
from tests.support.models import CLASSES, TRANSFORMERS, TWO_STAGES, refused, refused_at_the_end, save_noisy

pytestmark = pytest.mark.skipif(bool(packages.missing(packages.OPENVINO)), reason="OpenVINO needs kdjax[openvino]")


@pytest.fixture
def ready(exported, monkeypatch):
    """The ONNX file of the model is there already."""
    monkeypatch.setattr(onnx, "write", lambda loaded, path, *, raw, batch, signed=False: shutil.copy(exported[0], path))


def test_openvino_is_the_jax_model(made, exported, ready, tmp_path, capsys, monkeypatch):
    file = tmp_path / "m.xml"
    command = ["export", f"--model={made / 'model'}", "--format=openvino", f"--data={made / 'data'}"]
    assert cli.main([*command, f"--out={file}"]) == 0
    told = capsys.readouterr().out
    assert re.search(r"difference from the JAX model \S+e-0[5-9]", told) and "(+0.00)" in told
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.bin", "m.xml"]
    facts = openvino.metadata(file)
    assert facts["classes"].count('"') == 2 * len(CLASSES) and facts["image_size"] == "[64, 64]"
    assert facts["AP_of_JAX"] == facts["AP_of_this_file_float32"] and facts["dtype"] == "float32"
    of_onnx = onnx.session(exported[0]).get_modelmeta().custom_metadata_map
    assert {re.sub(r"\W+", "_", name) for name in of_onnx} == set(facts)
    # As a user of the file runs it, beside the ONNX file.
    package = openvino._package()
    compiled = package.Core().compile_model(str(file), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    image = records.decode((made / "data" / "images" / "val" / "val_00001.png").read_bytes())
    canvas, placed = prediction.on_canvas(image, (64, 64))
    feed = {"image": canvas[None], "image_size": placed[None]}
    found = compiled(feed)
    for name, wanted in zip(("boxes", "scores", "labels"), onnx.session(exported[0]).run(None, feed), strict=True):
        np.testing.assert_allclose(found[name][:20], wanted[:20], rtol=1e-4, atol=1e-3)
    monkeypatch.setattr(latency, "clock", lambda call, runs, name: dict(median=1.0, p25=1.0, p75=2.0 + bool(call())))
    assert cli.main(["latency", f"--model={tmp_path}", "--threads=1"]) == 0
    [row] = [line.split() for line in capsys.readouterr().out.splitlines() if "OpenVINO" in line]
    assert row[1:3] == ["OpenVINO", "64x64"] and float(row[3]) == round(int(facts["parameters"]) / 1e6, 3)
    assert float(row[5]) == round(sum(path.stat().st_size for path in tmp_path.iterdir()) / 1e6, 2)


@pytest.mark.parametrize("dtype", ["float16", pytest.param("int8", marks=pytest.mark.slow)])
def test_smaller_weights_of_openvino(dtype, made, exported, ready, tmp_path, capsys, monkeypatch):
    file = tmp_path / "m.xml"
    command = ["export", f"--model={made / 'model'}", "--format=openvino", f"--dtype={dtype}", f"--out={file}"]
    assert f"a file in {dtype} needs --data=DIR" in refused(capsys, *command)
    command.append(f"--data={made / 'data'}")
    assert cli.main([*command, "--max-ap-loss=100"]) == 0
    facts = openvino.metadata(file)
    assert facts["dtype"] == dtype and f"AP_of_this_file_{dtype}" in facts
    share = file.with_suffix(".bin").stat().st_size / exported[0].stat().st_size
    assert share < (0.3 if dtype == "int8" else 0.55)
    assert ("FakeQuantize" in file.read_text()) == (dtype == "int8")
    # The loss is set by hand: the AP of random weights may rise as well.
    monkeypatch.setattr(verify, "average_precision", lambda *_, run: {"AP": 0.40 if run is None else 0.37})
    before = file.read_bytes()
    refusal = refused_at_the_end(capsys, *command)
    assert f"{dtype} loses 3.00 points of AP" in refusal and "nothing was written" in refusal
    assert file.read_bytes() == before and len(list(tmp_path.iterdir())) == 2


def test_a_wrong_openvino_file_is_refused(made, ready, tmp_path, capsys, monkeypatch):
    command = ["export", f"--model={made / 'other'}", "--format=openvino", f"--out={tmp_path / 'x.xml'}"]
    assert "differ from the JAX model's by" in refused_at_the_end(capsys, *command)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.user_input(
    "Models and exports", "an .xml that is empty, damaged, no network or without its .bin", "refused, with the reason"
)
def test_a_damaged_xml_is_refused(tmp_path, capsys):
    file = tmp_path / "x.xml"
    for content in (b"", b"no graph", b'<?xml version="1.0"?><svg></svg>', b'\x80\x04<net name="x">'):
        file.write_bytes(content)
        told = refused(capsys, "latency", f"--model={file}")
        assert "x.xml: OpenVINO cannot read it: it does not begin as a network in xml does" in told
    file.write_bytes(b'<?xml version="1.0"?>\n<net name="x" version="11"><layers>')
    assert "the weights, x.bin, do not lie beside it" in refused(capsys, "latency", f"--model={file}")
    file.with_suffix(".bin").touch()
    assert "x.xml: OpenVINO cannot read it: " in refused(capsys, "latency", f"--model={file}")


def test_openvino_is_imported_without_its_telemetry():
    code = "from kdjax.export import openvino; openvino._package()\n"
    code += "from openvino.tools.ovc import convert_impl, main, telemetry_utils, utils\n"
    code += "print({one.tm.__name__ for one in (convert_impl, main, telemetry_utils, utils)})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "{'openvino.tools.ovc.telemetry_stub'}", done.stderr


@pytest.mark.user_input("The machine", "a signal after several files of OpenVINO were run", "survived")
def test_a_signal_after_files_of_openvino_is_handled(exported, tmp_path):
    """In a process of its own, which OpenVINO's way with the stack of signals would end (see `_core`)."""
    openvino.write(exported[0], tmp_path / "m.xml")
    code = (
        "import gc, signal\nfrom kdjax.export import openvino\n"
        f"first, second = [openvino.compiled({str(tmp_path / 'm.xml')!r}) for _ in range(2)]\n"
        "del first\ngc.collect()\ndel second\ngc.collect()\n"
        "signal.signal(signal.SIGTERM, lambda *_: print('handled'))\nsignal.raise_signal(signal.SIGTERM)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout.strip()) == (0, "handled"), done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("fcos_r18", ["--batch=dynamic"]),
        ("yolox_pico", ["--batch=3"]),
        ("rtmdet_ins_pico", []),
        ("retinanet_r18", ["--raw"]),
        *[(name, []) for name in (*TWO_STAGES, *TRANSFORMERS)],
    ],
)
def test_openvino_of_other_families(name, more, made, tmp_path, capsys):
    pytest.importorskip("jax2onnx", reason="ONNX needs kdjax[export]")
    save_noisy(name, tmp_path / "m")
    command = ["export", f"--model={tmp_path / 'm'}", "--format=openvino", f"--out={tmp_path / 'm.xml'}"]
    assert cli.main([*command, f"--data={made / 'data'}", *more]) == 0
    [told] = re.findall(r"difference from the JAX model (\S+) ", capsys.readouterr().out)
    staged = name in (*TWO_STAGES, *TRANSFORMERS)
    assert 0 < float(told) < (verify.STAGED if staged else verify.TOLERANCE)
