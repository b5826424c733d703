"""Points and anchors of all levels."""

import numpy as np

from kdjax.boxes import priors


def test_grid_priors_covers_maps_that_do_not_divide():
    got = priors.grid_priors((20, 33), [8, 16], offset=0.5)
    assert got.dtype == np.float32 and got.shape == (3 * 5 + 2 * 3, 4)
    want = [
        [(x + 0.5) * s, (y + 0.5) * s, s, s] for s, h, w in ((8, 3, 5), (16, 2, 3)) for y in range(h) for x in range(w)
    ]
    np.testing.assert_array_equal(got, want)


def test_grid_anchors_have_their_area_and_shape():
    scales = priors.octave_scales(4, 3)
    got = priors.grid_anchors((16, 24), [8, 16], ratios=[0.5, 2.0], scales=scales)
    points = priors.grid_priors((16, 24), [8, 16]).repeat(6, axis=0)
    sizes = got[:, 2:] - got[:, :2]
    np.testing.assert_allclose((got[:, :2] + got[:, 2:]) / 2, points[:, :2], atol=1e-5)
    np.testing.assert_allclose(
        sizes[:, 1] / sizes[:, 0], np.tile(np.repeat([0.5, 2.0], 3), len(points) // 6), rtol=1e-5
    )
    np.testing.assert_allclose(np.sqrt(sizes.prod(1)) / points[:, 2], np.tile(scales, len(points) // 3), rtol=1e-5)
