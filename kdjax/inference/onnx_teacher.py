"""A teacher that is an ONNX file: it runs on the host, and says what it sees in pixels of the run's canvas.

The whole canvas of a batch is fitted to the file's input, as `Layout.fit` says. Maps then lie on the canvas cell by
cell only if it fills the input; rows lie on a grid of the canvas where the strides of the file are whole pixels of it.
"""

import ast
import contextlib
import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import jax
import numpy as np

from kdjax import detectors
from kdjax.boxes import nms
from kdjax.boxes.convert import clip
from kdjax.boxes.priors import grid_priors
from kdjax.data import classes, coco, transforms
from kdjax.detectors.api import Detector
from kdjax.distill import Distiller
from kdjax.distill.teachers import without_places
from kdjax.errors import UserError, listed, prefix
from kdjax.inference import layouts, onnx_file, placement, predict
from kdjax.inference.layouts import Layout, Outputs
from kdjax.inference.onnx_file import OnnxFile
from kdjax.structs import AnyArray, Array, Detections, DetectorOutput, PaddedDetections, PyTree, Rows

OBSERVED = 100  # detections of an image that methods get, as of a live teacher
SIZE = 640  # of the input where neither the file nor the layout says one, and there is no canvas
_PREDICTIONS = ("cls_logits", "box_reg", "quality")  # maps of kdjax's own exports with --raw


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class OnnxTeacher:
    """An ONNX file as a teacher, and as a detector of images of any size; see `load_teacher`.

    It is called outside of compiled programs. With `kdjax.Distiller`, pass what `observe` returned as `observed`.
    """

    path: Path
    file: OnnxFile
    layout: Layout
    exported: Detector | None  # of kdjax's own exports, what decodes their maps
    class_names: tuple[str, ...]  # of all classes of the file; () if it has or names none
    columns: tuple[int, ...] | None  # the classes that are told, in order; None: all

    @property
    def detects(self) -> bool:
        """Whether it finds boxes."""
        return self.layout.kind != "maps"

    @property
    def num_classes(self) -> int | None:
        """Classes that it tells; None if it finds no boxes or their number is not known."""
        count = len(self.class_names if self.columns is None else self.columns)
        return count if self.detects and count else None

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the classes that it tells; () if they are not known."""
        return tuple(self.class_names[k] for k in self.columns) if self.columns is not None else self.class_names

    @property
    def fingerprint(self) -> str:
        """The hash of the file, its weights and how it is read."""
        return f"{self.file.fingerprint} {self.layout} {self.columns}"

    @property
    def name(self) -> str:
        """The name of the file."""
        return self.path.name

    @property
    def masks(self) -> str:
        """`Detector.masks`: none."""
        return ""

    @property
    def variables(self) -> dict[str, np.ndarray]:
        """`fingerprint` as an array, in the place of the weights of a live teacher: what tells teachers apart."""
        return {"sha256": np.frombuffer(hashlib.sha256(self.fingerprint.encode()).digest(), np.uint8)}

    @property
    def fit(self) -> str:
        """How an image fits the input (`Detector.fit`)."""
        return self.layout.fit

    def matched(self, names: Sequence[str]) -> "OnnxTeacher":
        """The teacher with the classes of some data, matched by name and in their order; others are left out.

        Args:
          names: of the classes of the data.

        Raises:
          UserError: the names of the file's classes are not known, or it lacks one.
        """
        if not self.class_names:
            raise UserError(
                f"{self.path}: the names of its classes are not known: set options.classes: it {classes.NEED}"
            )
        own = [coco.composed(name).strip() for name in self.class_names]
        wanted = [coco.composed(name).strip() for name in names]
        if lacking := [name for name in wanted if name not in own]:
            raise UserError(
                f"{self.path}: class {lacking[0]!r} of the data is unknown to the teacher, which has "
                f"{listed(self.class_names)}: take methods that read only its maps, or name its classes in "
                "options.classes"
            )
        return dataclasses.replace(self, columns=tuple(own.index(name) for name in wanted))

    def spec(self, image_size: tuple[int, int]) -> DetectorOutput:
        """Shapes of the output for one image of (height, width) pixels; the file is run once on a grey image.

        Raises:
          UserError: an output does not fit the layout, or the canvas not the input.
        """
        return _spec(self, (int(image_size[0]), int(image_size[1])))

    def observe(self, variables: PyTree, batch: Mapping[str, Any]) -> DetectorOutput:
        """What the file says of `batch["image"]` u8[B, H, W, 3].

        Args:
          variables: not used: the file holds its weights.
          batch: also `image_size` i32[B, 2], height and width of the images on the canvas, to which detections are
            clipped; without it, to the canvas.

        Returns:
          Arrays in NumPy, in pixels of the canvas: `neck`; `rows` with `cls_logits` and `level_sizes` where they lie on
          a grid of the canvas, without `location` (`priors`); or `detections`, `OBSERVED` an image.

        Raises:
          UserError: an output does not fit the layout, or the canvas not the input.
        """
        del variables
        found = self._read(np.asarray(batch["image"]), batch.get("image_size"))
        if found.detections is None:
            return found
        best = PaddedDetections(*(value[:, :OBSERVED] for value in found.detections if value is not None))
        return dataclasses.replace(found, detections=best)

    def priors(self, image_size: tuple[int, int]) -> np.ndarray:
        """Where the rows of a grid lie, f32[N, 4]: x, y of a cell's top left corner, its stride twice, in pixels."""
        return grid_priors(image_size, self.spec(image_size).strides)

    @property
    def decode(self) -> Callable[..., PaddedDetections] | None:
        """(output with rows, image_size i32[B, 2]) -> detections, clipped to it; None without rows.

        The options are `score_threshold`, `pre_nms` and `max_detections`, as of `Detector.decode`; the IoU of the
        NMS is that of the layout. A pure function on arrays.
        """
        if self.layout.kind != "rows" and not self._raw:
            return None
        return functools.partial(_decoded, self)

    def _decode(
        self,
        output: DetectorOutput,
        image_size: AnyArray,
        *,
        score_threshold: float,
        pre_nms: int,
        max_detections: int,
    ) -> PaddedDetections:
        rows = output.rows
        assert rows is not None, "the layout has rows"
        assert rows.logits is not None, "rows of files have logits"
        assert rows.boxes is not None, "rows of files have boxes"
        limits = {"score_threshold": score_threshold, "max_detections": max_detections}
        if self.exported is not None and output.box_reg:
            same = detectors.build(self.exported.name, rows.logits.shape[-1], **self.exported.options)
            return same.decode(output, cast(Array, image_size), pre_nms=pre_nms, **limits)
        scores = jax.nn.sigmoid(rows.logits)
        if rows.quality is not None:
            scores = scores * jax.nn.sigmoid(rows.quality)[..., None]
        seen = clip(rows.boxes, cast(Array, image_size))
        scores = jax.numpy.where(jax.numpy.all(seen[..., 2:] > seen[..., :2], -1)[..., None], scores, 0.0)
        if not self.layout.nms:
            found = nms.best_pairs(rows.boxes, scores, **limits)
        else:
            levels = rows.level_sizes or (rows.boxes.shape[1],)
            options = {"iou_threshold": self.layout.nms, "pre_nms": pre_nms} | limits
            found = nms.select_detections(rows.boxes, scores, level_sizes=levels, image_size=None, **options)
        inside = clip(found.boxes, cast(Array, image_size))
        return found._replace(boxes=jax.numpy.where(found.valid[..., None], inside, 0.0))

    def program(self, variables: PyTree, images: AnyArray, image_size: AnyArray) -> PaddedDetections:
        """`kdjax.inference.predict.Program`: detections of canvases, in NumPy, for the one prediction loop."""
        del variables
        sizes = np.asarray(image_size)
        found = self._read(np.asarray(images), sizes)
        if self.decode is None:
            assert found.detections is not None, "only teachers that detect are evaluated"
            return found.detections
        with _on_cpu():
            padded = self.decode(found, sizes)
        return PaddedDetections(*(np.asarray(value) for value in padded if value is not None))  # type: ignore[arg-type]

    def detect(self, images: Sequence[np.ndarray], *, batch_size: int = 8) -> list[Detections]:
        """Detects the objects of images.

        Args:
          images: u8[h, w, 3] RGB of any sizes.
          batch_size: images that are computed together, where the file allows it.

        Returns:
          The detections of each, best score first, in its pixels.

        Raises:
          UserError: the file has only maps, or an output does not fit the layout.
        """
        if not self.detects:
            raise UserError(f"{self.path}: it gives maps and finds no boxes: detecting needs another layout")
        found: list[Detections] = []
        size = self._input((SIZE, SIZE))
        for batch in predict.canvases(images, size, batch_size=batch_size, fit=self.fit):
            padded = self.program(None, batch["image"], batch["image_size"])
            of_batch = predict.in_originals(batch, padded, self.names)
            found += of_batch[: len(batch["originals"])]
        return found

    # ------------------------------------------------------------------------------------------------------- helpers

    @property
    def _raw(self) -> bool:
        """Whether it is an export of kdjax with maps instead of detections."""
        return self.exported is not None and any(name.startswith("cls_logits_") for name in self.file.outputs)

    def _input(self, canvas: tuple[int, int]) -> tuple[int, int]:
        """The size of the input for a canvas: the file's, or the layout's, or that of the canvas."""
        height, width = (
            own or asked for own, asked in zip(self.file.size, self.layout.image_size or canvas, strict=True)
        )
        return height, width

    def _read(self, images: np.ndarray, image_size: AnyArray | None) -> DetectorOutput:
        """`observe` with all detections."""
        canvas = images.shape[1], images.shape[2]
        size = self._input(canvas)
        place = placement.Placement(canvas, transforms.fitted(canvas, size, fit=self.fit)[1], size)
        sizes = np.broadcast_to(np.array(canvas), (len(images), 2)) if image_size is None else np.asarray(image_size)
        placed = placement.placed(images, place)
        assert self.layout.std is not None, "`load_teacher` refuses layouts without"
        pixels = onnx_file.as_input(
            self.file, placed, colors=self.layout.colors, mean=self.layout.mean, std=self.layout.std
        )
        of_input = {"input_hw": [*size], "input_wh": [*size[::-1]]}.get(self.layout.sizes)
        told = (
            np.ceil(sizes * place.ratio[::-1]) if of_input is None else np.broadcast_to(np.array(of_input), sizes.shape)
        )
        parts, first = [], 0
        with prefix(str(self.path)):
            for arrays in self.file.run(pixels, told.astype(np.int32)):
                count = min(self.file.image.shape[0] or len(images), len(images) - first)
                found = self._from(Outputs(arrays, size))
                for leaf in jax.tree.leaves(found):
                    if leaf.shape[0] != count:
                        raise UserError(f"its outputs {layouts.shapes(arrays)} are not of {count} images each")
                parts.append(found)
                first += count
            whole = jax.tree.map(lambda *leaves: leaves[0] if len(leaves) == 1 else np.concatenate(leaves), *parts)
            return self._of_classes(placement.on_canvas(whole, place, sizes))

    def _from(self, found: Outputs) -> DetectorOutput:
        """What the outputs say, in pixels of the input."""
        if not self._raw:
            described = self.layout if self.exported is None else dataclasses.replace(self.layout, kind="detections")
            if self.exported is not None:
                described = dataclasses.replace(described, outputs=("boxes", "scores", "labels"))
            return layouts.read(described, found)
        neck, strides = layouts.read_maps(self.layout, found)
        fields: dict[str, Any] = {}
        for what in _PREDICTIONS:
            maps = {int(n.rpartition("_")[2]): x for n, x in found.arrays.items() if n.startswith(f"{what}_")}
            fields[what] = tuple(maps[stride] for stride in sorted(maps))
            fields.setdefault("strides", tuple(sorted(maps)))
        if neck and strides != fields["strides"]:
            raise UserError(
                f"the maps have the strides {strides}, the predictions {fields['strides']}: take maps of these"
            )
        assert self.exported is not None
        anchors = fields["cls_logits"][0].shape[-1] // self.exported.num_classes
        output = DetectorOutput(**fields, neck=cast(Any, neck), anchors=anchors)
        with _on_cpu():
            rows = jax.tree.map(np.asarray, _rows(self.exported, output))
        return dataclasses.replace(output, rows=dataclasses.replace(rows, location=None))

    def _of_classes(self, output: DetectorOutput) -> DetectorOutput:
        """The output with the columns and labels of the chosen classes."""
        if self.class_names and output.rows is not None and output.rows.logits is not None:
            count = output.rows.logits.shape[-1]
            if count != len(self.class_names):
                raise UserError(
                    f"it tells the scores of {count} classes, but {len(self.class_names)} are named "
                    f"({listed(self.class_names)}): set options.classes, or options.scores: softmax has a column more"
                )
        if self.columns is None:
            return output
        columns = np.array(self.columns)
        if output.rows is not None:
            logits = np.asarray(output.rows.logits)[..., columns]
            output = dataclasses.replace(output, rows=dataclasses.replace(output.rows, logits=cast(Any, logits)))
        if output.anchors == 1:
            maps = tuple(x[..., columns] for x in output.cls_logits)
        else:
            maps = tuple(
                x.reshape(*x.shape[:3], output.anchors, -1)[..., columns].reshape(*x.shape[:3], -1)
                for x in output.cls_logits
            )
        if (found := output.detections) is not None:
            new = np.full(len(self.class_names), -1)
            new[columns] = np.arange(len(columns))
            labels = np.asarray(found.labels)
            if labels.size and labels.max() >= len(new):
                raise UserError(
                    f"it tells the label {labels.max()}, but {len(new)} classes are named: set options.classes"
                )
            kept = np.asarray(found.valid) & (new[labels] >= 0)
            labels = np.where(kept, new[labels], 0)
            output = dataclasses.replace(output, detections=placement.first(found, kept, labels))
        return dataclasses.replace(output, cls_logits=maps)


def load_teacher(
    path: str | Path, layout: str, options: Mapping[str, Any] | None = None, *, class_names: Sequence[str] = ()
) -> OnnxTeacher:
    """Opens an ONNX file as a teacher.

    Args:
      path: the file.
      layout: how it is read: a name of `kdjax.inference.layouts.READY`.
      options: what differs, fields of `kdjax.inference.layouts.Layout`.
      class_names: names of its classes by index; (): those of the option `classes` or of the file's metadata, if any.

    Raises:
      UserError: an option is wrong, or the file cannot be read or does not fit the layout.

    Example:
      >>> teacher = load_teacher("yolox_nano.onnx", "yolox", {"classes": "coco"})  # doctest: +SKIP
      >>> teacher.detect([image])[0].boxes  # doctest: +SKIP
    """
    described = layouts.layout(layout, options)
    names = tuple(class_names)
    if not names and described.classes:
        with prefix("options.classes"):
            names = tuple(classes.read(described.classes))
    wanted = (*described.maps, *described.outputs) if described.kind == "maps" else described.maps
    file = onnx_file.open_file(path, tensors=wanted)
    with prefix(str(file.path)):
        if lacking := [name for name in described.outputs if name not in file.outputs]:
            raise UserError(f"it has no output {lacking[0]!r}: its outputs are {listed(file.outputs)}")
        if described.std is None and file.image.dtype != np.uint8:
            raise UserError(
                f"its input is {file.image}: options.std (and mean) must say how it is normalised: 255 for an input in "
                "0 .. 1, 1 for one in 0 .. 255"
            )
        described = dataclasses.replace(described, std=described.std or (1.0, 1.0, 1.0))
        names = names or _own_names(file.facts)
        detector = None
        if described.kind == "kdjax":
            detector, names = _exported(file, names)
            described = dataclasses.replace(described, fit=cast(Any, detector.fit))
    return OnnxTeacher(path=file.path, file=file, layout=described, exported=detector, class_names=names, columns=None)


def _exported(file: OnnxFile, names: tuple[str, ...]) -> tuple[Detector, tuple[str, ...]]:
    """The detector of an export of kdjax, and the names of its classes."""
    if "kdjax" not in file.facts or "detector" not in file.facts:
        raise UserError(f"it is no export of kdjax: layout must be one of {listed(layouts.READY, 20)}")
    if not names:
        raise UserError("its classes have no names: set options.classes, or export it from a model that has them")
    options = json.loads(file.facts.get("options", "{}"))
    return detectors.build(file.facts["detector"], len(names), **options), names


def _own_names(facts: Mapping[str, str]) -> tuple[str, ...]:
    """The names of the classes in the metadata of kdjax ("classes": a list) or Ultralytics ("names": a dict)."""
    try:
        if "classes" in facts:
            return tuple(str(name) for name in json.loads(facts["classes"]))
        if "names" in facts:
            named = ast.literal_eval(facts["names"])
            return tuple(str(named[k]) for k in range(len(named)))
    except (ValueError, SyntaxError, TypeError, KeyError):
        pass
    return ()


@functools.lru_cache(maxsize=16)
def _spec(teacher: OnnxTeacher, image_size: tuple[int, int]) -> DetectorOutput:
    grey = np.full((1, *image_size, 3), transforms.PAD, np.uint8)
    output = teacher.observe(None, {"image": grey})
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), output)


@functools.partial(jax.jit, static_argnums=0, static_argnames=("score_threshold", "pre_nms", "max_detections"))
def _decoded(
    teacher: OnnxTeacher,
    output: DetectorOutput,
    image_size: Array,
    *,
    score_threshold: float = 0.001,
    pre_nms: int = 30000,
    max_detections: int = layouts.PLACES,
) -> PaddedDetections:
    limits = {"score_threshold": score_threshold, "pre_nms": pre_nms, "max_detections": max_detections}
    return teacher._decode(output, image_size, **limits)


@functools.partial(jax.jit, static_argnums=0)
def _rows(detector: Detector, output: DetectorOutput) -> Rows:
    return detector.rows(output)


def on_host(distiller: Distiller, batch: Mapping[str, Any]) -> DetectorOutput:
    """What the methods of a distiller read of its `OnnxTeacher`, for a batch in NumPy; arrays in NumPy."""
    with _on_cpu():
        found = distiller.observe(batch, distiller.teacher.variables)
        return jax.tree.map(np.asarray, without_places(found))


def _on_cpu() -> contextlib.AbstractContextManager[object]:
    """A context in which arrays of the host are computed with on the host."""
    return jax.default_device(jax.local_devices(backend="cpu")[0])
