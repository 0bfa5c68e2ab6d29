"""What kernels in few bits share: they are leaves that multiply, are stacked and cut, and let gradients through to x. All but nf4 against
NumPy float64."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm import config, registry
from jaxllm.parallel.rules import RULES
from jaxllm.transforms import affine, int8, leaf, nf4, quantized


def rounds(bits, group, **options):
    """Rounds to the nearest code of a grid."""
    return partial(affine.quantize, grid=affine.Grid(bits, group, **options))


MAKE = {
    "int8": int8.quantize,
    "int8_groups": rounds(8, 64, symmetric=False),
    "int4": rounds(4, 32),
    "int4_asymmetric": rounds(4, 32, symmetric=False, scale_dtype="float16"),
    "int4_ordered": rounds(4, 32, symmetric=False, ordered=True),
    "int3": rounds(3, 0),
    "int2": rounds(2, 64, scale_dtype="bfloat16"),
    "nf4": lambda kernel, inputs: nf4.quantize(kernel, inputs, True),
    "nf4_single": lambda kernel, inputs: nf4.quantize(kernel, inputs, False),
}
# spec, shape, inputs; the names of the axes are those of models/layers.py.
USES = {
    "down": ("BTF,FD->BTD", (128, 6), 1),
    "q": ("BTD,DHK->BTHK", (128, 2, 3), 1),
    "o": ("BTHK,HKD->BTD", (4, 32, 6), 2),
}
kinds = pytest.mark.parametrize("kind", MAKE)
uses = pytest.mark.parametrize("use", USES)


def numbers(shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def made(kind, use, seed=0):
    spec, shape, inputs = USES[use]
    x = numbers((2, 5, *shape[:inputs]), seed + 100)
    return spec, x, jax.jit(MAKE[kind], static_argnums=1)(numbers(shape, seed), inputs)


@kinds
@uses
@pytest.mark.parametrize(("dtype", "rtol"), [("float32", 1e-5), ("bfloat16", 2**-7), ("float16", 2**-9)])
def test_multiply_is_the_product_with_the_dense_kernel(kind, use, dtype, rtol):
    spec, x, kernel = made(kind, use)
    x = jnp.asarray(x, dtype)
    y, vjp = jax.vjp(lambda x: leaf.einsum(spec, x, kernel), x)
    dense = np.asarray(kernel.dense(), np.float64)
    assert (kernel.dense().dtype, kernel.shape, y.dtype) == ("float32", dense.shape, dtype)
    expected = np.einsum(spec, np.asarray(x, np.float64), dense)
    # Products of 128 numbers around 1: what rounds them is the dtype, at the size of the sums, around 11.
    np.testing.assert_allclose(np.asarray(y, np.float64), expected, rtol=rtol, atol=10 * rtol)
    dy = jnp.asarray(numbers(y.shape, 3), dtype)
    (dx,) = vjp(dy)
    x_axes, kernel_axes, result = spec.replace("->", ",").split(",")
    expected = np.einsum(f"{result},{kernel_axes}->{x_axes}", np.asarray(dy, np.float64), dense)
    assert dx.dtype == dtype
    np.testing.assert_allclose(np.asarray(dx, np.float64), expected, rtol=rtol, atol=10 * rtol)


@kinds
@pytest.mark.parametrize(("spec", "shape", "x_shape"), [("BTD,VD->BTV", (128, 6), (6,)), ("BTHK,HKD->BTD", (128, 4, 6), (128, 4))])
def test_int8_scales_of_axes_that_are_summed_over_are_applied_before(kind, spec, shape, x_shape):
    """A kernel whose first axis is an output, as in heads, and one whose second axis has scales of its own and is summed over."""
    kernel = MAKE[kind](numbers(shape), 1)
    x = numbers((2, 5, *x_shape), 1)
    expected = np.einsum(spec, x.astype(np.float64), np.asarray(kernel.dense(), np.float64))
    np.testing.assert_allclose(leaf.einsum(spec, x, kernel), expected, rtol=1e-5, atol=1e-6 * np.abs(expected).max())


def stack(*leaves):
    return jax.tree.map(lambda *arrays: jnp.stack(arrays), *leaves)


@kinds
@uses
def test_a_stack_is_a_leaf_and_so_is_each_of_its_layers(kind, use):
    spec, _, first = made(kind, use)
    second, inputs = made(kind, use, seed=1)[2], USES[use][2]
    both = stack(first, second)
    assert isinstance(both, quantized.Quantized) and both.shape == (2, *first.shape)
    np.testing.assert_array_equal(both.dense(), np.stack([first.dense(), second.dense()]))
    np.testing.assert_array_equal(jax.vmap(lambda leaf: leaf.dense())(both), both.dense())
    mapped = jax.vmap(lambda kernel: MAKE[kind](kernel, inputs))(jnp.stack([numbers(first.shape), numbers(first.shape, 1)]))
    assert jax.tree.structure(mapped) == jax.tree.structure(both)
    for one, other in zip(jax.tree.leaves(mapped), jax.tree.leaves(both), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6)
    slices = []
    jax.lax.scan(lambda carry, kernel: (slices.append((type(kernel), kernel.shape)), (carry, None))[1], 0, both)
    assert slices == [(type(first), first.shape)]
    part = jax.tree.map(lambda array: array[1:], both)
    assert part.shape == (1, *first.shape)


@kinds
@pytest.mark.parametrize("form", ["scan", "remat", "vmap"])
def test_gradients_go_through_layers(kind, form):
    """Of x through three layers, as with dense kernels."""
    layers = [MAKE[kind](numbers((128, 128), seed) / 11, 1) for seed in range(3)]
    x = numbers((2, 3, 128), 9)

    def loss(x, layers):
        def layer(x, kernel):
            return jnp.tanh(leaf.einsum("BTD,DF->BTF", x, kernel))

        if form == "scan":
            return jnp.sum(jax.lax.scan(lambda x, kernel: (layer(x, kernel), None), x, stack(*layers))[0] ** 2)
        for kernel in layers:
            x = jax.checkpoint(layer)(x, kernel) if form == "remat" else jax.vmap(layer, (1, None), 1)(x[:, None], kernel)[:, 0]
        return jnp.sum(x**2)

    found = jax.jit(jax.grad(loss))(x, layers)
    expected = jax.grad(loss)(x, [kernel.dense() for kernel in layers])
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@kinds
@pytest.mark.parametrize(("form", "differentiated"), [("scan", True), ("unrolled", True), ("unrolled", False)])
def test_one_dense_kernel_is_held_at_a_time(kind, form, differentiated):
    """Of eight layers; kept, or made before their turn, they would be eight. Activations are an eighth of a kernel a layer."""
    layers, width = 8, 256
    kernels = [MAKE[kind](numbers((width, width), seed), 1) for seed in range(layers)]

    def layer(x, kernel):
        return jnp.tanh(leaf.einsum("BTD,DF->BTF", x, kernel)), None

    def loss(x, kernels):
        if form == "scan":
            return jnp.sum(jax.lax.scan(layer, x, kernels)[0])
        for kernel in kernels:
            x, _ = layer(x, kernel)
        return jnp.sum(x)

    program = jax.jit(jax.grad(loss) if differentiated else loss)
    compiled = program.lower(numbers((1, 32, width)), stack(*kernels) if form == "scan" else kernels).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < (5 if differentiated else 4) * 4 * width**2


@kinds
def test_a_leaf_passes_through_jit_and_tree_functions_as_itself(kind):
    _, _, kernel = made(kind, "o")
    leaves, tree = jax.tree.flatten({"kernel": kernel})
    again = jax.tree.unflatten(tree, leaves)["kernel"]
    passed = jax.jit(lambda leaf: leaf)(kernel)
    assert type(again) is type(passed) is type(kernel) and isinstance(passed, quantized.Quantized)
    assert all(array.ndim == 3 for array in (kernel.codes, *leaves[1:2]))
    others = [MAKE[other](numbers((4, 32, 6)), 2) for other in MAKE if other != kind]
    assert all(jax.tree.structure(other) != jax.tree.structure(kernel) for other in others)


# Name of a transform, fields of config.quant, and what makes the same.
CONFIGURED = [
    ("int8", {}, int8.quantize),
    ("int8", {"group": 64, "symmetric": False}, rounds(8, 64, symmetric=False)),
    ("int8", {"group": -1, "ordered": True}, rounds(8, 0, ordered=True)),
    ("int8", {"activations": "int8"}, partial(int8.quantize, rounds=True)),
    ("int4", {}, rounds(4, 128)),
    ("int4", {"group": 64, "scale_dtype": "float16"}, rounds(4, 64, scale_dtype="float16")),
    ("int3", {"group": -1, "symmetric": False, "ordered": True}, rounds(3, 0, symmetric=False, ordered=True)),
    ("nf4", {"double": True}, partial(nf4.quantize, double=True)),
    ("nf4", {"double": False}, partial(nf4.quantize, double=False)),
]


@pytest.mark.parametrize(("name", "fields", "alone"), CONFIGURED)
@uses
def test_transforms_are_made_of_a_config_and_know_their_axes(name, fields, alone, use):
    settings = config.base()
    settings.quant.update(fields)
    transform = registry.resolve("transform", name)(settings)
    _, shape, inputs = USES[use]
    axes = {"down": ("mlp", "embed"), "q": ("embed", "heads", "head_dim"), "o": ("heads", "head_dim", "embed")}[use]
    kernel = transform.apply(jnp.asarray(numbers(shape)), inputs, jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, kernel, alone(numbers(shape), inputs))
    named = transform.axes(axes, inputs)
    assert (transform.targets, transform.adapts) == (settings.quant.targets, False)
    assert jax.tree.structure(named, is_leaf=lambda node: type(node) is tuple) == jax.tree.structure(kernel)
    assert named.codes == axes and kernel.form == name
    scales = named.absmax if name == "nf4" else named.scale
    assert scales == ("groups",) * inputs + axes[inputs:]
    for array, names in zip(jax.tree.leaves(kernel), jax.tree.leaves(named, is_leaf=lambda node: type(node) is tuple), strict=True):
        assert array.ndim == len(names) and all(axis in RULES for axis in names)


@pytest.mark.parametrize("kind", MAKE)
def test_quantizing_twice_is_refused(kind):
    with pytest.raises(ValueError, match=r"a kernel of type Int8 is to be quantized\.\n  Accepted: a dense kernel\.\n  .*change"):
        MAKE[kind](int8.quantize(numbers((128, 4)), 1), 1)


@pytest.mark.parametrize("use", USES)
def test_int8_is_the_nearest_of_255_steps(use):
    _, shape, inputs = USES[use]
    kernel = numbers(shape)
    kernel[..., 1] = 0
    found = jax.jit(int8.quantize, static_argnums=1)(kernel, inputs)
    scale = np.abs(kernel.astype(np.float64)).max(tuple(range(inputs)), keepdims=True) / 127
    assert found.scale.shape == (1,) * inputs + shape[inputs:] and found.codes.dtype == "int8" and found.scale.dtype == "float32"
    np.testing.assert_allclose(found.scale, scale, rtol=2e-7)
    np.testing.assert_array_equal(found.codes, np.rint(kernel / np.where(scale > 0, scale, 1)))
    assert np.all(np.abs(np.asarray(found.dense()) - kernel) <= scale / 2 * (1 + 1e-5))
    assert np.all(np.asarray(found.dense())[..., 1] == 0)


def test_int8_in_float16_does_not_overflow():
    """127 x 256 x 4 would; the product itself is 512."""
    kernel = int8.quantize(np.full((256, 2), 0.5, np.float32), 1)
    y = leaf.einsum("BTD,DF->BTF", jnp.full((1, 1, 256), 4, jnp.float16), kernel)
    np.testing.assert_allclose(np.asarray(y, np.float32), 512, rtol=2**-10)


@uses
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_int8_products_of_whole_numbers(use, dtype):
    """Each token is rounded with a scale of its own; the rest is exact. The gradient is that of the product without the rounding."""
    spec, shape, inputs = USES[use]
    kernel = int8.quantize(numbers(shape), inputs, rounds=True)
    x = jnp.asarray(numbers((2, 5, *shape[:inputs]), 7) * np.array([1, 30, 0, 1e-3, 1]).reshape(5, *(1,) * inputs), dtype)
    y, vjp = jax.vjp(jax.jit(lambda x: leaf.einsum(spec, x, kernel)), x)
    wide = np.asarray(x, np.float64)
    over = tuple(range(2, 2 + inputs))
    scale = np.abs(wide).max(over, keepdims=True).astype(np.float32).astype(np.float64) / 127
    codes = np.rint(wide / np.where(scale > 0, scale, 1))
    expected = np.einsum(spec, codes * scale, np.asarray(kernel.codes, np.float64) * np.asarray(kernel.scale, np.float64))
    largest = np.abs(expected).max(tuple(range(2, expected.ndim)), keepdims=True)
    # A code in the middle of two may fall to the other side: a step of one of the inputs.
    np.testing.assert_allclose(
        np.asarray(y, np.float64), expected, rtol=1e-5 if dtype == "float32" else 2**-8, atol=0.02 * largest.max()
    )
    assert np.all(np.abs(np.asarray(y, np.float64) - expected) <= 0.01 * largest + 1e-30)
    exact = np.einsum(spec, wide, np.asarray(kernel.dense(), np.float64))
    assert 1e-4 < np.abs(expected - exact).max() / np.abs(exact).max() < 0.02
    dy = jnp.asarray(numbers(y.shape, 3), dtype)
    plain = int8.quantize(numbers(shape), inputs)
    np.testing.assert_array_equal(vjp(dy)[0], jax.vjp(jax.jit(lambda x: leaf.einsum(spec, x, plain)), x)[1](dy)[0])


@pytest.mark.parametrize(
    ("shape", "inputs", "group"), [((128, 6), 1, 32), ((6, 32, 5), 2, 16), ((6, 32, 5), 2, 32), ((6, 32, 5), 2, 96)]
)
def test_int4_is_the_nearest_of_16_steps(shape, inputs, group):
    """Groups of the flattened inputs of each output, and codes that are laid out as the files of others have them."""
    kernel = numbers(shape)
    kernel.reshape(-1, shape[-1])[:group, 2] = 0
    matrix = kernel.astype(np.float64).reshape(-1, shape[-1])
    found = jax.jit(rounds(4, group), static_argnums=1)(kernel, inputs)
    largest = np.abs(matrix).reshape(-1, group, shape[-1]).max(1)
    np.testing.assert_allclose(np.asarray(found.scale).reshape(largest.shape), largest / 7.5, rtol=2e-7)
    wide = np.repeat(largest, group, 0)
    # Exact for the largest weight of a group: -7.5, which is rounded to the even -8, or 7.5.
    codes = np.clip(np.rint(matrix * 7.5 / np.where(wide > 0, wide, 1)), -8, 7) + 8
    packed = np.asarray(found.codes).reshape(-1, shape[-1])
    np.testing.assert_array_equal(packed, codes[::2] + 16 * codes[1::2])
    assert np.all(np.abs(np.asarray(found.dense()).reshape(matrix.shape) - matrix) <= wide / 15 * (1 + 1e-5))


def test_int4_words_are_those_of_gptq():
    """Codes 0 to 7 down the inputs are the little-endian word 0x76543210."""
    column = np.array([-7.5, -7, -6, -5, -4, -3, -2, -1], np.float32)
    found = rounds(4, 8)(column[:, None], 1)
    np.testing.assert_array_equal(found.scale, [[1]])
    assert np.asarray(found.codes)[:, 0].view("<i4") == 0x76543210


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("shape", "inputs", "group"), [((128, 6), 1, 32), ((4, 32, 5), 2, 16), ((4, 32, 5), 2, 0)])
@pytest.mark.parametrize(("symmetric", "scale_dtype"), [(False, "float32"), (False, "float16"), (True, "bfloat16")])
def test_codes_are_the_nearest_of_the_grid(bits, shape, inputs, group, symmetric, scale_dtype):
    """The scale in its own dtype decides; an asymmetric grid reaches from 0 or the lowest weight to 0 or the highest."""
    kernel = numbers(shape)
    kernel[..., 1], kernel[..., 2] = 0, np.abs(kernel[..., 2])
    grid = affine.Grid(bits, group, symmetric, scale_dtype=scale_dtype)
    found = jax.jit(lambda kernel: affine.quantize(kernel, inputs, grid))(kernel)
    matrix, codes = kernel.reshape(-1, shape[-1]).astype(np.float64), 2**bits
    groups = matrix.reshape(-1, group or len(matrix), shape[-1])
    low, high = np.minimum(groups.min(1), 0), np.maximum(groups.max(1), 0)
    if symmetric:
        high = np.maximum(high, -low)
        low = -high
    scale = ((high - low).astype(np.float32) / np.float32(codes - 1)).astype(scale_dtype)
    own = np.asarray(found.scale).reshape(scale.shape)
    # A compiler multiplies by 1 / (codes - 1), which is an ulp of float32 away.
    np.testing.assert_allclose(own.astype(np.float64), scale.astype(np.float64), rtol=2e-7 if scale_dtype == "float32" else 0)
    scale = own
    wide = np.where(scale > 0, scale.astype(np.float64), 1)
    zero = np.full(scale.shape, codes // 2) if symmetric else np.clip(np.rint(-low / wide), 0, codes - 1)
    assert (found.zero is None) == symmetric
    if not symmetric:
        np.testing.assert_array_equal(np.asarray(found.zero).reshape(zero.shape), zero)
    spread = [np.repeat(x, len(matrix) // len(x), 0) for x in (wide, zero)]
    steps = matrix / spread[0] * (1 + 2.0**-20 * symmetric)
    expected = np.clip(np.rint(steps) + spread[1], 0, codes - 1)
    dense = np.asarray(found.dense(), np.float64).reshape(matrix.shape)
    mine = np.rint(dense / spread[0]) + spread[1]
    # Where a weight lies in the middle of two steps, float32 may see it on the other side.
    assert np.mean(mine != expected) < 2e-3
    np.testing.assert_allclose(mine, expected, atol=1)
    assert np.all(
        np.abs(dense - np.clip(matrix, (0 - spread[1]) * spread[0], (codes - 1 - spread[1]) * spread[0])) <= spread[0] * 0.5001
    )
    assert np.all(dense[:, 1] == 0)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("axis", [-1, -2])
def test_codes_are_packed_as_a_stream_of_bits(bits, axis):
    """As Python's own integers have it: code k in the bits from k x bits on."""
    codes = np.random.default_rng(0).integers(0, 2**bits, (5, 16, 24)).astype(np.uint8)
    packed = np.moveaxis(np.asarray(quantized.pack(jnp.asarray(codes), axis, bits)), axis, -1).reshape(
        -1, codes.shape[axis] * bits // 8
    )
    rows = np.moveaxis(codes, axis, -1).reshape(-1, codes.shape[axis])
    for row, found in zip(rows[::7], packed[::7], strict=True):
        stream = sum(int(code) << index * bits for index, code in enumerate(row))
        assert int.from_bytes(found.tobytes(), "little") == stream
    again = quantized.unpack(quantized.pack(jnp.asarray(codes), axis, bits), axis, bits)
    np.testing.assert_array_equal(again, codes)


@pytest.mark.parametrize("inputs", [1, 2])
def test_groups_by_an_index(inputs):
    """Each input has the scale and the zero of its group, wherever it lies, and in a stack the layer's own."""
    rng = np.random.default_rng(0)
    shape, groups = {1: (16,), 2: (2, 8)}[inputs], [rng.permutation(np.repeat(np.arange(4), 4)) for _ in range(2)]
    codes = rng.integers(0, 16, (2, *shape, 3)).astype(np.uint8)
    scale, zero = rng.uniform(0.5, 1, (2, 4, 3)).astype(np.float32), rng.integers(0, 16, (2, 4, 3)).astype(np.uint8)
    grid = affine.Grid(4, 4, symmetric=False, ordered=True)
    layers = [
        affine.of_codes(*map(jnp.asarray, (codes[i], scale[i], zero[i])), inputs, grid, jnp.asarray(groups[i])) for i in range(2)
    ]
    expected = np.stack(
        [(codes[i].reshape(16, 3) - zero[i][groups[i]].astype(float)) * scale[i][groups[i]] for i in range(2)]
    ).reshape(codes.shape)
    np.testing.assert_array_equal(np.stack([each.dense() for each in layers]), expected.astype(np.float32))
    np.testing.assert_array_equal(stack(*layers).dense(), expected.astype(np.float32))


@pytest.mark.parametrize(
    ("bits", "shape", "inputs", "group", "accepted"),
    [
        (4, (24, 8), 1, 16, "2, 3, 4, 6, 8, 12, 24"),
        (4, (3, 4, 8), 2, 3, "2, 4, 12"),
        (4, (5, 8), 1, 5, "none, since 2 codes of 4 bits"),
        (3, (12, 8), 1, 4, "none, since 8 codes of 3 bits"),
        (8, (5, 8), 1, 2, "5"),
    ],
)
def test_groups_that_do_not_divide_are_refused(bits, shape, inputs, group, accepted):
    text = rf"quant.group = {group} does not cut the inputs .* of shape \({shape[0]}, .*\n  Accepted for it: {accepted}.*\n  Change"
    with pytest.raises(ValueError, match=text):
        rounds(bits, group)(np.ones(shape, np.float32), inputs)


@pytest.mark.parametrize(
    ("kind", "bits"),
    [
        ("int8", 8 + 32 / 4096),
        ("int8_groups", 8 + (32 + 8) / 64),
        ("int4", 4 + 32 / 32),
        ("int4_asymmetric", 4 + (16 + 8) / 32),
        ("int3", 3 + 32 / 4096),
        ("int2", 2 + 16 / 64),
    ],
)
def test_bits_a_weight(kind, bits):
    shapes = jax.eval_shape(lambda kernel: MAKE[kind](kernel, 1), jax.ShapeDtypeStruct((4096, 4096), jnp.float32))
    used = sum(array.size * array.dtype.itemsize for array in jax.tree.leaves(shapes))
    assert 8 * used / 4096**2 == pytest.approx(bits, abs=1e-4)
