"""What is hashed is what is read, and is read once."""

import os
from pathlib import Path

import cv2
import numpy as np
import pytest

from kdjax.data import coco, hashes, paths
from kdjax.data.records import ImageRecord
from kdjax.errors import UserError
from tests.support.data import coco_json, opened, small_folder, write_folder


def write_image(path: Path, value: int) -> None:
    """A grey image as PPM, whose size in bytes does not depend on its content, whatever the suffix says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(cv2.imencode(".ppm", np.full((20, 30, 3), value, np.uint8))[1].tobytes())


@pytest.mark.user_input(
    "Prepared data",
    "a changed image behind links, absolute or `..` paths, any suffix",
    "read anew, though its size and time are the old ones",
)
def test_a_changed_image_is_noticed_whatever_its_path(tmp_path):
    """Although it keeps its size and its time of modification."""
    root, store = tmp_path / "set", tmp_path / "store"
    names = ["a.png", "cam/a.png", "linked.png", str(store / "absolute.png"), "../../../store/up.png", "other/a.png",
             "a.gif", "a.avif", "a.jfif", "a.JP2", "a", "a b\u00e9.png"]  # fmt: skip
    truth = coco_json(dict.fromkeys(names, (20, 30)), [])
    images = write_folder(root, {"train": truth}, {}) / "images" / "train"
    (images / "cam").symlink_to(store / "cam")
    (images / "linked.png").symlink_to(store / "target")
    paths = [images / name for name in names]
    paths[1], paths[2], paths[5] = store / "cam" / "a.png", store / "target", images.parent / "other" / "a.png"
    for path in paths:
        write_image(path, 7)
    for position, path in enumerate(paths):
        state = path.stat()
        before = opened(root, tmp_path, ["train"])
        assert before.splits["train"].records[position]["image"].max() == 7
        write_image(path, 200)
        os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
        assert path.stat().st_size == state.st_size and path.stat().st_mtime_ns == state.st_mtime_ns
        after = opened(root, tmp_path, ["train"])
        assert after.splits["train"].records[position]["image"].min() == 200, path
        assert after.fingerprint != before.fingerprint


@pytest.mark.user_input("Prepared data", "a damaged or missing list of hashes", "survived: it counts as empty")
def test_files_are_hashed_again_only_if_they_may_have_changed(tmp_path, monkeypatch):
    paths = {name: f"{tmp_path}/{name}" for name in ("a", "b", "\udcf6")}
    for name, path in paths.items():
        Path(path).write_text(name, errors="surrogateescape")
    memory = tmp_path / "memory"
    hashes.save(memory, hashes.of_files(paths, {}, ""))
    known = hashes.recall(memory)
    assert [state for state, _ in known.values()] == [None] * 3  # they may change again without a new time
    assert list(known) == list(paths)
    monkeypatch.setattr(hashes, "_YOUNG", 0)
    hashes.save(memory, hashes.of_files(paths, known, ""))
    known = hashes.recall(memory)
    read = []
    monkeypatch.setattr(hashes, "of_file", lambda path: read.append(path) or "new")
    assert hashes.of_files(paths, known, "") == known and read == []
    os.utime(paths["b"], (1, 1))
    assert hashes.of_files(paths, known, "")["b"][1] == "new" and read == [paths["b"]]
    whole = memory.read_bytes()
    memory.write_bytes(whole[:-9] + b"0" + whole[-8:])
    assert hashes.recall(memory) == {} == hashes.recall(tmp_path / "missing")


@pytest.mark.user_input(
    "Folders and names", "a source that is gone, or a folder", "refused: cannot be read (Is a directory)"
)
def test_a_source_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(UserError, match=rf"^{tmp_path}: cannot be read \(Is a directory\)$"):
        hashes.of_file(tmp_path)
    with pytest.raises(UserError, match=rf"^{tmp_path}/a: cannot be read \(No such file or directory\)$"):
        hashes.of_files({"a": f"{tmp_path}/a"}, {}, "")


@pytest.mark.user_input(
    "Prepared data", "an image that changes while it is prepared", "refused: run the same command again"
)
def test_an_image_that_changes_while_it_is_prepared_is_refused(tmp_path):
    write_image(tmp_path / "a.png", 7)
    record = ImageRecord(id=1, file_name="a.png", width=30, height=20, sha256=hashes.of_file(tmp_path / "a.png"))

    def read():
        return list(coco.stream([record], {"a.png": f"{tmp_path}/a.png"}, tmp_path, "x.json", []))

    assert len(read()) == 1
    write_image(tmp_path / "a.png", 8)
    with pytest.raises(UserError, match=r"a.png: has changed while the data is prepared: run the same command again$"):
        read()
    (tmp_path / "a.png").unlink()
    with pytest.raises(UserError, match=r"a.png: cannot be read \(No such file or directory\)$"):
        read()


@pytest.mark.user_input("Prepared data", "a json that changes while it is read", "refused: run the same command again")
def test_a_json_that_changes_while_it_is_read_is_refused(tmp_path, monkeypatch):
    root, read = small_folder(tmp_path / "set", count=3), coco.read

    def slow(path):
        truth = read(path)
        path.write_text(path.read_text() + " ")
        return truth

    monkeypatch.setattr(coco, "read", slow)
    words = r"instances_train.json: has changed while the data is prepared: run the same command again$"
    with pytest.raises(UserError, match=words):
        opened(root, tmp_path)
    monkeypatch.undo()
    assert opened(root, tmp_path).splits["train"].size == 3


@pytest.mark.user_input("Folders and names", "a file_name of 300 letters, with NUL", "refused: no such file in FOLDER")
@pytest.mark.user_input(
    "Folders and names", "a file_name of a folder, of a link to itself", "refused: it is a folder; a link to no file"
)
@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("gone.png", ""),
        ("a" * 300, ""),
        ("a\0b", ""),
        ("\ud83d.png", ""),
        ("folder", ": it is a folder"),
        ("loop", ": it is a link to no file"),
    ],
)
def test_an_image_that_is_no_file_is_missing(tmp_path, name, hint):
    (tmp_path / "folder").mkdir()
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "a.png").touch()
    with pytest.raises(UserError) as refused:
        paths.located(["a.png", name, name + "2"], tmp_path, "x.json")
    assert str(refused.value) == f"x.json: {name} and 1 more: no such file in {tmp_path}{hint}"
