"""StableHLO programs compute what the JAX model computes."""

import jax
import numpy as np
import pytest

from kdjax import cli
from kdjax.export import graphs
from kdjax.inference import load
from tests.support.models import read


@pytest.mark.slow
def test_stablehlo_is_the_jax_model(made, tmp_path, capsys):
    file = tmp_path / "model.stablehlo"
    assert cli.main(["export", f"--model={made / 'model'}", "--format=stablehlo", f"--out={file}", "--raw"]) == 0
    assert read(tmp_path / "model.stablehlo.json")["detector"] == "rtmdet_pico"
    exported = jax.export.deserialize(file.read_bytes())
    assert exported.platforms == ("cpu", "cuda", "tpu") and len(exported.out_avals) == 6
    loaded = load(made / "model")
    image = np.full((1, 64, 64, 3), 90, np.uint8)
    for exported_map, jax_map in zip(
        exported.call(image), jax.jit(lambda x: graphs.maps(loaded, x))(image), strict=True
    ):
        np.testing.assert_allclose(exported_map, jax_map, rtol=1e-4, atol=1e-4)
