"""Spoilt YOLO and VOC folders: what is counted is what was spoilt, or a sentence names the file and the line of it."""

import collections
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import strategies as st

from kdjax import data as kd
from kdjax.data import coco, folders, voc
from kdjax.errors import UserError
from tests.fuzz.media import saved
from tests.fuzz.runs import fuzz
from tests.support.data import opened, settings

HEIGHT, WIDTH = 40, 50
SOUND = 4  # images


class Row(NamedTuple):
    """A line of a file of labels; `refused`: the sentence that follows its file and number."""

    text: bytes
    refused: str = ""


class Draft:
    """A folder before it is written, and what must come of it."""

    def __init__(self, draw, suffix: str) -> None:
        self.draw, self.suffix = draw, suffix
        self.images = {f"{i}.png": saved(np.full((HEIGHT, WIDTH, 3), 20 * i, np.uint8), "PNG") for i in range(SOUND)}
        self.rows: dict[str, list[Row]] = {f"{i}": [] for i in range(SOUND)}
        self.heads: dict[str, list[Row]] = {}  # of VOC's xml
        self.form: Callable[[bytes], bytes] = bytes
        self.more: dict[str, bytes] = {}  # further files
        self.refusals: list[str] = []  # patterns
        self.counts = collections.Counter()  # of objects, crowd, and by action and reason
        self.serial = 0

    def choice(self, *values):
        return self.draw(st.sampled_from(values))

    def place(self) -> tuple[float, float]:
        """The corner x y, in pixels, of the next box of 10 x 12 px: no two are the same."""
        self.serial += 1
        return 2 + self.serial / 2, 3 + self.serial / 4

    def put(self, row: Row, *reasons: tuple[str, str], objects: int = 0, crowd: int = 0) -> None:
        rows = self.rows[self.choice(*map(str, range(SOUND)))]
        rows.insert(self.draw(st.integers(0, len(rows))), row)
        self.counts.update({"objects": objects, "crowd": crowd})
        self.counts.update(reasons)

    def add_image(self, name: str) -> str:
        self.serial += 1
        stem = f"{name}{self.serial}"
        self.images[f"{stem}.png"] = saved(np.full((HEIGHT, WIDTH, 3), self.serial, np.uint8), "PNG")
        return stem


def share(x: float, y: float, w: float = 10, h: float = 12) -> str:
    return f"{(x + w / 2) / WIDTH:.6f} {(y + h / 2) / HEIGHT:.6f} {w / WIDTH:.6f} {h / HEIGHT:.6f}"


def yolo_row(text: str, refused: str = "") -> Row:
    return Row(text.encode(), refused)


def yolo_sound(draft: Draft) -> None:
    draft.put(yolo_row(f"{draft.choice(0, 1)} {share(*draft.place())}"), objects=1)


def yolo_polygon(draft: Draft) -> None:
    x, y = draft.place()
    ring = [x, y, x + 10, y, x + 10, y + 12]
    draft.put(yolo_row("1 " + " ".join(f"{v / (WIDTH, HEIGHT)[i % 2]:.6f}" for i, v in enumerate(ring))), objects=1)


def yolo_flat_polygon(draft: Draft) -> None:
    _, y = draft.place()
    points = [0.1, 0.9, 0.5, 0.3][: draft.choice(3, 4)]
    row = "0 " + " ".join(f"{x} {y / HEIGHT:.6f}" for x in points)
    draft.put(yolo_row(row), ("dropped", "box has no extent"))


def yolo_thin_polygon(draft: Draft) -> None:
    x, _ = draft.place()
    ring = [x, 1, x + 12, 13, x + 6, 7]  # on a line
    row = "0 " + " ".join(f"{v / (WIDTH, HEIGHT)[i % 2]:.6f}" for i, v in enumerate(ring))
    draft.put(yolo_row(row), (coco.UNMASKED, "mask is empty"), objects=1)


def yolo_outside(draft: Draft) -> None:
    x, y = draft.place()
    row = draft.choice(f"0 {share(x + WIDTH, y)}", f"1 {share(x, y - 2 * HEIGHT)}", f"1 1e9 {y} 1 1")
    draft.put(yolo_row(row), ("dropped", "box outside the image"))


def yolo_beyond(draft: Draft) -> None:
    _, y = draft.place()
    draft.put(yolo_row(f"0 {share(WIDTH - 5, y)}"), ("repaired", coco.CLIPPED), objects=1)


def yolo_flat(draft: Draft) -> None:
    draft.put(
        yolo_row(draft.choice("0 .5 .5 0 .1", "1 .5 .5 -.1 .1", "1 .5 .5 .1 0.0")), ("dropped", "box has no extent")
    )


def yolo_not_finite(draft: Draft) -> None:
    row = draft.choice("0 nan .5 .1 .1", "0 .5 inf .1 .1", "1 .5 .5 1e300 .1", "1 .1 .1 .9 nan .5 .5")
    draft.put(yolo_row(row), ("dropped", "bbox is not four finite numbers"))


def yolo_twice(draft: Draft) -> None:
    rows = draft.rows["0"]
    row = yolo_row(f"0 {share(*draft.place())}")
    rows += [row, row]
    draft.counts.update({"objects": 2, ("noted", coco.REPEATED): 1})


def yolo_form(draft: Draft) -> None:
    forms = (
        lambda t: b"\xef\xbb\xbf" + t,
        lambda t: t.replace(b"\n", b"\r\n"),
        lambda t: t + b"\n \n\t\n",
        lambda t: t.rstrip(),
    )
    draft.form = draft.choice(*forms)


def yolo_shared(draft: Draft) -> None:
    stem = draft.add_image("s")
    draft.images[f"{stem}.jpg"] = saved(np.full((HEIGHT, WIDTH, 3), draft.serial, np.uint8), "JPEG")
    draft.rows[stem] = [yolo_row(f"0 {share(*draft.place())}")]
    draft.counts.update({"objects": 2, ("noted", folders.SHARED): 1})


def without(draft: Draft) -> None:
    draft.add_image("w")
    draft.counts["noted", folders.UNLABELLED] += 1


def orphan(draft: Draft) -> None:
    draft.serial += 1
    text = b"0 0.5 0.5 0.1 0.1\n" if draft.suffix == ".txt" else b"<annotation/>"
    draft.more[f"labels/train/o{draft.serial}{draft.suffix}"] = text
    draft.counts["noted", folders.ORPHAN] += 1


def refused_row(*rows: tuple[str | bytes, str]) -> Callable[[Draft], None]:
    def spoil(draft: Draft) -> None:
        text, sentence = draft.choice(*rows)
        draft.put(Row(text if isinstance(text, bytes) else text.encode(), sentence))

    return spoil


def yolo_yaml(draft: Draft) -> None:
    names = "names: [cat, dog]\n"
    text, pattern = draft.choice(
        ("names: [cat, dog\n", r"data.yaml:[12]: not valid yaml"),
        (f"nc: 5\n{names}", r"data.yaml:1: nc is 5"),
        ("names: [cat, cat]\n", r"data.yaml:1 has the name 'cat' twice"),
        ("names:\n 0: cat\n 5: dog\n", r"data.yaml:3: names has no entry 1"),
        ("names: cat\n", r"data.yaml:1: names must be"),
        (f"{names}train: images/nowhere\n", r"data.yaml:2: images/nowhere is neither"),
        (f"{names}{names}", r"data.yaml:2: names appears twice"),
        ("\0", r"data.yaml: not valid yaml"),
        ("", r"data.yaml: the file is empty"),
        (f"{names}val: images/train\n", r"data.yaml: there is no split 'train'"),
    )
    draft.more["data.yaml"] = text.encode()
    draft.refusals = [pattern]  # read before all else


def damaged(draft: Draft) -> None:
    name = draft.choice(*(f"{i}.png" for i in range(SOUND)))
    draft.images[name] = draft.choice(b"", b"no image", draft.images[name][:60])
    draft.refusals.append(rf"images/train/{name}: cannot be read as an image")


YOLO = {
    "sound": yolo_sound,
    "polygon": yolo_polygon,
    "flat polygon": yolo_flat_polygon,
    "thin polygon": yolo_thin_polygon,
    "outside": yolo_outside,
    "beyond": yolo_beyond,
    "no extent": yolo_flat,
    "not finite": yolo_not_finite,
    "twice": yolo_twice,
    "line ends": yolo_form,
    "shared labels": yolo_shared,
    "no labels": without,
    "no image": orphan,
    "few values": refused_row(("0 .5 .5 .1", "it has 4 values"), ("1", "it has 1 value"), ("0 .5", "it has 2 values")),
    "predictions": refused_row(("0 .5 .5 .1 .1 .9", "it has 6 values, the last a confidence")),
    "odd polygon": refused_row(("0 .1 .1 .5 .1 .5 .5 .9", "it has 8 values: must have 5")),
    "text": refused_row(("cat .5 .5 .1 .1", "'cat' is not a number"), ("0;.5;.5;.1;.1", "'0;.5")),
    "unknown class": refused_row(("2 .5 .5 .1 .1", "class 2 has no name"), ("1e9 .5 .5 .1 .1", "class 1e9 has no")),
    "odd class": refused_row(("-1 .5 .5 .1 .1", "the class is -1"), (".5 .5 .5 .1 .1", "the class is .5")),
    "encoding": refused_row((b"0 .5 .5 .1 .1 \xff", "byte 0xff is not UTF-8")),
    "yaml": yolo_yaml,
    "damaged image": damaged,
}


def voc_row(corners="", *, name: str = "<name>cat</name>", more: str = "") -> str:
    tags = ("xmin", "ymin", "xmax", "ymax")
    box = "".join(f"<{tag}>{value}</{tag}>" for tag, value in zip(tags, corners, strict=False))
    return f"<object>{name}{more}" + f"<bndbox>{box}</bndbox>" * bool(corners) + "</object>"


def corners(x: float, y: float, w: float = 10, h: float = 12) -> tuple[float, ...]:
    return x + 1, y + 1, x + w, y + h


def voc_sound(draft: Draft) -> None:
    more = draft.choice(
        "", "<pose/><truncated>1</truncated>", "<part><name>x</name><bndbox><xmin>z</xmin></bndbox></part>"
    )
    name = draft.choice("<name>cat</name>", "<name> dog\t</name>", "<name>c&#97;t</name>")
    draft.put(Row(voc_row(corners(*draft.place()), name=name, more=more).encode()), objects=1)


def voc_spoilt(action: str, reason: str, *boxes: tuple) -> Callable[[Draft], None]:
    def spoil(draft: Draft) -> None:
        draft.put(Row(voc_row(draft.choice(*boxes)).encode()), (action, reason))

    return spoil


def voc_outside(draft: Draft) -> None:
    x, y = draft.place()
    box = draft.choice(corners(x + WIDTH, y), corners(x, y - 2 * HEIGHT))
    draft.put(Row(voc_row(box).encode()), ("dropped", "box outside the image"))


def voc_beyond(draft: Draft) -> None:
    _, y = draft.place()
    draft.put(Row(voc_row(corners(WIDTH - 5, y)).encode()), ("repaired", coco.CLIPPED), objects=1)


def voc_difficult(draft: Draft) -> None:
    row = voc_row(corners(*draft.place()), more=f"<difficult>{draft.choice('1', 'True')}</difficult>")
    draft.put(Row(row.encode()), crowd=1)


def voc_odd_difficult(draft: Draft) -> None:
    row = voc_row(corners(*draft.place()), more="<difficult>Unspecified</difficult>")
    draft.put(Row(row.encode()), ("repaired", voc.DIFFICULT), objects=1)


def voc_twice(draft: Draft) -> None:
    row = Row(voc_row(corners(*draft.place())).encode())
    draft.rows["0"] += [row, row]
    draft.counts.update({"objects": 2, ("noted", coco.REPEATED): 1})


def head(draft: Draft) -> list[Row]:
    """The head of the xml of an image of its own, with a sound object below it."""
    stem = draft.add_image("h")
    draft.rows[stem] = [Row(voc_row(corners(*draft.place())).encode())]
    draft.counts["objects"] += 1
    draft.heads[stem] = [Row(b"<annotation>")]
    return draft.heads[stem]


def voc_no_size(draft: Draft) -> None:
    head(draft).append(Row(draft.choice(b"", b"<size><width>0</width><height>0</height></size>", b"<size/>")))
    draft.counts["noted", voc.SIZELESS] += 1


def voc_other_size(draft: Draft) -> None:
    sides = draft.choice((HEIGHT, WIDTH), (WIDTH, HEIGHT + 1), (-1, "x"))
    sentence = "height is 'x': must be a number" if "x" in sides else f"the size is {sides[0]}x{sides[1]}, but"
    text = f"<size><width>{sides[0]}</width><height>{sides[1]}</height></size>"
    head(draft).append(Row(text.encode(), sentence))


def voc_other_file(draft: Draft) -> None:
    head(draft).append(Row(rb"<filename>C:\pics\other.jpg</filename>"))
    draft.heads[list(draft.heads)[-1]].append(Row(size_of()))
    draft.counts["noted", voc.ANOTHER] += 1


def voc_root(draft: Draft) -> None:
    rows = head(draft)
    rows[0] = Row(b"<Annotation>", "(its root is <Annotation>|not valid xml)")


def voc_broken(draft: Draft) -> None:
    draft.serial += 1
    stem = draft.add_image("b")
    text, pattern = draft.choice(
        ("", "1: not valid xml: no element found"),
        ("<annotation>\n<object>", "2: not valid xml"),
        ("<annotation>\n</object></annotation>", "2: not valid xml: mismatched tag"),
        ("<annotation>\n&x;</annotation>", "2: not valid xml: undefined entity"),
        ("{}", "1: not valid xml"),
        ("<annotation>\n\0</annotation>", "2: not valid xml"),
        ("<annotation>\n\udcff</annotation>", "2: not valid xml"),
        ('<?xml version="1.0" encoding="gbk"?><annotation/>', "1: not valid xml"),
        ('<?xml version="1.0" encoding="x"?><annotation/>', "1: not valid xml"),
        ("<annotation>" + "<a>" * 500, "1: elements are nested over 100 deep"),
    )
    draft.more[f"labels/train/{stem}.xml"] = text.encode(errors="surrogateescape")
    draft.refusals.append(f"labels/train/{stem}.xml:{pattern}")


def voc_entities(draft: Draft) -> None:
    stem = draft.add_image("e")
    bomb = "".join(f'<!ENTITY a{i} "{f"&a{i - 1};" * 10}">\n' for i in range(1, 30))
    entity = draft.choice('<!ENTITY a SYSTEM "file:///etc/hostname">', f'<!ENTITY a0 "x">{bomb}', '<!ENTITY % p "x">')
    draft.more[f"labels/train/{stem}.xml"] = f"<!DOCTYPE x [\n{entity}]>\n<annotation>&a;</annotation>".encode()
    draft.refusals.append(f"labels/train/{stem}.xml:2: it declares an entity")


def size_of() -> bytes:
    return f"<size><width>{WIDTH}</width><height>{HEIGHT}</height></size>".encode()


VOC = {
    "sound": voc_sound,
    "outside": voc_outside,
    "beyond": voc_beyond,
    "no extent": voc_spoilt("dropped", "box has no extent", (9, 9, 5, 20), (9, 9, 8, 20), (5, 9, 9, 1)),
    "not finite": voc_spoilt("dropped", "bbox is not four finite numbers", ("nan", 1, 5, 5), (1, 1, "1e300", 5)),
    "no box": voc_spoilt("dropped", "bbox is missing", ()),
    "difficult": voc_difficult,
    "odd difficult": voc_odd_difficult,
    "twice": voc_twice,
    "no size": voc_no_size,
    "another size": voc_other_size,
    "another filename": voc_other_file,
    "no xml": without,
    "no image": orphan,
    "another root": voc_root,
    "broken xml": voc_broken,
    "entities": voc_entities,
    "no name": refused_row(
        (voc_row((1, 1, 5, 5), name=""), "the object has no name"), ("<object><name/></object>", "the object has")
    ),
    "few corners": refused_row(
        (voc_row((1, 1, 5)), "<bndbox> has no <ymax>"), (voc_row((1,)), "<bndbox> has no <ymin>")
    ),
    "text": refused_row((voc_row(("x", 1, 5, 5)), "xmin is 'x'"), (voc_row((1, "1,5", 5, 5)), "ymin is '1,5'")),
    "damaged image": damaged,
}


def write(draft: Draft, root: Path) -> None:
    """Writes the folder; rows that must be refused become patterns with file and line."""
    for name, content in draft.images.items():
        path = root / "images" / "train" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    for stem, rows in draft.rows.items():
        if draft.suffix == ".xml":
            start = draft.heads.get(stem, [Row(b"<annotation>"), Row(size_of())])
            rows = [*start, *rows, Row(b"</annotation>")]
        path = root / "labels" / "train" / f"{stem}{draft.suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(draft.form(b"".join(row.text + b"\n" for row in rows)))
        for number, row in enumerate(rows, start=1):
            if row.refused:
                sentence = row.refused if row.refused.startswith("(") else re.escape(row.refused)
                number = "[0-9]+" if row.refused.startswith("(") else number
                draft.refusals.append(f"labels/train/{stem}{draft.suffix}:{number}: {sentence}")
    if draft.suffix == ".txt":
        draft.more.setdefault("data.yaml", b"names: [cat, dog]\n")
    for name, content in draft.more.items():
        (root / name).write_bytes(content)


def check(data) -> None:
    suffix = data.draw(st.sampled_from((".txt", ".xml")))
    draft, kinds = Draft(data.draw, suffix), {".txt": YOLO, ".xml": VOC}[suffix]
    for _ in range(data.draw(st.integers(1, 4))):
        kinds["sound"](draft)
    chosen = [data.draw(st.sampled_from(sorted(kinds))) for _ in range(data.draw(st.integers(0, 3)))]
    for kind in sorted(chosen, key="yaml".__eq__):
        kinds[kind](draft)
    with tempfile.TemporaryDirectory() as folder:
        folder, root = Path(folder), Path(folder, "set")
        write(draft, root)
        if "yaml" in chosen:
            draft.refusals = [one for one in draft.refusals if one.startswith("data.yaml")]
        told = None
        try:
            dataset = opened(root, folder, ["train"], source="folder", max_boxes=16, classes="")
            counts = kd.count(dataset, "train", settings(folder))
            kd.summary(dataset, settings(folder)).encode()
        except UserError as error:
            told = str(error)
        assert (told is not None) == bool(draft.refusals), (chosen, told)
        if told is not None:
            assert "\n" not in told and any(re.search(one, told) for one in draft.refusals), (chosen, told)
            return
        assert dataset.source == {".txt": "yolo_folder", ".xml": "voc_folder"}[suffix]
        assert counts.images == len(draft.images), chosen
        assert (counts.objects, counts.crowd) == (draft.counts.pop("objects", 0), draft.counts.pop("crowd", 0)), chosen
        found = {key: n for key, n in counts.other.items() if not key[1].startswith(("class without", "image that is"))}
        assert found == {key: n for key, n in draft.counts.items() if n}, chosen
        reader = dataset.splits["train"].records
        assert sum(len(reader[i]["boxes"]) for i in range(counts.images)) == counts.objects, chosen
        for entry in dataset.splits["train"].log:  # what is told of an object names its file and line
            assert entry["annotation"] is None or re.fullmatch(rf"labels/train/\w+\{suffix}:[0-9]+", entry["place"])


def test_there_are_twenty_kinds_of_each():
    assert len(YOLO) - 1 >= 20 and len(VOC) - 1 >= 20  # without the sound ones


@fuzz(60)
def test_some_spoilt_folders(data):
    check(data)


@pytest.mark.user_input(
    "YOLO and VOC folders",
    "1000 folders spoilt in twenty ways each (`make test-all`)",
    "counted as they were spoilt, or refused with file and line",
)
@pytest.mark.slow
@fuzz(1000)
def test_1000_spoilt_folders(data):
    check(data)
