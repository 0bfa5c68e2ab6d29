"""NF4 against the bytes of bitsandbytes (golden/nf4, made by golden/make_nf4.py), and against the papers in NumPy float64."""

from pathlib import Path
from statistics import NormalDist

import jax
import numpy as np
import pytest

from jaxllm.transforms import nf4

GOLDEN = np.load(Path(__file__).resolve().parent.parent / "golden" / "nf4" / "expected.npz")
CASES = ("random", "long", "zeros", "outliers", "equal", "nothing", "ties")
# [in, out], q [in, heads, head_dim], and o [heads, head_dim, out] where a block is a part of a head, a head, or two heads.
LAYOUTS = {"down": lambda n, out: ((n, out), 1), "q": lambda n, out: ((n, 2, out // 2), 1)}
LAYOUTS |= {f"o_{k}": lambda n, out, k=k: ((n // k, k, out), 2) for k in (32, 64, 128)}
# Of a weight with 64 inputs there is no head of 128.
USES = [(case, layout) for case in CASES for layout in LAYOUTS if (case, layout) not in (("nothing", "o_128"), ("ties", "o_128"))]
quantize = jax.jit(nf4.quantize, static_argnums=(1, 2))
read = jax.jit(lambda leaf: (leaf.scale(), leaf.dense()))


def golden(case):
    return {name.split("/")[1]: GOLDEN[name] for name in GOLDEN.files if name.startswith(f"{case}/")}


def kernel_of(weight, layout):
    """(the kernel whose torch weight this is, its inputs), in an array that owns its memory."""
    shape, inputs = LAYOUTS[layout](weight.shape[1], weight.shape[0])
    return np.ascontiguousarray(weight.T).reshape(shape), inputs


def torch_order(array, inputs):
    """[inputs..., outputs...] as the flat [out, in] of bitsandbytes."""
    return np.asarray(array).reshape(int(np.prod(array.shape[:inputs])), -1).T.ravel()


def codes_of(leaf, inputs):
    """One code a byte, in the axes of the kernel."""
    packed = np.asarray(leaf.codes)
    pairs = np.stack([packed >> 4, packed & 15], inputs)
    return pairs.reshape(*packed.shape[: inputs - 1], 2 * packed.shape[inputs - 1], *packed.shape[inputs:])


def packed_of(leaf, inputs):
    """The bytes of bitsandbytes: [n / 2, 1]."""
    flat = torch_order(codes_of(leaf, inputs), inputs)
    return (flat[::2] << 4 | flat[1::2])[:, None]


def test_tables_are_those_of_bitsandbytes():
    np.testing.assert_array_equal(nf4.TABLE, GOLDEN["table"])
    np.testing.assert_array_equal(nf4.DYNAMIC, GOLDEN["dynamic"])


def test_the_table_is_made_of_quantiles():
    """Dettmers et al. 2023, section 3: eight and nine numbers, equally far apart in probability, from 1 - (1/32 + 1/30) / 2 to a half."""
    last = 1 - (1 / 32 + 1 / 30) / 2

    def quantiles(count):
        return [NormalDist().inv_cdf(last + (0.5 - last) * index / (count - 1)) for index in range(count - 1)]

    values = np.sort([0, *quantiles(9), *(-x for x in quantiles(8))])
    np.testing.assert_allclose(nf4.TABLE, values / values.max(), atol=2e-7)


def test_dynamic_numbers_are_middles_of_the_decades():
    middles = [10.0 ** (d - 6) * (0.1 + 0.9 * (part + 0.5) / 2**d) for d in range(7) for part in range(2**d)]
    np.testing.assert_allclose(nf4.DYNAMIC, sorted([0, 1, *middles, *(-x for x in middles)]), rtol=3e-7)


@pytest.mark.parametrize(("case", "layout"), USES)
def test_bytes_are_those_of_bitsandbytes(case, layout):
    """Its bytes, but for the mean of the scales: two sums of floats in different orders, each within an ulp or so of the true one."""
    found = golden(case)
    kernel, inputs = kernel_of(found["weight"], layout)
    leaf = quantize(kernel, inputs, True)
    assert (leaf.codes.dtype, leaf.absmax.dtype, leaf.nested.dtype, leaf.offset.shape) == ("uint8", "uint8", "float32", ())
    assert leaf.shape == kernel.shape and leaf.codes.ndim == leaf.absmax.ndim == kernel.ndim
    np.testing.assert_array_equal(packed_of(leaf, inputs), found["packed"])
    np.testing.assert_array_equal(torch_order(leaf.absmax, inputs), found["absmax"])
    np.testing.assert_allclose(leaf.offset, found["offset"], rtol=2.0**-22)
    # The offset is subtracted and added again: two ulps of the largest scale.
    largest = found["single_absmax"].max()
    np.testing.assert_allclose(leaf.nested, found["nested"], rtol=0, atol=2.0**-22 * largest)
    np.testing.assert_allclose(
        torch_order(jax.jit(lambda leaf: leaf.scale())(leaf), inputs), found["scale"], atol=2.0**-21 * largest
    )
    dense = torch_order(jax.jit(lambda leaf: leaf.dense())(leaf), inputs)
    np.testing.assert_allclose(dense, found["dense"].ravel(), rtol=2.0**-24, atol=2.0**-21 * largest)


@pytest.mark.parametrize("case", ["random", "zeros", "ties"])
@pytest.mark.parametrize("layout", ["down", "q", "o_32", "o_64"])
def test_without_double_quantization_every_bit_is_equal(case, layout):
    found = golden(case)
    kernel, inputs = kernel_of(found["weight"], layout)
    leaf = quantize(kernel, inputs, False)
    np.testing.assert_array_equal(packed_of(leaf, inputs), found["packed"])
    np.testing.assert_array_equal(torch_order(leaf.absmax, inputs), found["single_absmax"])
    np.testing.assert_array_equal(torch_order(read(leaf)[1], inputs), found["single_dense"].ravel())
    assert (leaf.nested, leaf.offset) == (None, None)


def test_codes_are_the_nearest():
    """In float64, where no weight is within an ulp of a middle."""
    weight = np.random.default_rng(1).normal(size=(256, 12)).astype(np.float32)
    leaf = quantize(weight, 1, False)
    share = weight.reshape(4, 64, 12).astype(np.float64) / np.abs(weight.reshape(4, 64, 12)).max(1, keepdims=True)
    far = np.abs(share[..., None] - nf4.TABLE.astype(np.float64))
    assert np.diff(np.sort(far, -1)[..., :2]).min() > 1e-6
    np.testing.assert_array_equal(codes_of(leaf, 1), far.argmin(-1).reshape(256, 12))


def test_scales_are_within_half_a_step_of_the_dynamic_map():
    """And a step of the table in which bitsandbytes looks them up: within half of one a code is the neighbour, twice that farther away."""
    weight = np.random.default_rng(2).normal(size=(1024, 40)).astype(np.float32) * np.linspace(0.1, 5, 40, dtype=np.float32)
    leaf = quantize(weight, 1, True)
    absmax = np.abs(weight.astype(np.float64)).reshape(16, 64, 40).max(1).T.ravel()
    rest = absmax - absmax.mean()
    blocks = np.pad(rest, (0, -rest.size % 256)).reshape(-1, 256)
    nested = np.abs(blocks).max(1, keepdims=True)
    np.testing.assert_allclose(leaf.nested, nested[:, 0], rtol=1e-6)
    nearest = np.abs((blocks / nested).reshape(-1, 1) - nf4.DYNAMIC).min(1)[: absmax.size]
    found = (torch_order(leaf.scale(), 1) - absmax.mean()) / np.repeat(nested, 256)[: absmax.size]
    assert np.all(np.abs(found - rest / np.repeat(nested, 256)[: absmax.size]) <= nearest + 2.0**-15 + 1e-6)


@pytest.mark.parametrize("double", [True, False])
def test_errors_stay_below_half_the_widest_gap(double):
    """Of the table, times the scale; and the scale is wrong by half a gap of the dynamic map, 0.9 / 64 / 2, times its own scale."""
    weight = np.random.default_rng(3).normal(size=(512, 48)).astype(np.float32)
    leaf = quantize(weight, 1, double)
    absmax = np.abs(weight).reshape(8, 64, 48).max(1, keepdims=True)
    bound = np.diff(nf4.TABLE.astype(np.float64)).max() / 2 * absmax
    bound = bound + (0.9 / 128 + 2.0**-15) * (np.abs(absmax - absmax.mean()).max() if double else 0)
    assert np.all(np.abs(np.asarray(leaf.dense()) - weight).reshape(8, 64, 48) <= bound * (1 + 1e-5))


@pytest.mark.parametrize(("double", "bits"), [(True, 4 + 8 / 64 + 32 / (64 * 256)), (False, 4.5)])
def test_bits_a_weight(double, bits):
    shapes = jax.eval_shape(lambda kernel: nf4.quantize(kernel, 1, double), jax.ShapeDtypeStruct((4096, 4096), np.float32))
    used = 8 * sum(array.size * array.dtype.itemsize for array in jax.tree.leaves(shapes)) / 4096**2
    assert used == pytest.approx(bits, abs=1e-5)  # the offset is a float a kernel
    assert f"{used:.3f}" == ("4.127" if double else "4.500")


@pytest.mark.parametrize(("shape", "inputs"), [((96, 8), 1), ((3, 32, 8), 2), ((2, 48, 8), 2), ((64, 1, 8), 2)])
def test_inputs_that_do_not_divide_are_refused(shape, inputs):
    with pytest.raises(ValueError, match=r"nf4 cannot cut the inputs .* into blocks of 64\.\n  Accepted: .*\n  Change the sizes"):
        nf4.quantize(np.ones(shape, np.float32), inputs, True)
