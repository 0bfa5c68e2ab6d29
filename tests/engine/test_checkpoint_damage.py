"""Damaged checkpoints: an error that names what is wrong and the way out, and nothing else is called damage."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoint_states import assert_same, damage_codes, data_files, flip_bit, make_state, place, template
from orbax.checkpoint import v1 as ocp

from jaxllm.engine.checkpoint import Checkpoints
from jaxllm.engine.record import CheckpointError, DamagedError


@pytest.fixture
def checkpoints(tmp_path: Path) -> Iterator[Checkpoints]:
    made = Checkpoints(tmp_path / "checkpoints", keep_last=3)
    yield made
    made.close()


def damage_embedding(checkpoints: Checkpoints, step: int) -> None:
    flip_bit(checkpoints, step, np.asarray(make_state()["params"]["embed"]["tokens"]).tobytes()[:8])


def truncate(checkpoints: Checkpoints, step: int) -> None:
    for path in data_files(checkpoints, step):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def delete_data(checkpoints: Checkpoints, step: int) -> None:
    for path in data_files(checkpoints, step):
        path.unlink()


def delete_manifest(checkpoints: Checkpoints, step: int) -> None:
    (checkpoints.directory / str(step) / "state" / "manifest.ocdbt").unlink()


def delete_record(checkpoints: Checkpoints, step: int) -> None:
    (checkpoints.directory / str(step) / "record.json").unlink()


def cut_record(checkpoints: Checkpoints, step: int) -> None:
    path = checkpoints.directory / str(step) / "record.json"
    path.write_text(path.read_text()[:200])


def alter_record(checkpoints: Checkpoints, step: int) -> None:
    path = checkpoints.directory / str(step) / "record.json"
    assert '"loss": 2.5' in path.read_text()
    path.write_text(path.read_text().replace('"loss": 2.5', '"loss": 1.5'))


def alter_metadata(checkpoints: Checkpoints, step: int) -> None:
    """What the storage library says of the arrays: its size stays, and it is no JSON any more."""
    path = checkpoints.directory / str(step) / "state" / "_METADATA"
    path.write_bytes(b"[" + path.read_bytes()[1:])


def empty_folder(checkpoints: Checkpoints, step: int) -> None:
    shutil.rmtree(checkpoints.directory / str(step))
    (checkpoints.directory / str(step)).mkdir()


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (damage_embedding, "the digest does not fit params/embed/tokens"),
        (damage_codes, "the digest does not fit codes"),
        (truncate, "bytes instead of "),
        (delete_data, " is missing"),
        (delete_manifest, "its file state/manifest.ocdbt is missing"),
        (delete_record, "its record (record.json) is not there"),
        (cut_record, "its record (record.json) cannot be read"),
        (alter_record, "it was altered"),
        (alter_metadata, "JSONDecodeError"),
        (empty_folder, "its record (record.json) is not there"),
    ],
    ids=["bit", "other_bit", "truncated", "data", "manifest", "record", "cut_record", "altered_record", "metadata", "empty"],
)
def test_damage_is_an_error_that_names_the_way_out(
    checkpoints: Checkpoints, damage: Callable[[Checkpoints, int], None], named: str
) -> None:
    state = place(make_state(), 4)
    for step in (100, 200):
        checkpoints.save(step, state, loss=2.5)
    checkpoints.wait()
    damage(checkpoints, 200)
    with pytest.raises(DamagedError) as caught:
        checkpoints.restore(template(state))
    text = str(caught.value)
    assert f"checkpoint {checkpoints.directory}/200 is damaged: " in text and named in text
    assert "Step 100 was read and verified just now" in text and f"delete {checkpoints.directory}/200" in text
    # Nothing falls back by itself, and the advice works.
    assert checkpoints.latest() == 200
    assert checkpoints.restore(template(state), step=100).step == 100
    damage(checkpoints, 100)
    with pytest.raises(DamagedError, match="no older good one"):
        checkpoints.restore(template(state))
    # Training can write over what is damaged.
    checkpoints.save(200, state)
    checkpoints.wait()
    assert_same(checkpoints.restore(template(state)).tree, state)


def test_what_the_storage_library_reports_is_passed_on_in_short(checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints.save(1, {"w": jnp.float32(0)})
    checkpoints.wait()
    like = {"w": jax.ShapeDtypeStruct((), jnp.float32)}

    def fail(error: Exception) -> Callable[..., None]:
        def load(*_: Any) -> None:
            raise RuntimeError("incompatible handler") from error

        return load

    monkeypatch.setattr(
        "orbax.checkpoint.v1.load_checkpointables", fail(ValueError("DATA_LOSS: bad\n crc [tensorstore_spec='...']"))
    )
    with pytest.raises(DamagedError, match=r"1 is damaged: ValueError: DATA_LOSS: bad crc\. Nothing was loaded"):
        checkpoints.restore(like)
    # Too little memory is no damage, nor is what may not be read, or needs a package.
    for outside in (ValueError("RESOURCE_EXHAUSTED: 80 GiB"), ValueError("PERMISSION_DENIED: x"), ModuleNotFoundError("no zstd")):
        monkeypatch.setattr("orbax.checkpoint.v1.load_checkpointables", fail(outside))
        with pytest.raises(RuntimeError, match="incompatible handler"):
            checkpoints.restore(like)
    monkeypatch.setattr(Path, "read_text", lambda path, **_: (_ for _ in ()).throw(PermissionError(13, "Permission denied", path)))
    with pytest.raises(PermissionError):
        checkpoints.restore(like)


def test_what_comes_of_the_wish_and_not_of_the_files_is_not_called_damage(
    checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a sharding that does not divide an array: each array can be read, and all that are wanted cannot."""
    state = place(make_state(), 1)
    checkpoints.save(1, state)
    checkpoints.wait()
    load = ocp.load_checkpointables

    def refuse(path: Path, wanted: Any) -> Any:
        if len(jax.tree.leaves(wanted)) > 1:
            raise ValueError("axis 0 is partitioned 8 times")
        return load(path, wanted)

    monkeypatch.setattr("orbax.checkpoint.v1.load_checkpointables", refuse)
    with pytest.raises(ValueError, match="partitioned 8 times") as caught:
        checkpoints.restore(template(state))
    assert not isinstance(caught.value, CheckpointError)
    # With the same wish what is damaged is called so.
    damage_codes(checkpoints, 1)
    with pytest.raises(DamagedError, match=r"1 is damaged: ValueError: axis 0 is partitioned 8 times"):
        checkpoints.restore(template(state))


def test_a_checkpoint_that_its_run_deletes_meanwhile_is_not_called_damaged(
    checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (1, 2):
        checkpoints.save(step, {"w": jnp.float32(0)})
    checkpoints.wait()

    def vanish(path: Path, *_: Any) -> None:
        shutil.rmtree(path)
        raise FileNotFoundError(path)

    monkeypatch.setattr("orbax.checkpoint.v1.load_checkpointables", vanish)
    with pytest.raises(CheckpointError, match="(?s)2 was deleted while it was read.*Accepted: one that is there: 1. Run the same"):
        checkpoints.load_params({}, step=2)
