"""What the tools that made the formats store, and what they make of it themselves (tests/golden/make_packed.py)."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from jaxllm.interop import family
from jaxllm.interop.packed import bitsandbytes, formats, gptq
from jaxllm.interop.packed.codes import Codes

EXPECTED = np.load(Path(__file__).resolve().parents[2] / "golden" / "packed" / "expected.npz")
SETTINGS = json.loads(str(EXPECTED["settings"]))


def found(case: str, path: Path) -> formats.Found:
    given = family.Settings({"quantization_config": SETTINGS[case]}, "config.json")
    result = formats.identify(path, given)
    assert result is not None
    return result


def parts(case: str) -> dict[str, np.ndarray]:
    names = [name for name in EXPECTED.files if name.startswith(f"{case}/")]
    return {name.removeprefix(f"{case}/"): EXPECTED[name] for name in names if not name.endswith("/dense")}


def stored(x: np.ndarray, dtype: np.dtype) -> np.ndarray:
    return x.astype(dtype).astype(np.float32)


@pytest.mark.parametrize("case", SETTINGS)
def test_reading_gives_their_weights(case: str, tmp_path: Path) -> None:
    """Bit for bit, rounded as they round: once, to the type of the scales."""
    format, settings = found(case, tmp_path)
    codes = format.read("x", parts(case), settings)
    expected = EXPECTED[f"{case}/dense"]
    assert codes.dense().dtype == np.float32
    dtype = np.dtype(ml_dtypes.bfloat16) if case == "ct_int" else expected.dtype
    if case == "int8":
        # It multiplies by 1/127, rounded, in place of dividing.
        np.testing.assert_allclose(codes.dense(), expected, rtol=2e-7)
    else:
        np.testing.assert_array_equal(stored(codes.dense(), dtype), expected.astype(np.float32))
    assert format.shape("x", parts(case), settings) == expected.shape == codes.codes.shape


@pytest.mark.parametrize("case", [case for case in SETTINGS if case not in ("fp4", "int8", "ct_one_scale")])
def test_writing_gives_their_bytes(case: str, tmp_path: Path) -> None:
    format, settings = found(case, tmp_path)
    expected = parts(case)
    codes = format.read("x", expected, settings)
    written = format.write(codes, settings)
    assert set(written) == set(expected)
    for name, array in expected.items():
        if name.startswith(bitsandbytes.STATE):
            assert json.loads(written[name].tobytes()) == json.loads(array.tobytes())
        else:
            np.testing.assert_array_equal(written[name], array, err_msg=name)
            assert written[name].dtype == array.dtype


@pytest.mark.parametrize("case", ["gptq", "gptq_8"])
@pytest.mark.parametrize("named", ["gptq", "gptq_v2"])
def test_a_symmetric_file_of_either_version_under_either_name(case: str, named: str, tmp_path: Path) -> None:
    """Files that say "gptq" and hold the zeros of the second version are in use."""
    _, settings = found(case, tmp_path)
    first = parts(case)
    codes = gptq.read("x", first, settings)
    second = gptq.write(codes, settings._replace(format="gptq_v2"))
    middle = {4: -2004318072, 8: -2139062144}[settings.bits]
    assert (second["qzeros"] == middle).all() and not (first["qzeros"] == middle).any()
    for tensors in (first, second):
        read = gptq.read("x", tensors, settings._replace(format=named))
        assert read.zero is None
        np.testing.assert_array_equal(read.dense(), codes.dense())


def test_zeros_of_both_versions(tmp_path: Path) -> None:
    """Also a zero of 0, which borrows from its neighbour in a word of the first version."""
    _, settings = found("gptq_zeros", tmp_path)
    codes = gptq.read("x", parts("gptq_zeros"), settings)
    assert isinstance(codes, Codes) and codes.zero is not None
    zero = codes.zero.copy()
    zero[:8, 0] = [0, 5, 0, 0, 15, 1, 2, 0]
    changed = codes._replace(zero=zero)
    one, two = (gptq.write(changed, settings._replace(format=name)) for name in ("gptq", "gptq_v2"))
    assert int(two["qzeros"].view(np.uint32)[0, 0]) == 0x021F0050
    assert int(one["qzeros"].view(np.uint32)[0, 0]) == 0x021F0050 - 0x11111111 + 2**32
    for name, tensors in (("gptq", one), ("gptq_v2", two)):
        np.testing.assert_array_equal(gptq.read("x", tensors, settings._replace(format=name)).zero, zero)
