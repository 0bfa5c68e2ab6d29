"""Checkpoints: exact, whole or not there at all, readable on any mesh, and honest about damage."""

import logging
import resource
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from orbax.checkpoint import v1 as ocp

from jaxllm.engine.checkpoint import Checkpoints
from jaxllm.engine.record import CheckpointError, DamagedError
from jaxllm.transforms import tree

LAYERS, WIDTH, WORDS = 3, 8, 320
Tree = Any


@pytest.fixture
def checkpoints(tmp_path: Path) -> Iterator[Checkpoints]:
    made = Checkpoints(tmp_path / "checkpoints", keep_last=3)
    yield made
    made.close()


def layer(index: int) -> Tree:
    return {
        "attention": {"q": {"kernel": jnp.sin(jnp.arange(WIDTH * 16.0) + index).reshape(WIDTH, 4, 4)}},
        "norm": {"scale": jnp.full((WIDTH,), 1.5 + index, jnp.bfloat16)},
    }


def make_state(seed: int = 0) -> Tree:
    """A state as training has it: unrolled layers, a frozen part with holes, an optimizer's state, scalars, several dtypes."""
    full = {
        "embed": {"tokens": jnp.cos(seed + jnp.arange(1.0 * WORDS * WIDTH)).reshape(WORDS, WIDTH)},
        "layers": [layer(seed + i) for i in range(LAYERS)],
    }
    params, frozen = tree.split(full, {"embed/tokens", "layers/attention/q/kernel"})
    codes = jnp.arange(1023).astype(jnp.int8)
    return {
        "step": jnp.int32(7),
        "params": params,
        "frozen": frozen,
        "opt_state": optax.adamw(1e-3).init(params),
        "codes": codes,
        "none": None,
    }


def stacked(state: Tree) -> Tree:
    return jax.jit(tree.stack_layers)(state)


def place(state: Tree, devices: int) -> Tree:
    """Spread over a mesh of so many devices: the last axis where it divides, whatever the rank."""
    mesh = jax.make_mesh((devices,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:devices])

    def one(leaf: jax.Array) -> jax.Array:
        split = leaf.ndim > 0 and leaf.shape[-1] % devices == 0
        spec = PartitionSpec(*[None] * (leaf.ndim - 1), "fsdp") if split else PartitionSpec()
        return jax.device_put(leaf, NamedSharding(mesh, spec))

    return jax.tree.map(one, state)


def template(state: Tree) -> Tree:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state)


def assert_same(one: Tree, other: Tree) -> None:
    """Same structure, dtypes, shardings and bits."""
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert a.dtype == b.dtype and a.sharding.is_equivalent_to(b.sharding, a.ndim)
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


@pytest.mark.parametrize(
    ("form", "devices", "form_after", "devices_after"),
    [
        (list, 8, list, 1),
        (list, 8, dict, 4),
        (dict, 8, list, 2),
        (dict, 1, dict, 8),
        (list, 1, list, 8),
    ],
)
def test_any_mesh_and_form_to_any_other(
    checkpoints: Checkpoints, form: type, devices: int, form_after: type, devices_after: int
) -> None:
    before, after = make_state(), make_state()
    before = place(before if form is list else stacked(before), devices)
    after = place(after if form_after is list else stacked(after), devices_after)
    checkpoints.save(7, before, meta={"seed": 3, "versions": {"jax": "x"}})
    checkpoints.wait()
    restored = checkpoints.restore(template(after))
    assert (restored.step, restored.meta) == (7, {"seed": 3, "versions": {"jax": "x"}})
    assert_same(restored.tree, after)
    assert checkpoints.record(7).leaves == record_of(make_state(), checkpoints.directory.parent / "other").leaves


def record_of(state: Tree, directory: Path) -> Any:
    other = Checkpoints(directory)
    other.save(7, state)
    other.close()
    return other.record(7)


def test_without_shardings_the_first_device_is_taken(checkpoints: Checkpoints) -> None:
    checkpoints.save(7, place(make_state(), 8))
    checkpoints.wait()
    assert_same(checkpoints.restore(jax.eval_shape(make_state)).tree, jax.device_put(make_state(), jax.devices()[0]))


@pytest.mark.parametrize(("form", "devices"), [(list, 1), (dict, 1), (list, 8), (dict, 8)])
def test_donation_after_save_changes_nothing(tmp_path: Path, form: type, devices: int) -> None:
    def make(scale: float) -> Tree:
        big = [{"w": scale * jnp.arange(2.0**18)} for _ in range(2)]
        return place({"layers": big if form is list else tree.stack_layers(big), "step": jnp.int32(0)}, devices)

    overwrite = jax.jit(lambda state: jax.tree.map(lambda leaf: leaf * 0 - 1, state), donate_argnums=0)
    checkpoints = Checkpoints(tmp_path, keep_last=9)
    for repeat in range(1, 6):
        state = make(repeat)
        checkpoints.save(repeat, state)
        for _ in range(3):
            state = overwrite(state)
    checkpoints.close()
    for repeat in range(1, 6):
        # restore() compares with digests that were taken before the call returned; the values are compared besides.
        assert_same(checkpoints.restore(template(make(repeat)), repeat).tree, make(repeat))


def test_the_last_and_the_best_are_kept(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep_last=2, keep_best=2)
    losses = {1: 5.0, 2: 3.0, 3: float("nan"), 4: None, 5: 3.5, 6: 4.0, 7: 3.0, 8: None}
    expected = {1: [1], 2: [1, 2], 3: [1, 2, 3], 4: [1, 2, 3, 4], 5: [2, 4, 5], 6: [2, 5, 6], 7: [2, 6, 7], 8: [2, 7, 8]}
    for step, loss in losses.items():
        assert checkpoints.save(step, {"w": jnp.float32(step)}, loss=None if loss is None else np.float32(loss)) > 0
        checkpoints.wait()
        assert checkpoints.steps() == expected[step]
    assert (checkpoints.latest(), checkpoints.record(2).loss, checkpoints.record(8).loss) == (8, 3.0, None)
    checkpoints.close()
    assert Checkpoints(tmp_path).steps() == [2, 7, 8] and Checkpoints(tmp_path / "none").latest() is None


def test_the_best_is_the_newest_of_equals_and_never_one_without_a_loss(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep_last=1, keep_best=1)
    expected = {1: [1], 2: [2], 3: [3], 4: [3, 4]}
    for step, loss in {1: float("nan"), 2: 3.0, 3: 3.0, 4: 5.0}.items():
        checkpoints.save(step, {"w": jnp.float32(step)}, loss=loss)
        checkpoints.wait()
        assert checkpoints.steps() == expected[step]


def test_the_same_state_is_not_written_twice_and_another_one_replaces_it(checkpoints: Checkpoints) -> None:
    like = {"w": jax.ShapeDtypeStruct((), jnp.float32)}
    for value, kept in [(1.0, False), (1.0, True), (2.0, False)]:
        checkpoints.save(5, {"w": jnp.float32(value)})
        checkpoints.wait()
        assert (checkpoints.directory / "5" / "mark").exists() is kept
        (checkpoints.directory / "5" / "mark").touch()
        assert checkpoints.restore(like).tree["w"] == value
    assert [path.name for path in checkpoints.directory.iterdir()] == ["5"]
    # Another process has to verify what it finds before it trusts it.
    for verify in (False, True):
        (checkpoints.directory / "5" / "mark").touch()
        other = Checkpoints(checkpoints.directory)
        if verify:
            other.restore(like)
        other.save(5, {"w": jnp.float32(2.0)})
        other.close()
        assert (checkpoints.directory / "5" / "mark").exists() is verify


def test_another_model_is_refused_before_anything_is_loaded(checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints.save(1, make_state())
    checkpoints.wait()
    state = make_state()
    for part in ("params", "frozen"):
        state[part]["layers"].pop()
    monkeypatch.setattr("orbax.checkpoint.v1.load_checkpointables", None)
    with pytest.raises(CheckpointError) as caught:
        checkpoints.restore(template(state))
    for words in (
        f"checkpoint {checkpoints.directory}/1 is from another model or another setup; nothing was loaded",
        "params/layers/attention/q/kernel ([3, 8, 4, 4] in the checkpoint, [2, 8, 4, 4] here)",
        "likely different: model.layers.",
        "Set it back, or use another --workdir",
    ):
        assert words in str(caught.value)


def combined(state: Tree) -> Tree:
    return tree.combine(state["params"], state["frozen"])


@pytest.mark.parametrize("with_average", [False, True])
def test_parameters_alone_for_inference(checkpoints: Checkpoints, with_average: bool) -> None:
    state = make_state()
    if with_average:
        state["ema"] = jax.tree.map(lambda leaf: leaf * 2, state["params"])
    checkpoints.save(7, place(state, 8), meta={"tokenizer": "abc"})
    checkpoints.wait()
    damage_codes(checkpoints, 7)
    expected = place(combined({**state, "params": state.get("ema", state["params"])}), 2)
    for form in (expected, stacked(expected)):
        restored = checkpoints.load_params(template(form))
        assert (restored.step, restored.meta) == (7, {"tokenizer": "abc"})
        assert_same(restored.tree, form)
    del expected["embed"]
    with pytest.raises(CheckpointError, match=r"only in the checkpoint: params/embed/tokens"):
        checkpoints.load_params(template(expected))


def data_files(checkpoints: Checkpoints, step: int) -> list[Path]:
    return sorted(path for path in (checkpoints.directory / str(step)).rglob("d/*") if path.stat().st_size)


def flip_bit(checkpoints: Checkpoints, step: int, pattern: bytes) -> None:
    """Flips the lowest bit of the first element of an array, in every file that holds it."""
    found = 0
    for path in data_files(checkpoints, step):
        content = bytearray(path.read_bytes())
        where = content.find(pattern)
        if where >= 0:
            content[where] ^= 1
            path.write_bytes(content)
            found += 1
    assert found


def damage_embedding(checkpoints: Checkpoints, step: int) -> None:
    flip_bit(checkpoints, step, np.asarray(make_state()["params"]["embed"]["tokens"]).tobytes()[:8])


def damage_codes(checkpoints: Checkpoints, step: int) -> None:
    """Something that is not a model parameter."""
    flip_bit(checkpoints, step, np.asarray(make_state()["codes"]).tobytes())


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


def test_an_unfinished_save_is_named_and_never_read(checkpoints: Checkpoints, caplog: pytest.LogCaptureFixture) -> None:
    state = {"w": jnp.arange(3.0)}
    checkpoints.save(3, state)
    checkpoints.wait()
    for name in ("4.saving.orbax-checkpoint-tmp", "2.deleting"):
        shutil.copytree(checkpoints.directory / "3", checkpoints.directory / name)
    assert (checkpoints.steps(), checkpoints.latest()) == ([3], 3)
    with caplog.at_level(logging.WARNING):
        assert checkpoints.restore(template(state)).step == 3
    assert "never completed: 2.deleting, 4.saving.orbax-checkpoint-tmp" in caplog.text
    assert checkpoints.remove_incomplete() == ["2.deleting", "4.saving.orbax-checkpoint-tmp"]
    assert [path.name for path in checkpoints.directory.iterdir()] == ["3"]


def test_a_step_that_is_not_there(checkpoints: Checkpoints) -> None:
    like = {"w": jax.ShapeDtypeStruct((), jnp.float32)}
    with pytest.raises(CheckpointError, match=r"(?s)no checkpoint in .*Accepted: a run that has saved at least one"):
        checkpoints.restore(like)
    for step in (1, 2):
        checkpoints.save(step, {"w": jnp.float32(step)})
    checkpoints.wait()
    with pytest.raises(CheckpointError, match=r"(?s)no checkpoint of step 3 .*Accepted: 1, 2\.\n  Ask for one"):
        checkpoints.restore(like, step=3)


def test_a_full_disk_surfaces_later_and_older_checkpoints_survive(checkpoints: Checkpoints) -> None:
    state, small = {"w": jnp.arange(2.0**18)}, {"w": jnp.arange(4.0)}
    checkpoints.save(1, state)
    checkpoints.wait()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    # A write past this size fails as one on a full disk does: in the background, inside the storage library.
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, limits[1]))
    try:
        checkpoints.save(2, state)
        with pytest.raises(CheckpointError) as caught:
            checkpoints.save(3, small)
        for words in ("checkpoint of step 2 could not be written", "File too large", "MiB are free", "Intact: 1.", "Make room"):
            assert words in str(caught.value)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (checkpoints.steps(), checkpoints.incomplete()) == ([1], [])
    checkpoints.save(2, state)
    checkpoints.wait()
    assert_same(checkpoints.restore(template(state)).tree, state)
