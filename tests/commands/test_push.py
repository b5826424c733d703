"""`kdjax push` and hf://OWNER/NAME, with a server of this machine for the Hub; and the cards that the Hub reads."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from kdjax import cli, inference, remote, weights
from kdjax.errors import UserError
from kdjax.report import model_card
from tests.support.hub import serving
from tests.support.models import refused

huggingface_hub = pytest.importorskip("huggingface_hub", reason="it needs kdjax[hub]")
FILES = ["README.md", "config.json", "model.safetensors"]


@pytest.fixture
def hub(tmp_path, monkeypatch, cache):
    monkeypatch.setenv("KDJAX_CACHE", str(tmp_path / "cache"))
    huggingface_hub.HfFileSystem.clear_instance_cache()
    with serving() as one:
        yield one
    huggingface_hub.HfFileSystem.clear_instance_cache()


def equal(one: inference.Model, other: inference.Model) -> bool:
    pairs = zip(*(weights.to_torch(m.detector, *m.variables).items() for m in (one, other)), strict=True)
    return all(name == same and np.array_equal(a, b) for (name, a), (same, b) in pairs)


def test_what_is_pushed_is_loaded(hub, made, tmp_path, capsys):
    folder = tmp_path / "student"
    shutil.copytree(made / "model", folder)
    (folder / "model.onnx").write_bytes(b"graph")
    (folder / "model.tflite").write_bytes(b"lite")
    (folder / "model.tflite.json").write_text("{}")
    for name in ("notes.txt", ".secret", "other.json"):
        (folder / name).write_text("stays here")
    assert cli.main(["push", str(folder), "me/cells", "--license=apache-2.0", "--private"]) == 0
    [(name, files)] = hub.repositories.items()
    assert name == "me/cells" and sorted(files) == sorted([*FILES, "model.onnx", "model.tflite", "model.tflite.json"])
    assert files["model.safetensors"] == (folder / "model.safetensors").read_bytes()
    assert hub.private["me/cells"] in (True, "private") and hub.messages == ["Upload rtmdet_pico with kdjax"]
    told = capsys.readouterr().out
    assert f"{hub.url}/me/cells: README.md, config.json" in told and "--model=hf://me/cells loads it" in told
    assert "note" not in told
    card = huggingface_hub.ModelCard(files["README.md"].decode())
    assert (card.data.license, card.data.library_name) == ("apache-2.0", "kdjax")
    assert not (folder / "README.md").exists()
    model = inference.load("hf://me/cells")
    assert equal(model, inference.load(folder)) and model.class_names == inference.load(folder).class_names
    assert weights.load("hf://me/cells")[0] == model.detector


def test_a_second_push_replaces_the_files_and_is_loaded(hub, made, tmp_path, capsys):
    assert cli.main(["push", str(made / "model"), "me/cells"]) == 0
    assert "note: its card names no licence: --license=ID writes one" in capsys.readouterr().out
    first = inference.load("hf://me/cells")
    asked = len(hub.asked)
    inference.load("hf://me/cells")
    assert not any("/resolve/" in one for one in hub.asked[asked:])  # nothing has changed
    assert cli.main(["push", str(made / "other"), "me/cells"]) == 0
    second = inference.load("hf://me/cells")
    assert equal(second, inference.load(made / "other")) and not equal(first, second)
    assert len(hub.messages) == 2
    hub.revisions["me/cells", "v1"] = {path.name: path.read_bytes() for path in (made / "model").iterdir()}
    assert equal(inference.load("hf://me/cells@v1"), first) and equal(inference.load("hf://me/cells"), second)


def test_the_card_of_a_run_is_what_the_hub_reads(hub, finished, capsys):
    """And the folder of a run stands for its student."""
    workdir, results = finished
    assert cli.main(["push", str(workdir), "me/cells"]) == 0
    text = hub.repositories["me/cells"]["README.md"].decode()
    assert text == (workdir / "student" / "README.md").read_text()  # byte for byte
    data = huggingface_hub.ModelCard(text, ignore_metadata_errors=False).data
    assert (data.library_name, data.pipeline_tag, data.model_name) == ("kdjax", "object-detection", "rtmdet_pico")
    assert data.tags == ["object-detection", "jax", "rtmdet_pico"]
    assert {one.metric_name: one.metric_value for one in data.eval_results} == {
        name: round(results["student"][name], 4) for name in ("AP", "AP50", "AP75")
    }
    [on] = {(one.task_type, one.dataset_type, one.dataset_name, one.dataset_split) for one in data.eval_results}
    assert on == ("object-detection", "scenes", "scenes", "val")
    assert huggingface_hub.metadata_load(workdir / "student" / "README.md") == model_card.parted(text)[0]


def test_a_card_keeps_what_it_has():
    own = "---\nlicense: mit\ntags: [cells]\n---\n# Mine\n---\nrule\n"
    data, body = model_card.parted(model_card.completed(own))
    assert data == {"library_name": "kdjax", "pipeline_tag": "object-detection", "license": "mit", "tags": ["cells"]}
    assert body == "# Mine\n---\nrule\n"
    assert model_card.completed(model_card.completed(own)) == model_card.completed(own)
    assert model_card.parted(model_card.completed(own, "apache-2.0"))[0]["license"] == "apache-2.0"
    for plain in ("# Mine\n", "---\n- a list\n---\n# Mine\n", "---\na: [\n---\n"):
        assert model_card.parted(plain) == ({}, plain)
        assert model_card.completed(plain).endswith(f"---\n{plain}")
    text = model_card.short("rtmdet_pico", ["a: 'b", "- é"], (64, 96))
    assert huggingface_hub.ModelCard(text).data.pipeline_tag == "object-detection" and "input: 64x96 pixels" in text
    assert model_card._slug("my cells (2017)/") == "my-cells-2017" and model_card._slug("細胞") == "data"


@pytest.mark.user_input(
    "Config and flags", "`kdjax push` of a checkpoint or to a wrong name", "refused: what it must be"
)
def test_what_cannot_be_pushed_is_refused(hub, made, finished, tmp_path, capsys):
    for name in ("cells", "me/cells/deep", "me/", "../cells", "me/ce lls"):
        assert "must be OWNER/NAME" in refused(capsys, "push", str(made / "model"), name)
    half = finished[0].parent / "half"
    assert "is a checkpoint of a run: push the student/ of one that" in refused(capsys, "push", str(half), "me/cells")
    assert "there is no such file or folder" in refused(capsys, "push", str(made / "none"), "me/cells")
    damaged = Path(shutil.copytree(made / "model", tmp_path / "damaged"))
    (damaged / "README.md").write_bytes(b"caf\xe9")
    assert "README.md: the card is not UTF-8: save it as UTF-8" in refused(capsys, "push", str(damaged), "me/cells")
    assert not hub.repositories
    assert cli.main(["push", str(made / "model"), "me/cells"]) == 0
    told = refused(capsys, "push", str(made / "other"), "me/cells", "--private")
    assert "--private: me/cells is there already and is public: make it private on the Hub" in told
    assert len(hub.messages) == 1


@pytest.mark.user_input(
    "Folders and names",
    "hf://OWNER/NAME, or `kdjax push`, without network, rights or the package",
    "refused: what is wrong",
)
def test_a_hub_that_does_not_answer_is_one_sentence(hub, made, capsys, monkeypatch):
    assert refused(capsys, "latency", "--model=hf://me/none") == (
        "kdjax: --model: hf://me/none: there is nothing at this address: check it, and your rights"
    )
    for wrong in ("hf://me", "hf://me/cells@", "hf:///cells"):
        told = refused(capsys, "latency", f"--model={wrong}")
        assert f"{wrong} is no address of the Hub: it must be hf://OWNER/NAME or hf://OWNER/NAME@REVISION" in told
    hub.refused = 401
    told = refused(capsys, "push", str(made / "model"), "me/cells")
    assert "hf://me/cells cannot be written (" in told and "401" in told and "your rights" in told
    hub.refused = 0
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    huggingface_hub.close_session()
    for words in (["push", str(made / "model"), "me/cells"], ["latency", "--model=hf://me/cells"]):
        told = refused(capsys, *words)
        assert "hf://me/cells cannot be " in told and "OfflineModeIsEnabled" in told
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    huggingface_hub.close_session()
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    assert "hf://me/cells cannot be written (ConnectError" in refused(capsys, "push", str(made / "model"), "me/cells")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    told = refused(capsys, "push", str(made / "model"), "me/cells")
    assert "huggingface_hub cannot be imported" in told and "pip install 'kdjax[hub]'" in told

    def missing(*_, **__):
        raise ImportError("Install huggingface_hub to access HfFileSystem")

    monkeypatch.setattr(remote.fsspec.core, "url_to_fs", missing)
    with pytest.raises(UserError, match=r"reads hf:// is not installed: pip install 'kdjax\[hub\]'"):
        inference.load("hf://me/cells")


def test_config_json_of_a_pushed_model_is_checked(hub, made):
    """As of any other folder of weights: its hashes are compared."""
    assert cli.main(["push", str(made / "model"), "me/cells"]) == 0
    files = hub.repositories["me/cells"]
    files["config.json"] = json.dumps(json.loads(files["config.json"]) | {"classes": list("abcdef")}).encode()
    with pytest.raises(UserError, match="was changed after it was written"):
        inference.load("hf://me/cells")
