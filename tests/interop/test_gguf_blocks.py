"""Storage types, against loops over the block layouts that ggml-common.h defines (quantized types of llama.cpp), written here."""

from collections.abc import Callable
from pathlib import Path

import gguf
import ml_dtypes
import numpy as np
import pytest
import tiny_gguf

from jaxllm.interop import gguf_file


def half(raw: bytes) -> float:
    return float(np.frombuffer(raw, np.float16)[0])


def q8_0(raw: bytes) -> list[float]:
    return [half(raw[:2]) * q for q in np.frombuffer(raw[2:], np.int8).tolist()]


def q4_0(raw: bytes) -> list[float]:
    d, qs = half(raw[:2]), raw[2:]
    return [d * ((q & 15) - 8) for q in qs] + [d * ((q >> 4) - 8) for q in qs]


def q4_1(raw: bytes) -> list[float]:
    d, m, qs = half(raw[:2]), half(raw[2:4]), raw[4:]
    return [d * (q & 15) + m for q in qs] + [d * (q >> 4) + m for q in qs]


def fifth(raw: bytes, index: int) -> int:
    return (int.from_bytes(raw, "little") >> index & 1) << 4


def q5_0(raw: bytes) -> list[float]:
    d, qh, qs = half(raw[:2]), raw[2:6], raw[6:]
    low = [d * (((q & 15) | fifth(qh, i)) - 16) for i, q in enumerate(qs)]
    return low + [d * (((q >> 4) | fifth(qh, i + 16)) - 16) for i, q in enumerate(qs)]


def q5_1(raw: bytes) -> list[float]:
    d, m, qh, qs = half(raw[:2]), half(raw[2:4]), raw[4:8], raw[8:]
    low = [d * ((q & 15) | fifth(qh, i)) + m for i, q in enumerate(qs)]
    return low + [d * ((q >> 4) | fifth(qh, i + 16)) + m for i, q in enumerate(qs)]


def q2_k(raw: bytes) -> list[float]:
    scales, qs, d, dmin = raw[:16], raw[16:80], half(raw[80:82]), half(raw[82:84])
    out = []
    for index in range(256):
        chunk, rest = divmod(index, 128)
        shift, place = divmod(rest, 32)
        scale = scales[index // 16]
        out.append(d * (scale & 15) * (qs[32 * chunk + place] >> 2 * shift & 3) - dmin * (scale >> 4))
    return out


def q3_k(raw: bytes) -> list[float]:
    hmask, qs, packed, d = raw[:32], raw[32:96], raw[96:108], half(raw[108:110])
    low = [packed[j] & 15 if j < 8 else packed[j - 8] >> 4 for j in range(16)]
    scales = [(low[j] | (packed[8 + j % 4] >> 2 * (j // 4) & 3) << 4) - 32 for j in range(16)]
    out = []
    for index in range(256):
        chunk, rest = divmod(index, 128)
        shift, place = divmod(rest, 32)
        q = (qs[32 * chunk + place] >> 2 * shift & 3) - (0 if hmask[place] >> (4 * chunk + shift) & 1 else 4)
        out.append(d * scales[index // 16] * q)
    return out


def six_bits(packed: bytes, j: int) -> tuple[int, int]:
    """Scale and minimum of group j of Q4_K and Q5_K."""
    if j < 4:
        return packed[j] & 63, packed[j + 4] & 63
    return packed[j + 4] & 15 | packed[j - 4] >> 6 << 4, packed[j + 4] >> 4 | packed[j] >> 6 << 4


def q4_k(raw: bytes) -> list[float]:
    d, dmin, packed, qs = half(raw[:2]), half(raw[2:4]), raw[4:16], raw[16:]
    out = []
    for index in range(256):
        group, place = divmod(index, 32)
        scale, low = six_bits(packed, group)
        q = qs[32 * (group // 2) + place] >> 4 * (group % 2) & 15
        out.append(d * scale * q - dmin * low)
    return out


def q5_k(raw: bytes) -> list[float]:
    d, dmin, packed, qh, qs = half(raw[:2]), half(raw[2:4]), raw[4:16], raw[16:48], raw[48:]
    out = []
    for index in range(256):
        group, place = divmod(index, 32)
        scale, low = six_bits(packed, group)
        q = qs[32 * (group // 2) + place] >> 4 * (group % 2) & 15 | (qh[place] >> group & 1) << 4
        out.append(d * scale * q - dmin * low)
    return out


def q6_k(raw: bytes) -> list[float]:
    ql, qh, scales, d = raw[:128], raw[128:192], np.frombuffer(raw[192:208], np.int8).tolist(), half(raw[208:])
    out = []
    for index in range(256):
        chunk, rest = divmod(index, 128)
        quarter, place = divmod(rest, 32)
        low = ql[64 * chunk + 32 * (quarter % 2) + place] >> 4 * (quarter // 2) & 15
        q = (low | (qh[32 * chunk + place] >> 2 * quarter & 3) << 4) - 32
        out.append(d * scales[8 * chunk + 2 * quarter + place // 16] * q)
    return out


# Storage type -> (numbers a block, bytes a block, where its float16 scales are, loop).
BLOCKS: dict[str, tuple[int, int, tuple[int, ...], Callable[[bytes], list[float]]]] = {
    "Q8_0": (32, 34, (0,), q8_0),
    "Q4_0": (32, 18, (0,), q4_0),
    "Q4_1": (32, 20, (0, 2), q4_1),
    "Q5_0": (32, 22, (0,), q5_0),
    "Q5_1": (32, 24, (0, 2), q5_1),
    "Q2_K": (256, 84, (80, 82), q2_k),
    "Q3_K": (256, 110, (108,), q3_k),
    "Q4_K": (256, 144, (0, 2), q4_k),
    "Q5_K": (256, 176, (0, 2), q5_k),
    "Q6_K": (256, 210, (208,), q6_k),
}


def random_blocks(kind: str, rows: int, blocks: int) -> np.ndarray:
    """Valid blocks of random bits: uint8 [rows, blocks * bytes]."""
    _, size, halves, _ = BLOCKS[kind]
    rng = np.random.default_rng(7)
    raw = rng.integers(0, 256, (rows, blocks, size), np.uint8)
    for place in halves:
        raw[..., place : place + 2] = rng.uniform(-0.1, 0.1, (rows, blocks, 1)).astype(np.float16).view(np.uint8)
    return raw.reshape(rows, -1)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> gguf_file.File:
    """One tensor of each type, 3 rows of 512 numbers."""
    path: Path = tmp_path_factory.mktemp("gguf") / "blocks.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    for kind, (count, *_) in BLOCKS.items():
        writer.add_tensor(kind, random_blocks(kind, 3, 512 // count), raw_dtype=gguf.GGMLQuantizationType[kind])
    for kind, dtype in (("F32", np.float32), ("F16", np.float16), ("BF16", ml_dtypes.bfloat16)):
        array = floats(dtype)
        raw = array.view(np.uint8) if kind == "BF16" else array
        writer.add_tensor(kind, raw, raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return gguf_file.read(path)


def floats(dtype: type) -> np.ndarray:
    return np.random.default_rng(3).normal(size=(3, 512)).astype(np.float32).astype(dtype)


@pytest.mark.parametrize("kind", BLOCKS)
def test_blocks(file: gguf_file.File, kind: str) -> None:
    """The loops compute in float64, the package in float32: a few roundings of numbers up to 0.1 * 63 * 31."""
    count, size, _, loop = BLOCKS[kind]
    raw = random_blocks(kind, 3, 512 // count)
    expected = np.array([value for block in raw.reshape(-1, size) for value in loop(block.tobytes())]).reshape(3, 512)
    found = file.tensors[kind].load()
    assert (found.dtype, found.shape) == (np.float32, (3, 512))
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize(("kind", "dtype"), [("F32", np.float32), ("F16", np.float16), ("BF16", ml_dtypes.bfloat16)])
def test_floats_stay_as_they_are(file: gguf_file.File, kind: str, dtype: type) -> None:
    found = file.tensors[kind].load()
    assert found.dtype == dtype
    np.testing.assert_array_equal(found, floats(dtype))
    assert found.flags.writeable, "a copy, not the file"


def test_metadata_are_those_of_the_package(tmp_path: Path) -> None:
    """Every kind of value, against the reader of the package gguf."""
    writer = gguf.GGUFWriter(tmp_path / "values.gguf", "llama")
    adders = ["uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64", "float32", "float64"]
    for adder in adders:
        getattr(writer, f"add_{adder}")(f"a.{adder}", 1 if adder[0] == "u" else -2)
    writer.add_bool("a.bool", True)
    writer.add_string("a.text", "Grüße\n🙂")
    for name, values in {"texts": ["", "é", "a" * 300], "floats": [0.5, -1.0], "flags": [True, False], "ints": [1, 2, 3]}.items():
        writer.add_array(f"a.{name}", values)
    writer.add_custom_alignment(1024)
    writer.add_tensor("one", np.arange(5, dtype=np.float32))
    writer.add_tensor("two", np.arange(6, dtype=np.float32).reshape(2, 3))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    reader = gguf.GGUFReader(tmp_path / "values.gguf")
    expected = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    file = gguf_file.read(tmp_path / "values.gguf")
    assert file.values == expected
    assert len(expected) > len(adders) + 5
    np.testing.assert_array_equal(file.tensors["one"].load(), np.arange(5))
    np.testing.assert_array_equal(file.tensors["two"].load(), np.arange(6).reshape(2, 3))


def tiny(path: Path) -> Path:
    weights = tiny_gguf.tensors(np.random.default_rng(0))
    return tiny_gguf.write(path, weights, tiny_gguf.model_values() | tiny_gguf.tokenizer_values())


def test_a_file_cut_short_is_explained_wherever_it_ends(tmp_path: Path) -> None:
    whole = tiny(tmp_path / "whole.gguf").read_bytes()
    cut = tmp_path / "cut.gguf"
    for size in [*range(8, 2000, 97), *range(2000, len(whole), 9973), len(whole) - 64]:
        cut.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"cut.gguf' is cut short or damaged: [\s\S]*\n  Accepted: a whole GGUF file"):
            gguf_file.read(cut)


def test_metadata_of_random_bytes_never_hang_or_crash(tmp_path: Path) -> None:
    """Sizes that are damaged ask for more than there is; nothing but ValueError comes out."""
    whole = bytearray(tiny(tmp_path / "whole.gguf").read_bytes())
    rng = np.random.default_rng(1)
    for _ in range(60):
        changed = bytearray(whole)
        for place in rng.integers(8, 6000, 4):
            changed[place] = rng.integers(0, 256)
        (tmp_path / "changed.gguf").write_bytes(changed)
        try:
            gguf_file.read(tmp_path / "changed.gguf")
        except ValueError as error:
            assert "\n  Accepted: " in str(error), error


@pytest.mark.parametrize(
    ("head", "words"),
    [
        (b"", "is not a GGUF file: it begins with b''"),
        (b"version https://git-lfs", "is not a GGUF file: it begins with b'vers'"),
        (b"GGUF\1\0\0\0", "is GGUF version 1"),
        (b"GGUF\0\0\0\3", "is big-endian"),
    ],
)
def test_what_is_no_gguf_file_is_named(tmp_path: Path, head: bytes, words: str) -> None:
    (tmp_path / "model.gguf").write_bytes(head)
    with pytest.raises(ValueError, match=rf"model.gguf' {words}[\s\S]*\n  Accepted: a GGUF file of version 2 or 3"):
        gguf_file.read(tmp_path / "model.gguf")
    with pytest.raises(ValueError, match="no GGUF file at 'nowhere.gguf'"):
        gguf_file.read("nowhere.gguf")


def test_types_that_cannot_be_read_and_parts_are_named(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "types.gguf", "llama")
    writer.add_tensor("blk.0.attn_q.weight", np.zeros((2, 136), np.uint8), raw_dtype=gguf.GGMLQuantizationType.IQ4_XS)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ValueError, match=r"stores blk.0.attn_q.weight as IQ4_XS.\n  Accepted: F32, F16[\s\S]*The nearest is Q4_"):
        gguf_file.read(tmp_path / "types.gguf")
    values = tiny_gguf.model_values() | {"split.count": 3, "split.no": 1}
    tiny_gguf.write(tmp_path / "part.gguf", tiny_gguf.tensors(np.random.default_rng(0)), values)
    with pytest.raises(ValueError, match=r"is part 2 of 3.\n  Accepted[\s\S]*llama-gguf-split --merge"):
        gguf_file.read(tmp_path / "part.gguf")
