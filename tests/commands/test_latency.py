"""`kdjax latency`."""

import pickle
import shutil
import time

import pytest

from kdjax import cli
from kdjax.commands import latency
from kdjax.errors import UserError
from kdjax.export import metadata, onnx
from tests.support.checkpoints import Code
from tests.support.models import read, refused


@pytest.mark.user_input(
    "Models and exports",
    "an .onnx or .tflite that is empty, damaged or a pickle",
    "refused: onnxruntime cannot read it; no code runs",
)
@pytest.mark.parametrize(
    ("name", "package", "reader"),
    [("x.onnx", "onnxruntime", "onnxruntime"), ("x.tflite", "ai_edge_litert", "LiteRT")],
)
def test_a_damaged_file_is_refused(tmp_path, capsys, name, package, reader):
    pytest.importorskip(package, reason=f"{reader} needs kdjax[export] or kdjax[litert]")
    for content in (b"", b"no graph", pickle.dumps({"code": Code(tmp_path / "executed")})):
        (tmp_path / name).write_bytes(content)
        assert f"{name}: {reader} cannot read it" in refused(capsys, "latency", f"--model={tmp_path / name}")
    assert not (tmp_path / "executed").exists()


@pytest.mark.user_input(
    "Models and exports",
    "an .onnx that takes no image, or one of no fixed size",
    "refused: takes no image; the size of x0 is not fixed",
)
def test_onnx_files_of_other_programs(tmp_path, capsys, monkeypatch):
    pytest.importorskip("onnxruntime", reason="ONNX needs kdjax[export]")
    format = pytest.importorskip("onnx")
    monkeypatch.setattr(latency, "clock", lambda call, runs, name: dict(median=1.0 if call() else 0, p25=1.0, p75=2.0))
    command = ("latency", f"--model={tmp_path / 'x.onnx'}")

    def write(*shapes, kind=1):
        values = [format.helper.make_tensor_value_info(f"x{i}", kind, shape) for i, shape in enumerate(shapes)]
        outputs = [format.helper.make_tensor_value_info(f"y{i}", kind, None) for i in range(len(shapes))]
        nodes = [
            format.helper.make_node("Not" if kind == 9 else "Relu", [f"x{i}"], [f"y{i}"]) for i in range(len(shapes))
        ]
        graph = format.helper.make_graph(nodes, "g", values, outputs)
        opset = format.helper.make_opsetid("", 19)
        format.save(format.helper.make_model(graph, opset_imports=[opset], ir_version=9), str(tmp_path / "x.onnx"))

    write((1, 2), ("N", 3, 32, 64))
    assert cli.main(command) == 0 and "32x64" in capsys.readouterr().out
    write((8, 3, 32, 64))  # a fixed batch
    assert cli.main([*command, f"--out={tmp_path / 't.json'}"]) == 0
    [row] = read(tmp_path / "t.json")["rows"]
    assert (row["batch"], row["median"], row["p75"]) == (8, 1 / 8, 2 / 8)
    assert cli.main([*command, f"--out={tmp_path / 't.json'}"]) == 0, "its own file is replaced"
    capsys.readouterr()
    write((1, 1, 8, 16), kind=10)  # float16, one colour
    assert cli.main(command) == 0 and "8x16" in capsys.readouterr().out
    write((1, 3, 8, 16), kind=9)
    assert "its input 'x0' is of tensor(bool): those that can be timed are tensor(float)" in refused(capsys, *command)
    write((7,))
    assert "takes no image" in refused(capsys, *command)
    write((1, 3, "h", "w"))
    assert "the size of x0 is not fixed ([1, 3, 'h', 'w'])" in refused(capsys, *command)
    write((1, 3, 32, 32))
    monkeypatch.setattr(onnx, "session", lambda path, real=onnx.session, **rest: _Deaf(real(path, **rest)))
    assert "does not run: no" in refused(capsys, *command)


class _Deaf:
    """A session that cannot be run."""

    def __init__(self, session):
        self.get_inputs, self.get_modelmeta = session.get_inputs, session.get_modelmeta

    def run(self, *_):
        raise RuntimeError("no\nat all")


@pytest.mark.user_input(
    "Folders and names", "`kdjax latency --out` of a file that it times, or of its metadata", "refused: it is read"
)
def test_what_is_timed_is_not_overwritten(made, tmp_path, capsys):
    for name in ("a.onnx", "b.tflite", "b.tflite.json", "c.xml", "c.bin", "d.onnx.data", "d.onnx"):
        (tmp_path / name).write_text(name)
    for name in ("a.onnx", "b.tflite", "b.tflite.json", "c.xml", "c.bin", "d.onnx.data"):
        told = refused(capsys, "latency", f"--model={tmp_path}", f"--out={tmp_path / name}")
        assert "is also what is read" in told and (tmp_path / name).read_text() == name
    (tmp_path / "mine.json").write_text("[]")
    told = refused(capsys, "latency", f"--model={made / 'model'}", f"--out={tmp_path / 'mine.json'}")
    assert "is there, and `kdjax latency` did not write it" in told and read(tmp_path / "mine.json") == []
    assert [path.name for path in latency.parts_of(tmp_path / "d.onnx")] == ["d.onnx.data"]
    assert latency.parts_of(tmp_path / "b.tflite") == []


def test_metadata_of_others_is_refused_or_left_out(tmp_path):
    file = tmp_path / "x.tflite"
    assert metadata.beside(file) == {}
    for content, told in (("{", "it is no json"), ("[1]", "not the metadata"), ('{"parameters": 7}', "not the meta")):
        metadata.place(file).write_text(content)
        with pytest.raises(UserError, match=f"x.tflite.json: .*{told}"):
            metadata.beside(file)


@pytest.mark.user_input("Config and flags", "more threads than the machine has", "refused: --threads must be in 1 .. N")
def test_latency(made, exported, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(onnx, "write", lambda loaded, path, *, raw, batch=1: shutil.copy(exported[0], path))
    monkeypatch.setattr(latency, "clock", lambda call, runs, name: dict(median=1.0 * runs, p25=1.0, p75=2.0))
    table = tmp_path / "t.json"
    command = ["latency", f"--model={made / 'model'}", f"--model={exported[0]}", "--runs=3", f"--out={table}"]
    assert cli.main([*command, "--threads=1"]) == 0
    rows = read(table)["rows"]
    assert [row["runtime"] for row in rows] == ["XLA", "onnxruntime", "onnxruntime"]
    assert {(row["params"], row["flops"]) for row in rows} == {(550_882, 9_254_656)}
    assert rows[2]["bytes"] == exported[0].stat().st_size and all(row["image_size"] == [64, 64] for row in rows)
    told = capsys.readouterr().out
    assert "1 thread, 3 runs after 20 to warm up" in told and told.count("64x64") == 3
    assert "--threads must be in 1 .. " in refused(capsys, "latency", f"--model={made / 'model'}", "--threads=99999")


def test_a_folder_stands_for_its_files(made, exported, tmp_path, capsys, monkeypatch):
    """With the model in it, if there is one."""
    monkeypatch.setattr(latency, "clock", lambda call, runs, name: dict(median=1.0, p25=1.0, p75=2.0))
    for name in ("b.onnx", "a.onnx"):
        shutil.copy(exported[0], tmp_path / name)
    (tmp_path / "notes.txt").touch()
    assert cli.main(["latency", f"--model={tmp_path}", "--threads=1", f"--out={tmp_path / 't.json'}"]) == 0
    rows = read(tmp_path / "t.json")["rows"]
    assert [row["model"] for row in rows] == [str(tmp_path / "a.onnx"), str(tmp_path / "b.onnx")]
    shutil.copytree(made / "model", tmp_path, dirs_exist_ok=True)
    assert latency.expanded(str(tmp_path)) == [str(tmp_path), *(row["model"] for row in rows)]
    assert "c.xml: there is no such file" in refused(capsys, "latency", f"--model={tmp_path / 'c.xml'}")
    assert latency.expanded("quickstart_teacher") == ["quickstart_teacher"]
    assert latency.expanded(str(tmp_path / "a.onnx")) == [str(tmp_path / "a.onnx")]


def test_the_clock_leaves_the_warm_up_out():
    calls = []
    times = latency.clock(lambda: time.sleep(0.02 if len(calls) < latency.WARM_UP else 0) or calls.append(1), 5, "x")
    assert len(calls) == latency.WARM_UP + 5 and 0 <= times["p25"] <= times["median"] <= times["p75"] < 15
