"""Line charts."""

import numpy as np

from kdjax.report import charts


def test_a_scale_is_logarithmic_where_values_span_decades():
    steps = np.arange(5.0)
    wide = charts.line_chart({"student": (steps, 10.0**-steps)}, title="x")
    narrow = charts.line_chart({"student": (steps, 1 + steps)}, title="x")
    assert "log scale" in wide and "log scale" not in narrow
    assert "log scale" not in charts.line_chart({"student": (steps, 10.0**-steps - 1e-4)}, title="x")
    assert "log scale" not in charts.line_chart({"run": (steps, 10.0**-steps)}, title="x", log=False)
    assert charts.line_chart({"student": (steps[:0], steps[:0])}, title="x") == ""


def test_thinned_curves_keep_their_extremes():
    steps = np.arange(10_000.0)
    values = np.ones(10_000)
    values[[1234, 7777]] = 50, -50
    at, mean, low, high = charts._thin(steps, values)
    assert len(at) == charts.MAX_POINTS and high.max() == 50 and low.min() == -50
    assert np.isclose(np.average(mean), 1, atol=0.01) and (np.diff(at) > 0).all()
