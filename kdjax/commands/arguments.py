"""Arguments that several commands share."""

import dataclasses
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from kdjax import compile_cache, data, files, inference
from kdjax.data.coco import composed
from kdjax.errors import UserError, listed, prefix, printable
from kdjax.training import config as settings
from kdjax.training.checks import FILES, MODEL
from kdjax.weights import WEIGHTS

SCENES = 400  # images of the generated validation split, as in a run


def load_model(path: str, flag: str = "--model") -> inference.Model:
    """The model that a flag names; compiled programs are kept on disk, so that the next command starts in seconds."""
    if not jax.config.jax_compilation_cache_dir:  # pyright: ignore[reportAttributeAccessIssue] - set at run time
        compile_cache.enable()
    with prefix(flag):
        return inference.load(path)


def make_folder(path: str | Path, *, outputs: Sequence[str] = (), folders: Sequence[str] = ()) -> Path:
    """Creates the folder `--out`, and checks that its files can be written, before anything is computed.

    Args:
      path: the folder.
      outputs: the files that will be written in it.
      folders: the folders that will be created in it.

    Raises:
      UserError: it cannot be created, is that of a run or of a model, or something else is in the place of a file or
        folder.
    """
    refuse_taken(path)
    return _made(path, outputs, folders)


def refuse_taken(path: str | Path) -> None:
    """Refuses the folder of a run or of a model as `--out`.

    Raises:
      UserError: it is one.
    """
    folder = Path(path).expanduser()
    model = (folder / WEIGHTS).exists()
    if model or (folder / "metrics.jsonl").exists():
        raise UserError(f"--out: {path} is the folder of a {'model' if model else 'run'}: choose another folder")


def _made(path: str | Path, outputs: Sequence[str], folders: Sequence[str] = ()) -> Path:
    folder = Path(path).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out: {path} cannot be created ({error.strerror}): choose another folder") from None
    files.check_outputs("--out", folder, files=outputs, folders=folders)
    return folder


def output_file(path: str, *, inputs: Iterable[str] = ()) -> Path:
    """The file `--out`; its folder is created.

    Args:
      path: the file.
      inputs: what the command reads.

    Raises:
      UserError: it is a folder, an input, or a file of a model or a run, or its folder cannot be created.
    """
    file = Path(path).expanduser()
    if file.is_dir():
        raise UserError(f"--out: {path} is a folder: name the file to write")
    if any(Path(one).expanduser().resolve() == file.resolve() for one in inputs):
        raise UserError(f"--out: {path} is also what is read: choose another file")
    folder, parents = file.parent, file.resolve().parents
    in_model = (folder / WEIGHTS).exists() and file.name in MODEL
    in_run = any(
        (above / "metrics.jsonl").exists() and file.resolve().relative_to(above).as_posix() in FILES
        for above in parents[:2]
    )
    if in_model or in_run:
        raise UserError(f"--out: {path} is a file of a {'model' if in_model else 'run'}: choose another name")
    _made(file.parent, [file.name])
    return file


def aligned(rows: list[list[str]]) -> str:
    """Rows of a table as text: the first column is left-aligned, the others are right-aligned."""
    rows = [[printable(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )


@dataclasses.dataclass(frozen=True)
class Data:
    """The data of `--data` and `--split`."""

    name: str
    dataset: data.Dataset  # its split "val" is the one of --split
    config: Mapping[str, Any]  # as `config.data` of a run

    @property
    def split(self) -> data.Split:
        """The images and their boxes."""
        return self.dataset.splits["val"]

    @property
    def truth(self) -> dict[str, Any]:
        """COCO instances."""
        return self.split.truth

    def stream(self, only: Container[int] | None = None) -> Iterator[tuple[int, np.ndarray]]:
        """(image id, u8[h, w, 3] RGB) of all images in order, or of some ids."""
        return ((i, self.split.image(i)) for i in self.split.image_ids if only is None or i in only)

    def batches(self, model: inference.Model, *, batch_size: int) -> data.Batches:
        """The batches that the model is evaluated on."""
        config = {**self.config, "image_size": model.image_size}
        fit = model.detector.fit
        return data.eval_batches(self.dataset, "val", config, batch_size=batch_size, fit=fit)


def open_data(
    source: str,
    split: str,
    annotations: str,
    images: str,
    limit: int,
    exif: str,
    *,
    classes: str = "",
    masks: bool = False,
    flag: str = "--data",
) -> Data:
    """Opens and checks the data of a flag; every image is decoded once when it is first used.

    Args:
      source: "scenes", a folder in COCO, YOLO or VOC layout, a data.yaml, or a prepared TFDS directory.
      split: as `config.data.val_split` of a run.
      annotations: as `config.data.val_annotations` of a run.
      images: as `config.data.val_images` of a run.
      limit: only the first images; 0 takes all.
      exif: as `config.data.exif_orientation` of a run.
      classes: as `config.data.classes` of a run.
      masks: whether to tell which objects have no mask.
      flag: which names the data.

    Raises:
      UserError: the data cannot be used.
    """
    if limit < 0:
        raise UserError(f"--limit must be >= 0 (0: all images), not {limit}")
    config = settings.base().data
    config.limit = limit
    config.exif_orientation = exif
    if source == "scenes":
        if split != "val" or annotations or images or classes:
            raise UserError(
                f"{flag}=scenes takes no --split, --annotations, --images or --classes: its only split is val"
            )
        config.update(source="scenes", scenes_val=min(limit or SCENES, SCENES))
    else:
        folder = Path(source).expanduser()
        if not folder.is_dir() and not (folder.is_file() and folder.suffix.lower() in data.YAML):
            raise UserError(
                f"{flag}: there is no folder {source}: give a folder in COCO, YOLO or VOC layout, a TFDS directory, or "
                "scenes"
            )
        config.update(source="folder", root=source, val_split=split, val_annotations=annotations, val_images=images)
        config.classes = classes
        if images and data.recognised(config, ("val",)) == "tfds":
            raise UserError("--images: a TFDS directory contains its images: omit this flag")
    with prefix(f"{flag}={source}"):
        dataset = data.open_dataset(config, splits=("val",))
        opened = Data(source, dataset, config.to_dict())
        listed = opened.truth
        if all(row["iscrowd"] for row in listed["annotations"]):
            raise UserError(f"its {len(listed['images'])} images have no objects: metrics need some")
    counts = data.count(dataset, "val", {**config.to_dict(), "masks": masks})
    told = data.reasons(counts, ("dropped", "ignored", "noted"))
    if told:
        print(f"{source}: {'; '.join(told)}")
    return opened


def refuse_without(flag: str, *, split: str, annotations: str, images: str, limit: int, classes: str) -> None:
    """Refuses flags of labelled data that is not given.

    Args:
      flag: that of the data.
      split, annotations, images, limit, classes: as for `open_data`.

    Raises:
      UserError: one of them is given.
    """
    values = {"split": split != "val", "annotations": annotations, "images": images, "limit": limit, "classes": classes}
    if given := [name for name, value in values.items() if value]:
        raise UserError(f"--{given[0]} is for the data of {flag}, which is not given")


def exif_of(models: Iterable[inference.Model]) -> str:
    """How the images were read that models were trained on.

    Raises:
      UserError: they differ.
    """
    settings_of = {model.exif_orientation: model.path for model in models}
    if len(settings_of) > 1:
        told = ", ".join(f"{path} on {exif} images" for exif, path in settings_of.items())
        raise UserError(f"--exif: the models were trained differently ({told}): choose what the data's boxes refer to")
    return next(iter(settings_of))


def match_classes(model: inference.Model, opened: Data, flag: str = "--data") -> inference.Model:
    """The model with the category ids of the data of a flag; classes are matched by name, in any Unicode form.

    Raises:
      UserError: the class names differ.
    """
    ids = dict(zip(map(composed, opened.dataset.classes), opened.dataset.category_ids, strict=True))
    names = [composed(name) for name in model.class_names]
    if set(ids) != set(names):
        unknown = [name for name in ids if name not in names]
        missing = [name for name in names if name not in ids]
        what = f"the data has {unknown[0]!r}" if unknown else f"the data lacks {missing[0]!r}"
        raise UserError(
            f"{flag}={opened.name}: its classes ({listed(ids)}) are not those of {model.path} ({listed(names)}): {what}"
        )
    return dataclasses.replace(model, category_ids=tuple(ids[name] for name in names))
