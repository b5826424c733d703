"""The parts of the benchmarks that need no training: tables, summaries, commands, and what a failed run leaves."""

import argparse
import json
import re
import shutil
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from kdjax import cli, data, files
from kdjax.commands.settings import read
from kdjax.training import config as settings
from tests.shared import ROOT, script

DIMS = ("NHWC", "HWIO", "NHWC")


@pytest.fixture(autouse=True)
def beside(monkeypatch):
    """A script sees the files beside it."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


def of(name):
    return script(ROOT / "benchmarks" / f"{name}.py")


def test_method_cost_summary_and_table():
    cost = of("method_cost")
    rows = [
        cost.summarize("mkd", [(0.33, 0.2, 0.1), (0.3, 0.2, 0.1), (0.36, 0.2, 0.1)], 123.4),
        cost.summarize("ssim", [(0.6, 0.2, 0.1)], 1.0),
    ]
    assert rows[0]["relative"] == 1.1 and (rows[0]["step_ms"], rows[0]["twin_ms"], rows[0]["teacher_ms"]) == (
        330,
        200,
        100,
    )
    assert rows[0]["low"] <= 1.1 <= rows[0]["high"] and rows[1]["low"] == rows[1]["high"] == 2.0
    assert cost.table(rows).splitlines()[2:] == [
        "| ssim | 2.000 | 2.000 … 2.000 | 600.0 | 200.0 | 100.0 | 1 |",
        "| mkd | 1.100 | 1.000 … 1.200 | 330.0 | 200.0 | 100.0 | 123 |",
    ]


def test_method_cost_memory_counts_a_donated_argument_once():
    cost = of("method_cost")
    x = jnp.ones((256, 256))
    kept, donated = (cost.megabytes(cost.compiled(lambda x: x + 1, x, donate=d)) for d in (False, True))
    assert kept == pytest.approx(2 * x.nbytes / 1e6, rel=0.01) and donated == pytest.approx(x.nbytes / 1e6, rel=0.01)


def test_method_cost_batch_has_objects_and_padding():
    batch = of("method_cost").made_up_batch(2, 64, 5, masks=True)
    covered = batch["masks"].mean((2, 3)) / 255
    areas = np.prod(batch["boxes"][..., 2:] - batch["boxes"][..., :2], -1) / 64**2
    np.testing.assert_allclose(covered, np.pi / 4 * areas, atol=0.01)
    assert not covered[~batch["valid"]].any()
    assert batch["image"].shape == (2, 64, 64, 3) and 0 < batch["valid"].mean() < 1
    boxes = batch["boxes"][batch["valid"]]
    assert (boxes[:, 2:] > boxes[:, :2]).all() and boxes.max() <= 64 and not batch["boxes"][~batch["valid"]].any()


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags", [[], ["--teacher=rtmdet_micro", "--method=fitnet", "--dtype=bfloat16"]], ids=["alone", "distilled"]
)
def test_step_time_ends_with_one_line_of_json(flags, capsys, monkeypatch):
    monkeypatch.setattr("kdjax.training.setup.prepare_process", lambda folder: None)
    small = ["--detector=rtmdet_pico", "--batch=2", "--size=64", "--classes=3", "--steps=3"]
    of("step_time").main([*small, *flags])
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert 0 < found["least_s"] <= found["median_s"] and found["memory_mb"] > 1
    assert found["images_per_s"] == pytest.approx(2 / found["median_s"], rel=0.01)


def test_profile_reads_the_operations_of_a_program():
    profile = of("step_profile")
    x, kernel = jnp.ones((1, 8, 8, 2)), jnp.ones((3, 3, 2, 2))
    convolve = lambda kernel: jnp.sum(jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=DIMS))  # noqa: E731
    program = jax.jit(jax.grad(lambda kernel: convolve(kernel) ** 2)).lower(kernel).compile()
    sources = profile.operations(program.as_text())
    classes = {profile.class_of(name, sources) for name in sources}
    assert {"convolution, forward", "convolution, gradient", "sum or maximum"} <= classes
    assert all("{" not in shape for shape, _ in sources.values())
    assert profile.class_of("custom-call.3.clone__onednn$convolution", {}) == "convolution, oneDNN"
    assert profile.class_of("dot.3", {}) == "matrix product" and profile.class_of("add.1", {}) == "elementwise"


# As JAX writes them: a GPU has a row for each stream, and rows of sums; the host's rows name what is launched.
GPU_TRACE = """
planes {
  name: "/host:CPU"
  lines {
    name: "python"
    events { metadata_id: 1 duration_ps: 9000000000 stats { metadata_id: 1 str_value: "fusion.1" } }
  }
  event_metadata { key: 1 value { id: 1 name: "launch" } }
  stat_metadata { key: 1 value { id: 1 name: "hlo_op" } }
}
planes {
  name: "/device:GPU:0"
  lines {
    name: "Stream #14(Compute)"
    events { metadata_id: 1 duration_ps: 2000000000 stats { metadata_id: 1 str_value: "convolution.2" } }
    events { metadata_id: 1 duration_ps: 1000000000 stats { metadata_id: 1 str_value: "convolution.2" } }
    events { metadata_id: 2 duration_ps: 500000000 }
  }
  lines {
    name: "XLA Modules"
    events { metadata_id: 3 duration_ps: 7000000000 stats { metadata_id: 1 str_value: "all" } }
  }
  event_metadata { key: 1 value { id: 1 name: "sm90_xmma_fprop" } }
  event_metadata { key: 2 value { id: 2 name: "MemcpyD2D" } }
  event_metadata { key: 3 value { id: 3 name: "jit_update" } }
  stat_metadata { key: 1 value { id: 1 name: "hlo_op" } }
}
"""


def test_profile_reads_the_streams_of_a_gpu():
    profile = of("step_profile")
    trace = jax.profiler.ProfileData.from_text_proto(GPU_TRACE)
    assert profile.times(trace) == {"convolution.2": pytest.approx(3), "MemcpyD2D": pytest.approx(0.5)}
    on_cpu = GPU_TRACE[: GPU_TRACE.rindex("planes")]
    assert profile.times(jax.profiler.ProfileData.from_text_proto(on_cpu)) == {"fusion.1": pytest.approx(9)}


@pytest.mark.slow
def test_gpu_says_what_is_not_in_its_table(capsys, monkeypatch, tmp_path):
    """The parts that compile nothing: a method that cannot compare the two, the loader, a peer that is not there."""
    monkeypatch.setattr("kdjax.training.setup.prepare_process", lambda folder: None)
    small = ["--detector=rtmdet_pico", "--teacher=rtmdet_micro", "--batch=2", "--size=64", "--classes=3", "--steps=1"]
    parts = ["--methods=go_lsd", "--parts=methods,loader,peer"]
    gpu = of("gpu")
    monkeypatch.setattr(gpu.loader, "measure", lambda *_: (0.5, 3))
    gpu.main([*small, *parts, f"--peer={sys.executable}", f"--log={tmp_path / 'log.md'}"])
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    [row] = found["rows"]
    assert row["what"].startswith("loader, ") and row["images_per_s"] == 4
    assert found["notes"][0].startswith("Not on these detectors: go_lsd (") and found["notes"][1].startswith(
        "mmdetection is not in the table: "
    )
    assert "| loader, " in (tmp_path / "log.md").read_text()


def test_the_error_of_a_precision_is_relative():
    error = of("precision").error
    assert error({"a": np.array([3.0, 4.0])}, {"a": np.array([3.0, 0.0])}) == pytest.approx(4 / 3)


@pytest.mark.slow
def test_precision_compares_with_float32(capsys):
    of("precision").main(["--detectors=rtmdet_pico", "--batch=2", "--size=64", "--classes=2"])
    tf32, short = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert tf32[:2] == ["rtmdet_pico", "TF32"] and all(float(cell) < 1e-5 for cell in tf32[2:])
    assert short[1] == "bfloat16" and 1e-4 < float(short[2]) < 0.1 and 1e-6 < float(short[3]) < 0.1


@pytest.mark.slow
def test_gpu_measures_step_distillation_forward_and_decode(capsys, monkeypatch):
    monkeypatch.setattr("kdjax.training.setup.prepare_process", lambda folder: None)
    small = ["--detector=rtmdet_pico", "--teacher=rtmdet_micro", "--batch=2", "--size=64", "--classes=3", "--steps=2"]
    of("gpu").main([*small, "--methods=fitnet", "--dtypes=float32", "--parts=step,methods,inference,loader"])
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    *rows, loader = rows
    assert [row["what"] for row in rows] == ["training step", "distilled by fitnet", "forward", "decode with NMS"]
    assert all(row["ms"] > 0 and row["compile_s"] > 0 and row["planned_mb"] >= 0 for row in rows) and loader["ms"] > 0
    assert rows[0]["planned_mb"] < rows[1]["planned_mb"]


@pytest.mark.slow
def test_profile_names_the_dearest_operations_and_the_roofline(capsys, monkeypatch, tmp_path):
    profile = of("step_profile")
    monkeypatch.setattr("kdjax.training.setup.prepare_process", lambda folder: None)
    monkeypatch.setattr(profile, "SIDE", 256)
    small = ["--detector=rtmdet_pico", "--batch=2", "--size=64", "--classes=3", "--steps=2"]
    profile.main([*small, f"--log={tmp_path / 'log.md'}"])
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert len(found["dearest"]) == 10 and sum(found["shares"].values()) == pytest.approx(1)
    assert found["shares"]["convolution, gradient"] > 0
    assert re.search(r"\d+% of the \d+ GFLOP/s of a float32 matrix product", (tmp_path / "log.md").read_text())


@pytest.mark.slow
def test_convolutions_time_both_forms(capsys, monkeypatch):
    monkeypatch.setattr("kdjax.training.setup.prepare_process", lambda folder: None)
    of("convolutions").main(["--layers=1", "--batch=1", "--rounds=1"])
    [row] = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert row[:2] == ["160x160, 12 to 24", "3x3"] and all(float(ms) > 0 for cell in row[2:] for ms in cell.split("/"))


@pytest.mark.slow
def test_matching_finds_the_sums_of_scipy(capsys):
    of("matching").main(["--queries=20", "--objects=10", "--outputs=2", "--batch=2", "--classes=3", "--repeats=1"])
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert len(found) == 6 and all(abs(row["excess"]) < 1e-4 and min(row["seconds"]) > 0 for row in found.values())


def test_step_time_needs_teacher_and_method_together(capsys):
    with pytest.raises(SystemExit):
        of("step_time").main(["--method=mkd"])
    assert "both --teacher and --method" in capsys.readouterr().err


def test_the_script_beside_detections_has_the_nms_of_kdjax():
    detections, plain = of("detections"), of("plain_nms")
    rng = np.random.default_rng(0)
    corner = rng.uniform(0, 30, (60, 2))
    boxes = np.concatenate([corner, corner + rng.uniform(5, 20, (60, 2))], 1).astype(np.float32)
    scores = rng.uniform(0, 1, 60).astype(np.float32)
    kept, valid = plain.greedy_nms(boxes[None], scores[None], iou_threshold=0.65, max_detections=60)
    assert detections.numpy_nms(boxes, scores, 0.65) == kept[valid].tolist() and 5 < valid.sum() < 60


def test_auto_weight_summary_and_table():
    benchmark = of("auto_weight")
    row = benchmark.summarize("mkd", [(0.9, 0.3, 0.7), (1.0, 0.3, 0.7), (1.1, 0.4, 0.6)], 50)
    assert (row["relative"], row["overhead"], row["measured_ms"], row["step_ms"]) == (1.0, 0.02, 1000, 1000)
    assert row["first"] == 0.026, "20 measurements, and those before steps 1, 2, 4, 8, 16 and 32"
    assert benchmark.table([row]).splitlines()[2] == "| mkd | 1.000 | 0.900 … 1.100 | 1000.0 | 1000.0 | 2.0% | 2.6% |"


@pytest.mark.slow
def test_auto_weight_measures_methods_alone_and_at_once(capsys, monkeypatch):
    monkeypatch.setattr("kdjax.training.setup.prepare_process", lambda folder: None)
    small = ["--student=rtmdet_pico", "--teacher=rtmdet_micro", "--batch=2", "--size=64", "--classes=3"]
    of("auto_weight").main([*small, "--methods=fitnet,fitnet+cwd", "--rounds=2", "--every=10"])
    alone, both = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert (alone["methods"], both["methods"]) == ("fitnet", "fitnet+cwd")
    for row in (alone, both):
        assert row["relative"] > 0 and row["overhead"] == pytest.approx(row["relative"] / 10, abs=1e-4)


@pytest.mark.parametrize("study", ["scenes", "bccd", "neu", "pcb", "person", "coco"])
def test_the_studies_of_the_field_are_commands_of_kdjax(study, monkeypatch, tmp_path):
    """Each run is read by kdjax as a study of one method and seed; its study.json is kept."""
    field, asked, fails = of("field"), [], False
    data = tmp_path / "half"
    for folder in ("annotations", "images", "IMAGES", "ANNOTATIONS"):
        (data / folder).mkdir(parents=True)
    for name in ("trainval.txt", "test.txt"):
        (data / name).write_text("")
    categories = [{"id": 1, "name": "person"}, {"id": 2, "name": "cat"}]
    boxes = [{"id": 1, "image_id": 7, "category_id": 1}, {"id": 2, "image_id": 7, "category_id": 2}]
    truth = {"images": [{"id": 7, "file_name": "7.jpg"}], "categories": categories, "annotations": boxes}
    (data / "annotations" / "instances_val.json").write_text(json.dumps(truth))

    def kdjax(*words):
        known, rest = cli._parser()[0].parse_known_args(words)
        config = read(known.config, [word for word in rest if ".weights=" not in word])
        assert settings.unknown_keys(config) == []
        settings.check_values(config)
        asked.append(known)
        if known.command == "study":
            known_folder = tmp_path / "field" / study / "1"
            assert known.workdir == str(known_folder) and (known.first, known.seeds) == (1, 1)
            known_folder.mkdir(parents=True, exist_ok=True)
            file = known_folder / "study.json"
            studies = json.loads(file.read_text())["studies"] if file.exists() else {}
            what = known.methods + {"auto": ", auto", "published": ""}[known.weights]
            rows = [{"what": what, "failed": {"1": "no memory"} if fails else {}}]
            study_of = {"command": " ".join(words), "rows": rows}
            file.write_text(json.dumps(files.sealed({"studies": studies | {what: study_of}})))

    monkeypatch.setattr(field, "kdjax", kdjax)
    monkeypatch.setattr(field, "STUDIES", tmp_path / "studies")
    places = [f"--data={data}", f"--weights={tmp_path}", f"--workdir={tmp_path / 'field'}"]
    field.main([study, "--seed=1", "--methods=mkd,cwd", *places])
    before = {"scenes": [], "person": ["train", "cache"], "coco": ["train", "cache"]}.get(study, ["train"])
    whats = {"mkd, auto", "cwd, auto"} | ({"mkd", "cwd"} if study == "bccd" else set())
    assert [known.command for known in asked] == before + ["study"] * len(whats)
    if "cache" in before:
        assert asked[1].config == "distill/coco_folder:mkd+rtmdet_cwd+cwd+pkd"
    kept = tmp_path / "studies" / f"{study}_1.json"
    assert field.rows_in(kept) == whats
    assert not files.altered(json.loads(kept.read_text())) and str(tmp_path) not in kept.read_text()
    shutil.rmtree(tmp_path / "field" / study)  # as on another machine
    fails = True
    for _ in range(2):  # what failed is tried again
        asked.clear()
        field.main([study, "--seed=1", "--methods=mkd,pkd", *places])
        assert [known.methods for known in asked if known.command == "study"] == ["pkd"] * (len(whats) // 2)
        assert field.rows_in(kept) == whats
    if study == "person":
        kept = json.loads((tmp_path / "field" / "coco_person" / "annotations" / "instances_val.json").read_text())
        assert kept["annotations"] == boxes[:1] and kept["categories"] == categories[:1]


def test_images_of_steel_and_of_circuit_boards_become_data_sets(tmp_path):
    """NEU-DET as a VOC folder, DeepPCB as a COCO folder: splits, classes and boxes as kdjax reads them."""
    field, theirs = of("field"), tmp_path / "theirs"
    xml = """<annotation><size><width>200</width><height>200</height></size><object><name>scratches</name>
        <bndbox><xmin>2</xmin><ymin>3</ymin><xmax>50</xmax><ymax>60</ymax></bndbox></object></annotation>"""
    for folder in ("IMAGES", "ANNOTATIONS", "group/1", "group/1_not"):
        (theirs / folder).mkdir(parents=True)
    for number in (1, 5, 21, 110):
        Image.new("L", (200, 200)).save(theirs / "IMAGES" / f"scratches_{number}.jpg")
        (theirs / "ANNOTATIONS" / f"scratches_{number}.xml").write_text(xml)
    for name, boxes in (("a", "466 441 493 470 3\n\n"), ("b", "1,2,11,22,6\n454,300,493,396,1")):
        Image.new("L", (640, 640)).save(theirs / "group" / "1" / f"{name}_test.jpg")
        (theirs / "group" / "1_not" / f"{name}.txt").write_text(boxes)
    (theirs / "trainval.txt").write_text("group/1/a.jpg group/1_not/a.txt\n")
    (theirs / "test.txt").write_text("group/1/b.jpg group/1_not/b.txt\n")
    args = argparse.Namespace(data=theirs, workdir=tmp_path / "made")

    def read_as(source: str, root) -> list[dict[str, list[dict[str, Any]]]]:
        cfg = settings.base().data
        cfg.update(dict(source=source, root=str(root), cache=str(tmp_path / "cache")))
        dataset = data.open_dataset(cfg)
        return [data.ground_truth(dataset, split) for split in ("train", "val")]

    train, val = read_as("voc_folder", field.steel(args))
    assert len(train["images"]) == 2 and [c["name"] for c in val["categories"]] == ["scratches"]
    assert [image["file_name"] for image in val["images"]] == [
        "JPEGImages/scratches_110.jpg",
        "JPEGImages/scratches_5.jpg",
    ]
    assert [box["bbox"] for box in val["annotations"]] == [[1, 2, 49, 58]] * 2
    train, val = read_as("coco_folder", field.boards(args))
    assert [box["bbox"] for box in train["annotations"]] == [[466, 441, 27, 29]]
    names = {category["id"]: category["name"] for category in val["categories"]}
    assert [(names[box["category_id"]], box["bbox"]) for box in val["annotations"]] == [
        ("pin-hole", [1, 2, 10, 20]),
        ("open", [454, 300, 39, 96]),
    ]


def test_int8_table():
    names = ("float32", "int8, quantised after training", "int8, trained")
    scores = {
        ("onnx", name): score for name, score in zip(names, ([50.0, 52.0], [49.0, 51.0], [50.0, 51.0]), strict=True)
    }
    measured = dict.fromkeys(scores, (2.5e6, 4.0)) | {("onnx", names[2]): (0.7e6, 2.5)}
    lines = of("int8").table(scores, measured).splitlines()
    assert lines[2] == "| onnxruntime | float32 | 51.00 ± 1.41 | 2.50 | 4.00 |"
    assert lines[4] == "| onnxruntime | int8, trained | 50.50 ± 0.71 | 0.70 | 2.50 |"
    assert lines[-1] == "| onnxruntime | 1.00 ± 0.00 | 0.50 ± 0.71 |"


def test_int8_reads_the_score_of_a_file(monkeypatch):
    script = of("int8")
    for facts in ({"AP of JAX": "1", "AP of this file, int8": "51.25"}, {"AP_of_this_file_int8": "51.25"}):
        monkeypatch.setattr(script.latency, "exported_file", lambda _, facts=facts: (None, None, None, facts))
        assert script.average_precision("x") == 51.25


def test_int8_trains_and_exports_what_is_missing(tmp_path, monkeypatch):
    script, ran = of("int8"), []

    def kdjax(*command):
        ran.append(command)
        paths = {flag.partition("=")[0]: flag.partition("=")[2] for flag in command}
        if command[0] == "train":
            (tmp_path / paths["--workdir"]).mkdir()
            (tmp_path / paths["--workdir"] / "results.json").write_text("{}")
        elif command[0] == "export":
            (tmp_path / paths["--out"]).write_text("")
        else:
            rows = [{"model": flag[8:], "bytes": 1e6, "median": 2.0} for flag in command if flag.startswith("--model")]
            (tmp_path / paths["--out"]).write_text(json.dumps({"rows": rows}))

    monkeypatch.setattr(script, "kdjax", kdjax)
    monkeypatch.setattr(script, "average_precision", lambda file: 50.0)
    flags = [f"--workdir={tmp_path}", "--seeds=2", "--data=scenes", "--", "--config.steps=4"]
    script.main(flags)
    assert [command[0] for command in ran].count("train") == 4 and [c[0] for c in ran].count("export") == 18
    trained = [command for command in ran if "--config.student.options.int8=True" in command]
    assert len(trained) == 2 and all("--config.steps=4" in command for command in trained)
    ran.clear()
    script.main(flags)
    assert [command[0] for command in ran] == ["latency"]
