"""The images of folders in COCO layout: kinds, shapes, orientation, damage, and what is counted of them."""

import pickle

import cv2
import numpy as np
import pytest
from PIL import Image

from kdjax import data
from kdjax.errors import UserError
from tests.support.data import coco_json, one_split, opened, paint, settings, write_folder


@pytest.mark.user_input(
    "Images and videos", "CMYK, grey, 16 bits, transparency, palette", "read as RGB of 8 bits; transparency is left out"
)
def test_every_kind_of_image_becomes_rgb(tmp_path):
    folder = tmp_path / "set" / "images"
    folder.mkdir(parents=True)
    colour = np.zeros((40, 50, 3), np.uint8)
    colour[:, :25] = (200, 40, 30)
    Image.fromarray(colour).convert("CMYK").save(folder / "cmyk.jpg", quality=95)
    turned = Image.Exif()
    turned[274] = 6  # 'rotate by 90 degrees'
    Image.fromarray(colour).save(folder / "exif.jpg", exif=turned, quality=95)
    Image.fromarray(colour).convert("L").save(folder / "grey.png")
    Image.fromarray(np.full((40, 50), 40000, np.uint16)).save(folder / "deep.png")
    Image.fromarray(np.dstack([colour, np.full((40, 50), 90, np.uint8)])).save(folder / "alpha.png")
    Image.fromarray(colour).quantize(4).save(folder / "palette.png")
    names = ("cmyk.jpg", "exif.jpg", "grey.png", "deep.png", "alpha.png", "palette.png")
    root = one_split(tmp_path / "set", coco_json(dict.fromkeys(names, (40, 50)), []), {}, images="images")
    dataset = opened(root, tmp_path)
    for index, name in enumerate(names):
        image = dataset.splits["train"].records[index]["image"]
        assert image.shape == (40, 50, 3) and image.dtype == np.uint8, name
        expected = {"grey.png": (87, 87, 87), "deep.png": (156, 156, 156)}.get(name, (200, 40, 30))
        np.testing.assert_allclose(image[20, 5], expected, atol=12, err_msg=name)


@pytest.mark.user_input(
    "Images and videos",
    "images stored turned (EXIF), boxes of the upright image",
    "read upright with `exif_orientation=upright`, and counted as noted",
)
@pytest.mark.user_input(
    "Images and videos",
    "images stored turned (EXIF), boxes of the stored pixels",
    "read as they are stored, and counted as noted",
)
@pytest.mark.user_input(
    "Images and videos", "sizes in the json that the EXIF setting does not give", "refused: names the setting that fits"
)
def test_exif_orientation_is_told_or_applied(tmp_path):
    """Images stored turned: of 8 the sides are exchanged, of 3 they are not."""
    boxes = [(6, 8, 16, 28)]
    upright = paint(50, 40, boxes)
    names = ("three.png", "eight.png")
    truth = coco_json(dict.fromkeys(names, (50, 40)), [(i, 3, [6, 8, 10, 20], {}) for i in range(2)])
    root = one_split(tmp_path / "set", truth, {}, images="images")
    (root / "images").mkdir(exist_ok=True)
    for name, orientation, turns in zip(names, (3, 8), (2, -1), strict=True):
        exif = Image.Exif()
        exif[274] = orientation
        Image.fromarray(np.rot90(upright, turns).copy()).save(root / "images" / name, exif=exif)
    with pytest.raises(UserError) as refused:
        opened(root, tmp_path)
    words = "eight.png is listed as 40x50, but is 50x40: --exif=upright fits (in a run, "
    words += "config.data.exif_orientation=upright)"
    assert str(refused.value) == f"instances_train.json: {words}"

    turned = opened(root, tmp_path, exif_orientation="upright")
    for role, split in turned.splits.items():
        for index in range(2):
            example = split.records[index]
            np.testing.assert_array_equal(example["image"], upright)
            np.testing.assert_allclose(example["boxes"], boxes, rtol=1e-6)
            np.testing.assert_array_equal(pickle.loads(pickle.dumps(split.records)).image(index), upright)
        text = data.summary(turned, settings(tmp_path))
        assert f"{role}: 2 noted: turned upright by its EXIF orientation: boxes refer to the turned image" in text

    truth["images"][1].update(width=50, height=40)
    write_folder(root, {"train": truth, "val": truth}, {}, images="images")
    with pytest.raises(UserError) as refused:
        opened(root, tmp_path, exif_orientation="upright")
    words = "listed as 50x40, but is 40x50 as its EXIF orientation turns it: --exif=stored fits (in a run, "
    words += "config.data.exif_orientation=stored)"
    assert str(refused.value) == f"instances_train.json: eight.png is {words}"
    stored = opened(root, tmp_path)
    np.testing.assert_array_equal(stored.splits["train"].records.image(0), upright[::-1, ::-1])
    words = "train: 2 noted: EXIF orientation is not applied: boxes refer to the stored pixels"
    assert words in data.summary(stored, settings(tmp_path))
    with pytest.raises(UserError, match=r"^exif_orientation must be one of stored, upright, not 'up'$"):
        opened(root, tmp_path, exif_orientation="up")


@pytest.mark.user_input(
    "Prepared data", "the same files under the other EXIF setting", "read as other data, prepared separately"
)
def test_other_pixels_of_the_same_files_are_another_data_set(tmp_path):
    exif = Image.Exif()
    exif[274] = 3
    root = one_split(tmp_path / "set", coco_json({"a.png": (40, 50)}, []), {}, images="images")
    (root / "images").mkdir(exist_ok=True)
    Image.fromarray(paint(40, 50, [])).save(root / "images" / "a.png", exif=exif)
    stored, turned = (opened(root, tmp_path, exif_orientation=value) for value in ("stored", "upright"))
    assert stored.splits["train"].folder != turned.splits["train"].folder
    assert stored.fingerprint != turned.fingerprint


@pytest.mark.user_input(
    "Images and videos",
    "a JPEG with zeros in its middle, which decodes",
    "counted as noted, with its name and what the decoder says",
)
def test_damage_that_a_decoder_only_prints_is_listed_with_its_file(tmp_path, capfd):
    noise = np.random.default_rng(0).integers(0, 255, (40, 50, 3), np.uint8)
    root = one_split(tmp_path / "set", coco_json({"a.jpg": (40, 50), "b.jpg": (40, 50)}, []), {}, images="images")
    (root / "images").mkdir(exist_ok=True)
    good = cv2.imencode(".jpg", noise)[1].tobytes()
    half = len(good) // 2
    (root / "images" / "a.jpg").write_bytes(good)
    (root / "images" / "b.jpg").write_bytes(good[:half] + bytes(40) + good[half + 40 :])
    split = opened(root, tmp_path).splits["train"]
    reason = "its decoder says: Corrupt JPEG data: N extraneous bytes before marker N"
    assert split.log == [{"file": "b.jpg", "annotation": None, "action": "noted", "reason": reason}]
    assert "Corrupt" not in capfd.readouterr().err


@pytest.mark.user_input("Images and videos", "a palette with transparency", "read as RGB; transparency is left out")
@pytest.mark.user_input(
    "Images and videos", "an animated GIF, WebP or PNG, a TIFF of several pages", "counted as noted: the first is read"
)
def test_of_several_frames_the_first_is_read_and_counted(tmp_path):
    first = paint(40, 50, [(0, 0, 25, 40)])
    frames = [Image.fromarray(image) for image in (first, first[:, ::-1])]
    names = ("a.gif", "b.webp", "c.tif", "d.png", "one.gif", "palette.png")
    root = one_split(tmp_path / "set", coco_json(dict.fromkeys(names, (40, 50)), []), {}, images="images")
    for name in names[:4]:
        options = {"lossless": True} if name == "b.webp" else {}
        frames[0].save(root / "images" / name, save_all=True, append_images=frames[1:], **options)
    frames[0].save(root / "images" / names[4])
    frames[0].quantize(4).save(root / "images" / names[5], transparency=0)
    dataset = opened(root, tmp_path)
    told = data.counted(dataset, "train", settings(tmp_path))
    assert "train: 4 noted: it has several frames or pages: the first is read" in told
    assert [entry["file"] for entry in dataset.splits["train"].log] == [*names[:4]]
    for index, name in enumerate(names):
        np.testing.assert_allclose(dataset.splits["train"].records.image(index), first, atol=12, err_msg=name)


@pytest.mark.user_input(
    "Images and videos", "images 1 px wide, or 40,000 x 4", "read; only boxes that get too small are left out"
)
def test_images_of_extreme_shapes_are_trained_on(tmp_path):
    sizes = {"thin.png": (500, 1), "wide.png": (4, 40_000), "a.png": (40, 50)}
    boxes = [(0, 3, [0, 10, 1, 40], {}), (1, 3, [0, 0, 20_000, 4], {}), (2, 3, [5, 5, 20, 20], {})]
    boxes += [(0, 3, [0, 10, 1, 4], {}), (1, 3, [39_999, 0, 20_000, 4], {})]  # too short; too little is inside
    pixels = {name: np.full((*size, 3), 90, np.uint8) for name, size in sizes.items()}
    root = one_split(tmp_path / "set", coco_json(sizes, boxes, [(3, "cat")]), pixels)
    for mosaic in (False, True):
        cfg = settings(tmp_path / "cache", root=root, augment=dict(scale=(1.0, 1.0), mosaic=mosaic))
        dataset = data.open_dataset(cfg)
        assert data.counted(dataset, "train", cfg)[1:] == [
            "train: 2 left out: box too small, less than a pixel on the canvas at every scale",
            "train: 1 repaired: box clipped to the image",
        ]
        batches = data.train_batches(dataset, cfg, batch_size=3, seed=0)
        batch = next(batches)
        batches.close()
        assert (batch["image_size"] >= 1).all()
        assert batch["valid"].any() if mosaic else batch["valid"].sum() == 3


@pytest.mark.user_input(
    "Images and videos", "EXIF orientation 6, sizes missing in the json", "counted as noted and repaired"
)
@pytest.mark.parametrize(
    ("exif_orientation", "counts"),
    [
        ("stored", ["1 noted: EXIF orientation is not applied: boxes refer to the stored pixels"]),
        (
            "upright",
            [
                "1 dropped: box outside the image",
                "1 noted: turned upright by its EXIF orientation: boxes refer to the turned image",
            ],
        ),
    ],
)
def test_sizes_that_the_json_lacks_are_those_that_exif_gives(tmp_path, exif_orientation, counts):
    truth = coco_json({"a.jpg": (0, 0)}, [(0, 3, [2, 2, 9, 9], {}), (0, 3, [45, 5, 9, 9], {})], [(3, "cat")])
    root = one_split(tmp_path / "set", truth, {}, images="images")
    exif = Image.Exif()
    exif[274] = 6
    Image.fromarray(paint(40, 60, [])).save(root / "images" / "a.jpg", exif=exif)
    dataset = opened(root, tmp_path, exif_orientation=exif_orientation)
    assert data.counted(dataset, "train", settings(tmp_path))[1:] == [
        f"train: {line}" for line in [*counts, "1 repaired: width and height taken from the image"]
    ]


@pytest.mark.user_input("COCO json", "2,000 boxes in an image", "read, all of them; identical ones are noted")
@pytest.mark.user_input("COCO json", "400 classes", "read")
def test_many_boxes_and_classes(tmp_path):
    boxes = [(0, 1 + i % 400, [i % 45, i // 50, 3, 3], {}) for i in range(2000)]
    truth = coco_json({"a.png": (44, 50)}, [*boxes, boxes[0]], [(1 + i, f"class {i}") for i in range(400)])
    dataset = opened(one_split(tmp_path / "set", truth, {"a.png": paint(44, 50, [])}), tmp_path)
    cfg = settings(tmp_path)
    assert data.counted(dataset, "train", cfg) == [
        "train ('train'): 1 images, 0 without objects, 2001 boxes, at most 2001 per image",
        "train: 1 noted: class and box are, digit for digit, those of another annotation of the image",
    ]
    assert dataset.max_boxes == 2008 and len(dataset.classes) == 400
    [batch] = data.eval_batches(dataset, "val", cfg, batch_size=1)
    assert batch["image"].shape == (1, 48, 64, 3)
    assert len(data.summary(dataset, cfg).splitlines()) < 450
