"""Models side by side on images: what is shown, with and without gradio."""

import importlib.util
import json
import os
import subprocess
import sys

import numpy as np
import pytest

from kdjax.commands import arguments, view
from kdjax.structs import Detections
from tests.shared import ROOT
from tests.support.models import refused


class Stand:
    """In place of a model: one object in the middle of each image, with a score."""

    exif_orientation = "stored"

    def __init__(self, path, score):
        self.path, self.score, self.calls = path, score, 0

    def detect(self, image):
        self.calls += 1
        height, width = image.shape[:2]
        box = np.array([[width / 4, height / 4, width / 2, height / 2]])
        return Detections(box, np.array([self.score], np.float32), np.array([1]), ("cat", "dog"))


@pytest.fixture
def images(made, tmp_path):
    folder = tmp_path / "photos" / "below"
    folder.mkdir(parents=True)
    for path in sorted((made / "data" / "images" / "val").iterdir())[:3]:
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    (folder / "notes.txt").write_text("no image")
    return tmp_path / "photos"


def test_each_model_has_its_boxes_and_threshold(images):
    found = view.images_of(str(images))
    assert [path.name for path in found] == ["broken.png", *(f"val_{i:05}.png" for i in range(3))]
    models = [Stand("a", 0.8), Stand("a", 0.4)]
    viewer = view.Viewer(found, models)
    assert viewer.names == ["a (1)", "a (2)"] and viewer.title(1).startswith("2 of 4: ")
    one, other = viewer.views(1, [0.5, 0.5])
    assert one.text == "1 object from score 0.50 on: 1 dog" and other.text == "no object from score 0.50 on"
    assert one.image.shape == (640, 640, 3) and not np.array_equal(one.image, other.image)
    both = viewer.views(1, [0.3, 0.3])
    assert both[1].text == "1 object from score 0.30 on: 1 dog"
    assert [model.calls for model in models] == [1, 1], "moving a threshold detects nothing anew"
    broken, _ = viewer.views(0, [0.3, 0.3])
    assert broken.image is None and "broken.png" in broken.text
    assert np.array_equal(viewer.views(99, [0.3, 0.3])[0].image, viewer.views(3, [0.3, 0.3])[0].image)


def test_few_detections_are_kept(images, monkeypatch):
    monkeypatch.setattr(view, "KEPT", 1)
    model = Stand("a", 0.8)
    viewer = view.Viewer(view.images_of(str(images)), [model])
    for place in (1, 2, 2, 1):
        viewer.views(place, [0.3])
    assert model.calls == 3 and len(viewer.known) == 1


def test_a_real_model(made, images):
    viewer = view.Viewer(view.images_of(str(images)), [arguments.load_model(str(made / "model"))])
    [shown] = viewer.views(1, [0.0])
    assert shown.image.shape == (640, 640, 3) and " from score 0.00 on: " in shown.text


@pytest.mark.user_input("Models and exports", "`kdjax view` without gradio", "refused: how to install it")
def test_without_gradio_one_sentence(made, images, monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "gradio" else find(name))
    told = refused(capsys, "view", f"--model={made / 'model'}", f"--data={images}")
    assert told == "kdjax: kdjax view needs gradio: pip install 'kdjax[view]'"


def test_wrong_arguments_get_one_sentence(made, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)  # as if gradio were there
    (tmp_path / "empty").mkdir()
    model = f"--model={made / 'model'}"
    for flags, words in (
        ([f"--data={tmp_path / 'none'}"], "--data: there is no folder"),
        ([f"--data={tmp_path / 'empty'}"], "holds no images"),
        ([f"--data={made}", "--threshold=2"], "--threshold must be a score in 0 .. 1"),
        ([f"--data={made}", "--port=-1"], "--port must be in 0 .. 65535"),
    ):
        assert words in refused(capsys, "view", model, *flags)


def test_ctrl_c_while_an_image_is_computed(made, images, monkeypatch):
    """The other thread would be ended within XLA, which aborts the process."""
    ended = []

    class Ended(Exception):
        pass

    def end(code):
        ended.append(code)
        raise Ended

    def serve(viewer, port):
        if computing:
            viewer.lock.acquire()
        raise KeyboardInterrupt

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(view, "build", lambda viewer, threshold: viewer)
    monkeypatch.setattr(view, "serve", serve)
    monkeypatch.setattr(os, "_exit", end)
    arguments = {"models": [str(made / "model")], "data": str(images), "threshold": 0.3, "port": 0, "exif": None}
    computing = False
    with pytest.raises(KeyboardInterrupt):
        view.run(**arguments)
    computing = True
    with pytest.raises(Ended):
        view.run(**arguments)
    assert ended == [130]


_SERVED = """
import json, sys, urllib.request
from kdjax.commands import view
from tests.commands.test_view import Stand

viewer = view.Viewer(view.images_of(sys.argv[1]), [Stand("a", 0.8), Stand("b", 0.4)])
page = view.build(viewer, 0.3)
address = view.serve(page, 0, block=False)
config = json.loads(urllib.request.urlopen(address + "config", timeout=20).read())
labels = [part["props"].get("label") for part in config["components"]]
shown = [part["props"].get("value") for part in config["components"] if part["props"].get("label") == "model"]
try:
    view.serve(view.build(viewer, 0.3), int(address.rsplit(":")[-1].strip("/")), block=False)
except Exception as error:
    taken = str(error)
print(json.dumps([address, page.server_name, page.share, labels.count("lowest score"), shown, taken]))
page.close(verbose=False)
"""


def test_the_page_is_served_to_this_machine_only(images):
    if importlib.util.find_spec("gradio") is None:
        pytest.skip("the page needs kdjax[view]")
    # In a process of its own: gradio leaves sockets open, which are errors in tests.
    done = subprocess.run([sys.executable, "-c", _SERVED, str(images)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    address, server, share, sliders, models, taken = json.loads(done.stdout.splitlines()[-1])
    assert address.startswith("http://127.0.0.1:") and server == "127.0.0.1" and not share
    assert sliders == 2 and models == ["a", "b"]
    assert taken.startswith("--port: ") and taken.endswith(" is taken: choose another one")
