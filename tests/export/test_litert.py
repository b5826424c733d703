"""LiteRT files compute what the JAX model computes."""

import re

import pytest

from kdjax import cli
from kdjax.commands import latency
from kdjax.export import graphs, litert, packages
from kdjax.inference import load
from tests.support.models import OTHERS, read, save_noisy

# With decoding not those with masks, which are refused.
CASES = [(name, raw) for name in ("rtmdet_pico", *OTHERS) for raw in ([], ["--raw"]) if raw or "_ins_" not in name]


@pytest.mark.parametrize(("name", "raw"), CASES, ids=["-".join([name, *raw]) for name, raw in CASES])
def test_litert_is_the_jax_model(made, name, raw, tmp_path, capsys, monkeypatch):
    for package in packages.LITERT:
        pytest.importorskip(package, reason="LiteRT needs kdjax[litert]")
    if name in OTHERS:
        save_noisy(name, tmp_path / "m")
    folder, file = made / "model" if name not in OTHERS else tmp_path / "m", tmp_path / "m.tflite"
    command = ["export", f"--model={folder}", "--format=litert", f"--out={file}", f"--data={made / 'data'}", *raw]
    assert cli.main(command) == 0
    told = capsys.readouterr().out
    assert re.search(r"difference from the JAX model \S+e-0[5-9]", told) and "(+0.00)" in told
    facts = read(tmp_path / "m.tflite.json")
    assert facts["detector"] == name and ("boxes f32[1, N, 4]" in facts["output"]) == (not raw)
    reader = litert.interpreter(file).get_signature_runner()
    assert list(reader.get_input_details()) == ["image", "image_size"][: 1 if raw else 2]
    names = graphs.map_names(load(folder)) if raw else ["boxes", "scores"]
    assert sorted(reader.get_output_details()) == sorted(names)
    if [name, *raw] == ["rtmdet_pico"] and not packages.missing(packages.LITERT_INT8):
        small = tmp_path / "int8.tflite"
        arguments = [f"--out={small}" if text.startswith("--out=") else text for text in command]
        assert cli.main([*arguments, "--dtype=int8", "--max-ap-loss=100"]) == 0
        assert "AP: " in capsys.readouterr().out and read(tmp_path / "int8.tflite.json")["dtype"] == "int8"
        assert small.stat().st_size < 0.45 * file.stat().st_size
    monkeypatch.setattr(latency, "clock", lambda call, runs, name: dict(median=1.0, p25=1.0, p75=2.0 + bool(call())))
    assert cli.main(["latency", f"--model={file}", "--threads=1"]) == 0
    [row] = [line.split() for line in capsys.readouterr().out.splitlines() if "LiteRT" in line]
    assert row[1:3] == ["LiteRT", "64x64"] and float(row[3]) == round(int(facts["parameters"]) / 1e6, 3)
