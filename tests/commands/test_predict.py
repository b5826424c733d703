"""`kdjax predict`."""

import os
import re
import types
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from kdjax import cli
from kdjax.commands import predict
from kdjax.data import records
from kdjax.errors import UserError
from kdjax.evals import coco
from kdjax.structs import Detections
from tests.support.models import CLASSES, read, refused
from tests.support.pages import Page


def test_predict_finds_what_evaluate_measures(made, tmp_path, capsys):
    folder = made / "data"
    assert cli.main(["predict", str(folder / "images"), f"--model={made / 'model'}", f"--out={tmp_path / 'p'}"]) == 0
    command = ["evaluate", f"--model={made / 'model'}", f"--data={folder}", f"--out={tmp_path / 'e'}"]
    assert cli.main([*command, f"--against={made / 'other'}"]) == 0
    told = capsys.readouterr().out
    images = {entry["id"]: Path(entry["file_name"]).name for entry in read(tmp_path / "p" / "images.json")["images"]}
    truth = read(folder / "annotations" / "instances_val.json")
    names = {entry["file_name"]: entry["id"] for entry in truth["images"]}

    def rows(path, image_id, factor):
        return np.array(
            [[image_id(r["image_id"]), factor * r["category_id"], *r["bbox"], r["score"]] for r in read(path)]
        )

    mine = rows(tmp_path / "p" / "detections.json", lambda i: names[images[i]], 5)
    theirs = rows(tmp_path / "e" / "detections.json", lambda i: i, 1)
    assert len(mine) > 100 and len(set(theirs[:, -1])) > 100
    np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-4)
    for name in names:
        assert cv2.imread(str(tmp_path / "p" / "drawn" / "val" / name.replace(".png", ".jpg"))).shape == (128, 128, 3)

    written = read(tmp_path / "e" / "evaluation.json")
    detections = read(tmp_path / "e" / "detections.json")
    assert written["model"]["metrics"] == coco.coco_metrics(truth, detections) != written["other"]["metrics"]
    assert written["model"]["params"] == 550_882
    for entry in written["model"]["classes"].values():
        if entry["objects"]:
            assert np.mean(entry["precision"]) == pytest.approx(entry["AP50"])
    objects = [entry["objects"] for entry in written["model"]["classes"].values()]
    assert [sum(row) for row in written["model"]["confusion"]][:-1] == objects and sum(objects) == len(
        truth["annotations"]
    )
    for word in ("AP75", "difference", "threshold", "background", "checked"):
        assert word in told
    page = Page((tmp_path / "e" / "report.html").read_text())
    assert len(page.all("img")) == 6 * 3 and len(page.all("svg")) == sum(n > 0 for n in objects)
    for figure in coco.METRICS:
        assert any(row and row[0].startswith(figure) for row in page.rows)
    again = rows(tmp_path / "e" / "detections_against.json", lambda i: i, 1)
    assert again.shape != theirs.shape or (again != theirs).any()
    assert not re.search(r"""(src|href)=["']?https?:""", (tmp_path / "e" / "report.html").read_text())


@pytest.mark.user_input(
    "Images and videos",
    "broken images and videos among sound ones, for `predict`",
    "reported with name and reason, and skipped; exit code 2",
)
@pytest.mark.user_input(
    "Images and videos",
    "an EXIF orientation that is not applied, 16 bits hardly used",
    "reported once, with the number of the others",
)
@pytest.mark.user_input("Images and videos", "a.jpg and a.png in one folder", "read: drawn as a.jpg and a_.jpg")
@pytest.mark.user_input(
    "Folders and names", "an `--out` inside of the folder of images", "read without what an earlier call has drawn"
)
def test_predict_reports_unreadable_files_and_continues(made, tmp_path, capsys):
    good = records.decode((made / "data" / "images" / "val" / "val_00000.png").read_bytes())
    folder = tmp_path / "mixed"
    folder.mkdir()
    Image.fromarray(good).save(folder / "a.jpg")
    Image.fromarray(good).save(folder / "a.png")
    cv2.imwrite(str(folder / "deep.png"), good[:, :, ::-1].astype(np.uint16) * 257)
    cv2.imwrite(str(folder / "deep.tif"), good[:, :, ::-1].astype(np.uint16) * 16)  # 12 bits, as of a microscope
    Image.fromarray(good).convert("L").save(folder / "grey.png")
    Image.fromarray(good).convert("CMYK").save(folder / "cmyk.jpg")
    turned = Image.Exif()
    turned[274] = 6
    Image.fromarray(good).save(folder / "turned.jpg", exif=turned)
    Image.fromarray(good).save(folder / "turned_2.jpg", exif=turned)
    (folder / "empty.png").write_bytes(b"")
    (folder / "text.jpg").write_text("no image\n" * 20)
    (folder / "cut.jpg").write_bytes((folder / "a.jpg").read_bytes()[:1500])
    (folder / "notes.txt").write_text("ignored")
    video = cv2.VideoWriter(str(folder / "clip.avi"), cv2.VideoWriter_fourcc(*"MJPG"), 5, (64, 48))
    for _ in range(3):
        video.write(good[:48, :64])
    video.release()
    (folder / "broken.mp4").write_bytes(b"no video")
    (folder / "moving.gif").write_bytes(b"GIF89a")
    (tmp_path / "x.gif").write_bytes(b"GIF89a")
    paths = [str(folder), str(tmp_path / "x.gif")]
    assert cli.main(["predict", *paths, f"--model={made / 'model'}", f"--out={folder / 'out'}"]) == 2
    told = [
        line for line in capsys.readouterr().err.replace("\r", "\n").splitlines() if line.strip().startswith("kdjax:")
    ]
    assert len(told) == 9
    for file, why in (
        ("moving.gif", "cannot be read as an image"),
        ("x.gif", "cannot be read as an image"),
        ("empty.png", "it is empty"),
        ("text.jpg", "cannot be read as an image"),
        ("cut.jpg", "truncated"),
        ("broken.mp4", "OpenCV cannot read it as a video"),
        ("turned.jpg", "EXIF orientation is not applied"),
        ("1 more images", "EXIF orientation is not applied"),
        ("deep.tif", "less than an eighth"),
    ):
        assert any(file in line and why in line for line in told), (file, told)
    images = read(folder / "out" / "images.json")
    assert [Path(entry["file_name"]).name for entry in images["images"]] == [
        "a.jpg", "a.png", "clip.avi#0", "clip.avi#1", "clip.avi#2", "cmyk.jpg", "deep.png", "deep.tif", "grey.png",
        "turned.jpg", "turned_2.jpg",
    ]  # fmt: skip
    assert [entry["name"] for entry in images["categories"]] == CLASSES
    found = {}
    for row in read(folder / "out" / "detections.json"):
        found.setdefault(row["image_id"], []).append(row["score"])
    assert found[2][:5] == pytest.approx(found[7][:5], rel=1e-3)  # 16 bits hold the same image as 8
    drawn = folder / "out" / "drawn"
    assert sorted(path.name for path in drawn.iterdir()) == [
        "a.jpg", "a_.jpg", "clip.mp4", "cmyk.jpg", "deep.jpg", "deep_.jpg", "grey.jpg", "turned.jpg",
        "turned_2.jpg",
    ]  # fmt: skip
    assert int(cv2.VideoCapture(str(drawn / "clip.mp4")).get(cv2.CAP_PROP_FRAME_COUNT)) == 3
    # A second time, what the first wrote is not read.
    assert len(predict.find([str(folder)], folder / "out")) == 14


@pytest.mark.user_input(
    "Folders and names",
    "for `predict`: names with a line break, not in UTF-8, of 254 bytes",
    "read; the name of the drawing is cut where it gets too long",
)
@pytest.mark.user_input("Images and videos", "for `predict`: .gif, .jfif, no suffix", "read, as in training")
@pytest.mark.user_input("Images and videos", "for `predict`: 1 bit, grey with alpha, 1 x 1 px, 3 x 500 px", "read")
def test_predict_reads_and_draws_under_any_name(made, tmp_path, capsys):
    good = records.decode((made / "data" / "images" / "val" / "val_00000.png").read_bytes())
    folder = tmp_path / "in"
    folder.mkdir()
    images = {
        "a\nb.png": Image.fromarray(good),
        "a" * 250 + ".png": Image.fromarray(good),
        "\u00e9" * 126 + "a.": Image.fromarray(good),  # 254 bytes, without a suffix
        "\u00e9" * 126 + ".0": Image.fromarray(good),
        os.fsdecode(b"gr\xf6\xdfe.png"): Image.fromarray(good),
        "bit.png": Image.fromarray(good).convert("1"),
        "la.png": Image.fromarray(good).convert("LA"),
        "moving.gif": Image.fromarray(good),
        "one.png": Image.new("RGB", (1, 1)),
        "photo.jfif": Image.fromarray(good),
        "plain": Image.fromarray(good),
        "wide.png": Image.new("RGB", (500, 3)),
    }
    for name, image in images.items():
        image.save(folder / name, "JPEG" if name == "photo.jfif" else "PNG")
    images["moving.gif"].save(folder / "moving.gif", "GIF", save_all=True, append_images=[images["one.png"]])
    write_video(folder / "clip.avi", 5, (64, 48))  # batches of the size that the other tests have compiled
    assert cli.main(["predict", str(folder), f"--model={made / 'model'}", f"--out={tmp_path / 'out'}"]) == 0
    told = [line for line in capsys.readouterr().err.replace("\r", "\n").splitlines() if line.startswith("kdjax:")]
    assert told == [f"kdjax: {folder / 'moving.gif'}: it has several frames or pages: the first is read"]
    listed = {Path(entry["file_name"]).name: entry for entry in read(tmp_path / "out" / "images.json")["images"]}
    assert {*listed} == {*images, "clip.avi#0", "clip.avi#1", "clip.avi#2"}
    found = {row["image_id"] for row in read(tmp_path / "out" / "detections.json")}
    drawn = dict(map(reversed, predict.find([str(folder)], tmp_path / "out")))
    assert len(drawn) == 13 and {path.name for path in (tmp_path / "out" / "drawn").iterdir()} == {*drawn}
    names = {path.name: name for name, path in drawn.items()}
    assert names["a" * 250 + ".png"] == "a" * 250 + ".jpg" and names["plain"] == "plain.jpg"
    assert names["\u00e9" * 126 + ".0"] == "\u00e9" * 125 + ".jpg"
    assert names["\u00e9" * 126 + "a."] == "\u00e9" * 125 + "_.jpg"
    for name, image in images.items():
        pixels = np.fromfile(tmp_path / "out" / "drawn" / names[name], np.uint8)
        assert cv2.imdecode(pixels, cv2.IMREAD_COLOR).shape[1::-1] == image.size == (
            listed[name]["width"], listed[name]["height"],
        )  # fmt: skip
        assert min(image.size) < 4 or listed[name]["id"] in found


def write_video(path: Path, rate: float, size: tuple[int, int], frames: int = 3) -> None:
    video = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), rate, size)
    assert video.isOpened()
    for i in range(frames):
        video.write(np.full((size[1], size[0], 3), 60 * i, np.uint8))
    video.release()


NOTHING = Detections(np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int32))


@pytest.mark.user_input(
    "Images and videos", "videos of 0.5 or 23.976 frames per second, of 2 x 2 px", "read, and drawn so"
)
@pytest.mark.user_input(
    "Images and videos", "a video of 90,000 frames per second", "reported: drawn with 25, because mp4 has no such rate"
)
@pytest.mark.user_input("Images and videos", "a video of 97 x 65 px", "read; drawn without the last row and column")
@pytest.mark.user_input("Images and videos", "a video of 1 x 1 px", "reported: its drawing is not written")
@pytest.mark.user_input("Images and videos", "an empty .mp4", "reported: OpenCV cannot read it as a video: it is empty")
def test_rates_and_sizes_of_videos(tmp_path, capsys):
    drawings, source = predict.Drawings(), tmp_path / "in.mov"
    cases = [(0.5, (96, 64)), (24000 / 1001, (96, 64)), (90000, (96, 64)), (25, (2, 2)), (25, (97, 65)), (25, (1, 1))]
    for number, (rate, size) in enumerate(cases):
        write_video(source, rate, size if size != (1, 1) else (2, 2))
        assert len([*predict.frames(source, "stored", pytest.fail)]) == 3
        for _ in range(3):
            image = np.zeros((size[1], size[0], 3), np.uint8)
            drawings.write(source, tmp_path / f"{number}.mp4", image, NOTHING, 0.5)
    drawings.close()
    assert capsys.readouterr().err.splitlines() == [
        f"kdjax: {source}: drawn with 25 frames per second: mp4 has no rate of 90000",
        f"kdjax: {source}: its drawing is not written: OpenCV cannot write a video of 1 x 1 px with 25 frames per "
        "second as mp4, or the disk is full",
    ]
    expected = [(0.5, 96, 64), (23.976, 96, 64), (25, 96, 64), (25, 2, 2), (25, 96, 64)]
    for number, row in enumerate(expected):
        video = cv2.VideoCapture(str(tmp_path / f"{number}.mp4"))
        figures = (cv2.CAP_PROP_FPS, cv2.CAP_PROP_FRAME_WIDTH, cv2.CAP_PROP_FRAME_HEIGHT, cv2.CAP_PROP_FRAME_COUNT)
        assert [video.get(figure) for figure in figures] == pytest.approx([*row, 3], abs=1e-3)
    (tmp_path / "empty.mp4").touch()
    with pytest.raises(UserError) as refused_:
        next(predict.frames(tmp_path / "empty.mp4", "stored", pytest.fail))
    assert str(refused_.value) == f"{tmp_path / 'empty.mp4'}: OpenCV cannot read it as a video: it is empty"


@pytest.mark.user_input("Images and videos", "a video cut short", "reported: only N of its 20 frames can be read")
@pytest.mark.parametrize("share", [0.3, 0.7])
def test_a_video_that_is_cut_short_is_reported(tmp_path, share):
    video = cv2.VideoWriter(str(tmp_path / "clip.avi"), cv2.VideoWriter_fourcc(*"MJPG"), 5, (64, 48))
    rng = np.random.default_rng(0)
    for _ in range(20):
        video.write(rng.integers(0, 255, (48, 64, 3), np.uint8))
    video.release()
    whole = (tmp_path / "clip.avi").read_bytes()
    assert len(list(predict.frames(tmp_path / "clip.avi", "stored", pytest.fail))) == 20
    (tmp_path / "clip.avi").write_bytes(whole[: int(share * len(whole))])
    told = []
    with pytest.raises(ValueError, match=r"clip.avi: the video is broken: only \d+ of its 20 frames can be read"):
        list(predict.frames(tmp_path / "clip.avi", "stored", told.append))
    assert told == [f"{tmp_path / 'clip.avi'}: its decoder says: [mjpeg @ N] overread N"]


def clip(path: Path, frames: int = 6) -> bytes:
    """A video of frames that are ever lighter."""
    plain = path.with_name(f"plain{path.suffix}")
    video = cv2.VideoWriter(str(plain), cv2.VideoWriter.fourcc(*"mp4v"), 5, (64, 48))
    for i in range(frames):
        video.write(np.full((48, 64, 3), 240 * i // frames, np.uint8))
    video.release()
    plain.rename(path)
    return path.read_bytes()


@pytest.mark.user_input("Images and videos", "a video whose name is not UTF-8", "refused: rename it")
def test_a_video_whose_name_is_no_text_is_refused(tmp_path, capfd):
    """OpenCV crashes of such a str: signal 11."""
    path = tmp_path / os.fsdecode(b"a\xff.mp4")
    clip(tmp_path / "a.mp4")
    path.write_bytes((tmp_path / "a.mp4").read_bytes())
    why = f"{path}: its name is not UTF-8, which OpenCV needs of a video: rename it"
    with pytest.raises(UserError) as refused:
        next(predict.frames(path, "stored", pytest.fail))
    assert str(refused.value) == why
    drawings = predict.Drawings()
    found = Detections(np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int32))
    drawings.write(tmp_path / "a.mp4", path, np.zeros((48, 64, 3), np.uint8), found, 0.5)
    drawings.close()
    assert drawings.failed == {path}
    told = capfd.readouterr().err
    assert told.startswith(f"kdjax: {tmp_path / 'a.mp4'}: its drawing is not written: {tmp_path}")
    assert told.endswith(f"{why.rpartition('mp4')[2]}\n")


@pytest.mark.user_input(
    "Images and videos", "a video with damaged frames, which decode", "reported with its name and what the decoder says"
)
@pytest.mark.parametrize(
    ("at", "frames", "notes"),
    [
        (
            32,
            30,
            ("its decoder says: [mpegN @ N] ac-tex damaged at N N", "its decoder says: [mpegN @ N] Error at MB: N"),
        ),
        (64, 29, ("its header announces 30 frames, 29 can be read",)),
    ],
)
def test_a_damaged_frame_of_a_video_is_noted_with_its_name(tmp_path, capfd, at, frames, notes):
    """FFmpeg guesses it and prints lines without a name, or leaves it out."""
    path = tmp_path / "a.mp4"
    content = bytearray(clip(path, 30))
    content[content.index(b"mdat") + at] ^= 0xFF
    path.write_bytes(content)
    told = []
    assert len(list(predict.frames(path, "stored", told.append))) == frames
    assert told == [f"{path}: {note}" for note in notes]
    assert capfd.readouterr().err == ""


@pytest.mark.user_input("Images and videos", "images named a1.avi, a2.avi", "read, each on its own")
def test_numbers_in_names_do_not_make_images_a_video(tmp_path):
    """a1.avi, a2.avi, …: one of OpenCV's readers takes them as a row of images."""
    for i in (1, 2, 3):
        Image.fromarray(np.full((40, 60, 3), 50 * i, np.uint8)).save(tmp_path / f"a{i}.avi", "JPEG2000")
    for i in (1, 2, 3):
        frames = list(predict.frames(tmp_path / f"a{i}.avi", "stored", pytest.fail))
        assert [round(frame.mean()) for frame in frames] == [50 * i]


@pytest.mark.user_input(
    "Images and videos",
    "linked folders, dead links and pipes in a folder",
    "read behind links, each once; what is no file is reported",
)
def test_what_a_folder_holds_is_read_or_named(tmp_path):
    """Pipes, links that lead nowhere or in a circle, and folders behind links."""
    inside, elsewhere = tmp_path / "in", tmp_path / "elsewhere"
    inside.mkdir()
    elsewhere.mkdir()
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(elsewhere / "x.png")
    os.mkfifo(inside / "pipe.png")
    (inside / "dead.jpg").symlink_to("nowhere.jpg")
    (inside / "circle.jpg").symlink_to(inside / "circle.jpg")
    (inside / "linked").symlink_to(elsewhere)
    (elsewhere / "back").symlink_to(inside)
    found = [path for path, _ in predict.find([str(inside)], tmp_path / "out")]
    assert found == [inside / name for name in ("circle.jpg", "dead.jpg", "linked/x.png", "pipe.png")]
    for path, why in (
        ("circle.jpg", " (Too many levels of symbolic links)"),
        ("dead.jpg", " (No such file or directory)"),
        ("pipe.png", ": it is a folder, a pipe or a device, where a file must be"),
    ):
        with pytest.raises(UserError) as refused:
            next(predict.frames(inside / path, "stored", pytest.fail))
        assert str(refused.value) == f"{inside / path}: cannot be read{why}"


@pytest.mark.user_input(
    "Images and videos", "what `kdjax predict` and `kdjax label` drew, in a folder of images", "counted: left out"
)
def test_what_kdjax_drew_is_not_read_again(tmp_path, capsys):
    """Its own folders, also within each other, and previews beside labels; not a user's folder called drawn."""
    image = Image.fromarray(np.zeros((4, 4, 3), np.uint8))
    drawn = ("one/drawn/a.jpg", "two/drawn/one/drawn/a.jpg", "two/drawn/a.jpg", "labels.png")
    for name in ("a.jpg", "drawn/b.jpg", "other.png", *drawn):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        image.save(tmp_path / name)
    for name in ("one/detections.json", "one/images.json", "two/detections.json", "two/images.json"):
        (tmp_path / name).write_text("[]")
    (tmp_path / "labels.json").write_text('{"info": {"description": "detections of a model"}}')
    (tmp_path / "other.json").write_text('{"info": {"description": "mine"}}')
    found = [name for _, name in predict.find([str(tmp_path)], tmp_path / "out")]
    assert found == ["a.jpg", "drawn/b.jpg", "other.jpg"]
    assert "4 files that kdjax drew are left out, as " in capsys.readouterr().err
    with pytest.raises(UserError, match=r"it holds no images or videos .* outside of --out that kdjax did not draw"):
        predict.find([str(tmp_path / "one")], tmp_path / "out")
    assert predict.find([str(tmp_path / "one" / "drawn" / "a.jpg")], tmp_path / "out")  # by name it is read


@pytest.mark.user_input(
    "Folders and names", "an image of `kdjax predict` that lies where its drawing would be written", "refused"
)
def test_no_image_that_is_read_is_drawn_over(tmp_path):
    file = tmp_path / "drawn" / "me.jpg"
    file.parent.mkdir()
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(file)
    with pytest.raises(UserError, match=r"me.jpg: it lies where the drawn images are written: choose another --out"):
        predict.find([str(file)], tmp_path)
    assert predict.find([str(file)], tmp_path / "out") == [(file, "me.jpg")]


@pytest.mark.parametrize("rate", [0, 3e-9, 1e6, float("nan")])
def test_a_video_with_an_impossible_rate_is_drawn(tmp_path, monkeypatch, rate):
    clip(tmp_path / "a.mp4")
    video = types.SimpleNamespace(get=lambda _: rate)
    monkeypatch.setattr(predict, "_video", lambda path: (video, ()))
    drawings = predict.Drawings()
    found = Detections(np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int32))
    drawings.write(tmp_path / "a.mp4", tmp_path / "b.mp4", np.zeros((48, 64, 3), np.uint8), found, 0.5)
    assert not drawings.failed


@pytest.mark.user_input(
    "Images and videos", "a video too large for mp4", "reported: its drawing is not written; its detections are"
)
def test_a_video_too_large_for_mp4_is_named(tmp_path, capfd):
    clip(tmp_path / "a.mp4")
    drawings = predict.Drawings()
    found = Detections(np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int32))
    drawings.write(tmp_path / "a.mp4", tmp_path / "b.mp4", np.zeros((48, 16_400, 3), np.uint8), found, 0.5)
    assert drawings.failed
    what = (
        "its drawing is not written: OpenCV cannot write a video of 16,400 x 48 px with 5 frames per second as mp4, or"
    )
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith(f"kdjax: {tmp_path / 'a.mp4'}: {what}"), lines


@pytest.mark.user_input(
    "Images and videos",
    "an image over JPEG's 65,500 px a side",
    "reported: its drawing is not written; its detections are",
)
def test_what_cannot_be_drawn_does_not_lose_the_detections(made, tmp_path, capsys, monkeypatch):
    """JPEG ends at 65,500 px a side; a disk may be full; drawing may have a bug."""
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    for name, size in (("a.png", (40, 400)), ("full.png", (40, 40)), ("tall.png", (65_501, 4))):
        Image.fromarray(np.zeros(size, np.uint8)).save(folder / name)
    (out / "drawn" / "full.jpg").mkdir(parents=True)
    command = ["predict", str(folder), f"--model={made / 'model'}", f"--out={out}"]
    assert cli.main(command) == 2
    told = [line for line in capsys.readouterr().err.replace("\r", "\n").splitlines() if line.startswith("kdjax:")]
    assert told == [
        f"kdjax: {folder / 'full.png'}: its drawing is not written: {out / 'drawn' / 'full.jpg'}: Is a directory",
        f"kdjax: {folder / 'tall.png'}: its drawing is not written: JPEG ends at 65,500 px a side, the image has 4 x "
        "65,501",
    ]
    assert [path.name for path in (out / "drawn").iterdir() if path.is_file()] == ["a.jpg"]
    whole, images = read(out / "detections.json"), read(out / "images.json")["images"]
    assert {row["image_id"] for row in whole} <= {1, 2, 3} and len(images) == 3

    def bug(*_, **__):
        raise KeyError("a bug")

    (out / "detections.json").unlink()
    monkeypatch.setattr(predict.drawing, "draw", bug)
    with pytest.raises(KeyError):
        cli.main(command)
    assert read(out / "detections.json") == [row for row in whole if row["image_id"] == 1]
    assert len(read(out / "images.json")["images"]) == 1


@pytest.mark.user_input(
    "The machine", "a full disk while a video is drawn", "reported: only 3 of its 5 frames could be written"
)
def test_a_video_that_could_not_be_written_is_reported(tmp_path, capsys):
    """OpenCV does not tell."""
    drawings, target = predict.Drawings(), tmp_path / "out.mp4"
    found = Detections(np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int32))
    for _ in range(3):
        drawings.write(tmp_path / "clip.mp4", target, np.zeros((48, 64, 3), np.uint8), found, 0.5)
    drawings.close()
    assert not drawings.failed
    drawings.frames[target] = 5
    drawings.close()
    assert drawings.failed == {target}
    told = f"kdjax: {target}: only 3 of its 5 frames could be written: is the disk full?"
    assert told in capsys.readouterr().err.splitlines()


@pytest.mark.user_input(
    "Workdirs, checkpoints and logs", "a folder in the place of `detections.json`", "refused: move it away"
)
def test_a_folder_in_the_place_of_an_output_is_refused(made, tmp_path, capsys):
    (tmp_path / "detections.json").mkdir()
    told = refused(capsys, "predict", str(made / "data"), f"--model={made / 'model'}", f"--out={tmp_path}")
    what = "is a folder, where a file is to be written: move it away"
    assert told == f"kdjax: --out: {tmp_path / 'detections.json'} {what}"
