"""HGNetv2 and the blocks of D-FINE's encoder. Whole networks are compared with the peers by the golden replay."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax.detectors import api, gelan, hgnetv2
from tests.support.arrays import quick_jit

STAGES = [hgnetv2.Stage(4, 8, blocks, layers) for blocks, layers in ((1, 2), (1, 1), (2, 1), (1, 1))]


@functools.cache
def module(affine=True, levels=3, frozen_stem=False, frozen_norm=False):
    settings = dict(affine=affine, levels=levels, frozen_stem=frozen_stem, frozen_norm=frozen_norm)
    return api.pure(lambda: hgnetv2.HGNetv2((4, 6), STAGES, **settings))


def random(shapes, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.uniform(0.2, 1, leaf.shape), jnp.float32), shapes)


@pytest.mark.parametrize("levels", [2, 3])
def test_maps_of_the_last_stages(levels):
    net = module(levels=levels)
    image = jax.ShapeDtypeStruct((1, 64, 96, 3), jnp.float32)
    call = lambda params, stats, x: net.call(params, stats, hgnetv2.HGNetv2.__call__, x, False)  # noqa: E731
    maps, _ = jax.eval_shape(call, *net.shapes, image)
    assert [m.shape for m in maps] == [(1, 64 // s, 96 // s, 8) for s in (8, 16, 32)[-levels:]]


def test_learned_scales_follow_activations_alone():
    paths = api.flatten(module().shapes[0])
    last = "stages/2/blocks/0/layers/0"
    assert f"{last}/conv2/activation/factor" in paths and "embedder/stem2a/activation/bias" in paths
    assert not any("downsample/activation" in path or "conv1/activation" in path for path in paths)
    assert not any("activation" in path for path in api.flatten(module(affine=False).shapes[0]))


def test_even_windows_see_zeros_at_the_right_and_at_the_bottom():
    """The stem in NumPy, with norms that change nothing."""
    rng = np.random.default_rng(0)
    net = api.pure(lambda: hgnetv2.Stem(4, 6, conv=hgnetv2._conv_of(True, True)))
    params, stats = net.init(jax.random.key(0))
    params = api.unflatten(
        {
            k: v if "/bn/" in k else jnp.asarray(rng.normal(size=v.shape), jnp.float32)
            for k, v in api.flatten(params).items()
        }
    )
    x = rng.normal(size=(1, 8, 12, 3)).astype(np.float32)
    found, _ = net.call(params, stats, hgnetv2.Stem.__call__, jnp.asarray(x), False)

    def conv(name, x, stride=1):
        own = jax.tree.map(np.asarray, params[name])
        kernel = own["conv"]["kernel"]
        side, low = len(kernel), (len(kernel) - 1) // 2
        x = np.pad(x, ((low, low), (low, low), (0, 0)))
        rows, columns = ((extent - side) // stride + 1 for extent in x.shape[:2])
        y = np.array(
            [
                [np.tensordot(x[r * stride :][:side, c * stride :][:, :side], kernel, 3) for c in range(columns)]
                for r in range(rows)
            ]
        )
        return np.maximum(y / np.sqrt(1 + 1e-5), 0) * own["activation"]["factor"] + own["activation"]["bias"]

    pad = lambda x: np.pad(x, ((0, 1), (0, 1), (0, 0)))  # noqa: E731
    y = pad(conv("stem1", x[0], 2))
    pooled = np.max([y[:-1, :-1], y[1:, :-1], y[:-1, 1:], y[1:, 1:]], 0)
    y = np.concatenate([pooled, conv("stem2b", pad(conv("stem2a", y)))], -1)
    want = conv("stem4", conv("stem3", y, 2))
    np.testing.assert_allclose(found[0], want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("part", ["nothing", "stem", "norms"])
def test_frozen_parts_get_no_gradient_and_keep_their_statistics(part):
    net = module(levels=2, frozen_stem=part == "stem", frozen_norm=part == "norms")
    params, stats = random(net.shapes[0]), random(net.shapes[1])
    x = jax.random.normal(jax.random.key(0), (2, 32, 32, 3))

    def total(params):
        maps, new = net.call(params, stats, hgnetv2.HGNetv2.__call__, x, True)
        return sum(jnp.sum(m * jnp.sin(jnp.arange(m.size, dtype=jnp.float32)).reshape(m.shape)) for m in maps), new

    gradient, new = quick_jit(jax.grad(total, has_aux=True))(params)
    is_frozen = {"nothing": lambda path: False, "stem": lambda path: path.startswith("embedder/"),
                 "norms": lambda path: "/bn/" in path}[part]  # fmt: skip
    for path, leaf in api.flatten(gradient).items():
        if is_frozen(path):
            assert not leaf.any(), path
        elif path.endswith("/kernel"):  # a shift that the next norm takes away again has no gradient
            assert leaf.any(), path
    moved = api.flatten(jax.tree.map(lambda a, b: bool((a != b).any()), stats, new))
    assert all(moved[path] != is_frozen(path) for path in moved)


def test_a_fusion_block_joins_both_halves_and_what_becomes_of_the_second():
    net = api.pure(lambda: gelan.gelan_fusion(0.75, 1).block(16, 8))
    params, stats = net.init(jax.random.key(0))
    assert params["csp_rep1"]["conv1"]["conv"]["kernel"].shape == (1, 1, 8, 3)
    assert params["conv4"]["conv"]["kernel"].shape == (1, 1, 22, 8)
    x = jax.random.normal(jax.random.key(1), (1, 4, 4, 16))

    def inside(block):
        halves = block.conv1(x, False)
        one = block.conv2(block.csp_rep1(halves[..., 8:], False), False)
        two = block.conv3(block.csp_rep2(one, False), False)
        return block(x, False), block.conv4(jnp.concatenate([halves[..., :8], halves[..., 8:], one, two], -1), False)

    found, want = net.call(params, stats, inside)[0]
    np.testing.assert_allclose(found, want, rtol=1e-5)


def test_widths_of_fusion_blocks_are_rounded_down_first():
    """dfine_n: 0.34 * 128 / 2 = 21.76 becomes 21."""
    block = api.pure(lambda: gelan.gelan_fusion(0.34, 2).block(256, 128)).shapes[0]
    assert block["conv2"]["conv"]["kernel"].shape == (3, 3, 21, 21) and len(block["csp_rep2"]["bottlenecks"]) == 2
