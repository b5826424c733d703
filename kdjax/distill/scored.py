"""A teacher's detections as targets of the student, each as far as the teacher is sure of it."""

from typing import NamedTuple

import jax.numpy as jnp

from kdjax.distill import method
from kdjax.errors import UserError
from kdjax.structs import DetectorOutput, Targets


class Choice(NamedTuple):
    """Which detections teach, and how much the rows lose that learn none."""

    score_threshold: float  # detections below are left out, 0 .. 1
    max_detections: int  # of an image, the best ones, 1 .. 100
    unmatched: float  # factor of the losses of rows that learn no detection, >= 0

    def check(self, name: str) -> "Choice":
        """Itself, if the options of the method of this name are in their ranges.

        Raises:
          UserError: one is not.
        """
        method.check(f"{name}: score_threshold", self.score_threshold, 0 <= self.score_threshold <= 1, "0 .. 1")
        method.check(f"{name}: max_detections", self.max_detections, 1 <= self.max_detections <= 100, "1 .. 100")
        method.check(f"{name}: unmatched", self.unmatched, self.unmatched >= 0, "at least 0")
        return self

    def targets(self, context: method.Context) -> Targets:
        """The chosen detections as objects of M = D places, weighted by their scores.

        In images without any, nothing is learned, nor that there is nothing.

        Args:
          context: of a method that reads "targets" of the student and "detections" of the teacher.
        """
        found = context.teacher.detections
        assert found is not None
        scores, valid = found.scores[:, : self.max_detections], found.valid[:, : self.max_detections]
        kept = valid & (scores >= self.score_threshold)
        background = jnp.where(jnp.any(kept, 1, keepdims=True), jnp.float32(self.unmatched), 0.0)
        return context.targets._replace(
            boxes=jnp.where(kept[..., None], found.boxes[:, : self.max_detections], 0.0),
            labels=jnp.where(kept, found.labels[:, : self.max_detections], 0),
            valid=kept,
            instance_masks=None,
            weights=jnp.concatenate([jnp.where(kept, scores, 0.0), background], 1),
        )


def refuse_masks(student_spec: DetectorOutput) -> None:
    """Refuses a student that learns masks.

    Raises:
      UserError: it does.
    """
    if student_spec.prototypes is not None or student_spec.masks_at is not None:
        raise UserError("the student learns masks, and the teacher's detections teach boxes only")
