"""The file format against its own library, and files that are not whole."""

import json
import tracemalloc
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from jaxllm.interop import safetensors

TENSORS = {
    "b": np.arange(6, dtype=np.float32).reshape(2, 3),
    "a": np.arange(4, dtype=np.float16),
    "c": np.array([[1.5]], ml_dtypes.bfloat16),
    "scalar": np.array(2.0, np.float32),
    "ids": np.arange(3),
    "empty": np.zeros((0, 4), np.float32),
}


def test_reads_what_the_library_writes(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "model.safetensors")
    files = safetensors.Files(safetensors.find(tmp_path))
    assert dict(files.shapes) == {name: tensor.shape for name, tensor in TENSORS.items()}
    assert {name: dtype for name, dtype in files.dtypes.items() if name in "abc"} == {
        "a": "float16",
        "b": "float32",
        "c": "bfloat16",
    }
    for name, tensor in TENSORS.items():
        if name != "ids":
            found = files.read(name)
            assert found.dtype == tensor.dtype
            np.testing.assert_array_equal(found, tensor)
    with pytest.raises(ValueError, match=r"tensor 'ids' in '.*model.safetensors' is stored as I64.\n  Accepted: F32, F16, BF16"):
        files.read("ids")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_library_reads_what_is_written(dtype: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    tensors = {name: rng.normal(size=shape).astype(np.float32) for name, shape in {"x": (3, 5), "y": (), "z": (7,)}.items()}
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    safetensors.write(tmp_path, shapes, tensors.__getitem__, dtype, 10**9)
    found = load_file(tmp_path / "model.safetensors")
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(found[name], tensor.astype(dtype))


def test_shards(tmp_path: Path) -> None:
    """Filled in order up to the limit; a tensor above the limit has a shard of its own."""
    tensors = {name: np.full(size, size, np.float32) for name, size in {"a": 2, "b": 3, "c": 9, "d": 1, "e": 4}.items()}
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    paths = safetensors.write(tmp_path, shapes, tensors.__getitem__, "float32", 20)
    assert [path.name for path in paths] == [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_parameters": 19, "total_size": 76}
    assert [index["weight_map"][name][10] for name in "abcde"] == ["1", "1", "2", "3", "3"]
    for name, file_name in index["weight_map"].items():
        with safe_open(tmp_path / file_name, "numpy") as file:
            assert file.metadata() == {"format": "pt"}
            np.testing.assert_array_equal(file.get_tensor(name), tensors[name])
    files = safetensors.Files(safetensors.find(tmp_path))
    assert all((files.read(name) == tensors[name]).all() for name in tensors)
    paths[1].unlink()
    with pytest.raises(ValueError, match=r"lacks 1 of the 3 files in model.safetensors.index.json: model-00002-of-00003"):
        safetensors.find(tmp_path)


def damage(path: Path, header: object, data: bytes = b"\0" * 24) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def entry(begin: int, end: int, shape: object = (6,), dtype: object = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("header", "words"),
    [
        (b"{not json", "its header is no JSON"),
        (b"\xff\xfe{}", "its header is no JSON"),
        ([1], "its header is a list"),
        ({"a": entry(0, 24), "b": entry(12, 36)}, "tensor 'b' begins at byte .*, where the one before ends"),
        ({"a": entry(4, 28)}, "tensor 'a' begins at byte"),
        ({"a": entry(0, 48, (12,))}, "its tensors end at byte .*, the file at"),
        ({"a": entry(0, 12, (3,))}, "its tensors end at byte .*, the file at"),
        ({"a": entry(0, 24, (5,))}, r"type F32 and shape \[5\] has 24 bytes"),
        ({"a": entry(0, 24, (-6,))}, "the entry of tensor 'a' is"),
        ({"a": entry(0, 24, (6.0,))}, "the entry of tensor 'a' is"),
        ({"a": entry(0, 24, None)}, "the entry of tensor 'a' is"),
        ({"a": {"dtype": "F32"}}, "the entry of tensor 'a' is"),
        ({"a": entry(0, 24, dtype="F33")}, "unknown type 'F33'"),
    ],
)
def test_damaged_headers(header: object, words: str, tmp_path: Path) -> None:
    damage(tmp_path / "model.safetensors", header)
    with pytest.raises(
        ValueError, match=rf"model.safetensors' is damaged or no safetensors file: .*{words}[\s\S]*\n  Accepted: a whole"
    ):
        safetensors.Files(safetensors.find(tmp_path))


def test_every_truncation_is_found(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": TENSORS["b"], "b": TENSORS["a"]}, path)
    whole = path.read_bytes()
    for length in (*range(12), len(whole) // 2, len(whole) - 8, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="is damaged or no safetensors file"):
            safetensors.Files([path])
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(ValueError, match=r"a Git LFS pointer is a small text file"):
        safetensors.Files([path])


def test_one_tensor_in_two_files(tmp_path: Path) -> None:
    for name in ("one", "two"):
        save_file({"a": TENSORS["b"]}, tmp_path / f"{name}.safetensors")
    with pytest.raises(ValueError, match=r"tensor 'a' is in one.safetensors and in two.safetensors"):
        safetensors.Files([tmp_path / "one.safetensors", tmp_path / "two.safetensors"])


@pytest.mark.parametrize("text", ["{", "[]", '{"weight_map": []}', '{"weight_map": {"a": 1}}'])
def test_a_damaged_index(text: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ValueError, match=r"model.safetensors.index.json' cannot be read[\s\S]*Accepted"):
        safetensors.find(tmp_path)


def test_an_index_may_not_point_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "other.safetensors").write_text("")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../other.safetensors"}}')
    with pytest.raises(ValueError, match="lacks 1 of the 1 files"):
        safetensors.find(tmp_path / "model")


def test_pickled_weights_are_refused_with_a_way_out(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"PK")
    with pytest.raises(
        ValueError, match=r"has no tensors in the safetensors format \(it has pytorch_model.bin\)[\s\S]*save_pretrained"
    ):
        safetensors.find(tmp_path)


def test_writing_holds_one_tensor(tmp_path: Path) -> None:
    shapes = {f"t{index}": (1024, 256) for index in range(16)}
    tracemalloc.start()
    try:
        safetensors.write(tmp_path, shapes, lambda name: np.ones(shapes[name], np.float32), "bfloat16", 3 << 20)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    # The tensor itself, and cast.
    assert peak_bytes < 2 * 1024 * 256 * 4
