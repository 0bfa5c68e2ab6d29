"""Checkpoints: exact, whole or not there at all, readable on any mesh, and honest about damage."""

import logging
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoint_states import Tree, assert_same, damage_codes, make_state, place, stacked, template

from jaxllm.engine.checkpoint import Checkpoints
from jaxllm.engine.record import CheckpointError
from jaxllm.transforms import tree


@pytest.fixture
def checkpoints(tmp_path: Path) -> Iterator[Checkpoints]:
    made = Checkpoints(tmp_path / "checkpoints", keep_last=3)
    yield made
    made.close()


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
