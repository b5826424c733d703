"""GO-LSD between models: the edges of the teacher's boxes as distributions over the student's bins.

    L = weight * sum over layers of sum_i u_i 1/4 sum over edges of CE(c_ie^S, two bins around y_ie) / sum_i u_i
    y_ie: distance of edge e of the teacher's box from the box that query i of the student refines, in the unit of the
    student's bins;  u_i: the best class score of the teacher's query;  pairs (i, j): one to one, of least total
    sum_k CE(z_ik^S, p_jk^T) + 5 |b_i - b_j|_1 - 2 GIoU(b_i, b_j), for each layer of the student

Paper: Peng et al., "D-FINE: Redefine Regression Task in DETRs as Fine-grained Distribution Refinement", ICLR 2025,
    section 4.2, where the teacher is the last layer of the same model.
Taps: the decoder of a D-FINE as the student and that of any transformer with the same classes as the teacher.
Open: the paper distils a model's own last layer, whose distances are counted from the same box; a query of another
    model refines a box of its own. So the teacher's box is encoded for the student's, as the loss of the truth encodes
    it (a target of two bins, FGL), which needs neither its bins nor its distributions. All layers of the student learn
    from the teacher's last layer.
Proof: none: no public original; the pairs equal SciPy's, the expectation of a target is the teacher's edge.
Status: experimental
"""

import jax
import jax.numpy as jnp

from kdjax.boxes import edges
from kdjax.distill import method, queries, taps
from kdjax.errors import UserError
from kdjax.losses import box
from kdjax.structs import Array, DetectorOutput, Queries


def make(*, weight: float = 1.5, scale: float = 4.0, up: float = 0.5) -> method.Method:
    """Cross-entropy of the student's distributions of edges with the bins around the teacher's edges.

    Args:
      weight: of the term; 1.5 in the paper.
      scale: of the student's distances, > 0; 4, of dfine_x 8.
      up: of the student's bins, > 0; 0.5.

    Raises:
      UserError: `scale` or `up` not above 0.
    """
    method.check("go_lsd: scale", scale, scale > 0, "above 0")
    method.check("go_lsd: up", up, up > 0, "above 0")

    def init(key: Array, student_spec: DetectorOutput, teacher_spec: DetectorOutput) -> method.Params:
        del key
        queries.check(student_spec, teacher_spec)
        if student_spec.layers[-1].corners is None:
            raise UserError("the student predicts no distributions of edges: it must be a D-FINE")
        return {}

    def compare(s: Queries, t: Queries) -> Array:
        assert s.corners is not None
        assert s.reference is not None
        target = edges.edge_distance(jax.lax.stop_gradient(s.reference), t.boxes, scale=scale)
        bins = edges.edge_bins(s.corners.shape[-1] - 1, up=up, scale=scale)
        by_edge = box.fine_grained_localization(s.corners, target, bins)
        return queries.weighted_mean(jnp.mean(by_edge, -1), queries.scores(t))

    def apply(params: method.Params, context: method.Context) -> dict[str, Array]:
        del params
        last = context.teacher.layers[-1]
        pairs = queries.paired([(layer, last) for layer in context.student.layers])
        return {"edges": method.sum_over_levels(compare(s, t) for s, t in pairs)}

    return method.Method(init, apply, {"edges": weight}, taps.Reads(("layers",), ("layers",)))
