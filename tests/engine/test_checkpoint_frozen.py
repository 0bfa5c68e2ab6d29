"""What training does not change is in a checkpoint directory once, belongs to every step in it, and may be of any leaf type."""

import dataclasses
import json
import resource
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_training as tiny
from checkpoint_states import assert_same, place, stacked, template

from jaxllm.engine.checkpoint import Checkpoints
from jaxllm.engine.record import CheckpointError, DamagedError
from jaxllm.engine.state import TrainState
from jaxllm.transforms import tree

LAYERS, WIDTH = 4, 16
ADAPTERS = ("/a", "/b", "norm/scale")
Tree = Any


@partial(jax.tree_util.register_dataclass, data_fields=("codes", "scale", "offset"), meta_fields=("kind",))
@dataclasses.dataclass(frozen=True)
class Packed:
    """A quantized kernel."""

    codes: Any
    scale: Any
    offset: Any
    kind: str


@partial(jax.tree_util.register_dataclass, data_fields=("base", "a", "b"), meta_fields=("rank",))
@dataclasses.dataclass(frozen=True)
class Adapted:
    """A kernel of which a part is frozen and a part is trained."""

    base: Any
    a: Any
    b: Any
    rank: int


def layer(seed: int) -> Tree:
    rng = np.random.default_rng(seed)
    base = Packed(
        jnp.asarray(rng.integers(0, 256, (WIDTH, 512)), jnp.uint8),
        jnp.asarray(rng.normal(size=(WIDTH, 8)), jnp.bfloat16),
        jnp.asarray(rng.integers(-128, 128, (WIDTH,)), jnp.int8),
        kind="nf4",
    )
    kernel = Adapted(base, jnp.asarray(rng.normal(size=(WIDTH, 2))), jnp.asarray(rng.normal(size=(2, 8))), rank=2)
    return {"q": {"kernel": kernel}, "norm": {"scale": jnp.asarray(rng.normal(size=WIDTH))}}


def make_state(seed: int = 0, frozen_layers: int | None = 0, *, step: int = 7) -> TrainState:
    """Unrolled. Embedding and `base` are frozen, and so is all of the first layers. None: nothing is frozen."""
    full = {
        "embed": {"tokens": jnp.cos(seed + jnp.arange(64.0 * WIDTH)).reshape(64, WIDTH)},
        "layers": [layer(10 * seed + i) for i in range(LAYERS)],
    }

    def is_trained(path: tuple[Any, ...]) -> bool:
        if frozen_layers is None:
            return True
        indices = [key.idx for key in path if isinstance(key, jax.tree_util.SequenceKey)]
        return tree.path_name(path).endswith(ADAPTERS) and not (indices and indices[0] < frozen_layers)

    params = jax.tree.map_with_path(lambda path, leaf: leaf if is_trained(path) else None, full)
    frozen = jax.tree.map_with_path(lambda path, leaf: None if is_trained(path) else leaf, full)
    counters = jnp.int32(0), jnp.int32(0)
    ema = jax.tree.map(lambda leaf: leaf + 1, params)
    return TrainState(jnp.int32(step), params, frozen, optax.adamw(1e-3).init(params), ema, None, *counters)


def whole(state: TrainState) -> Tree:
    return tree.combine(state.ema, state.frozen)


@pytest.fixture
def checkpoints(tmp_path: Path) -> Iterator[Checkpoints]:
    made = Checkpoints(tmp_path / "checkpoints", keep_last=3)
    yield made
    made.close()


def save(checkpoints: Checkpoints, *states: Tree) -> None:
    for state in states:
        checkpoints.save(int(state.step), state)
    checkpoints.wait()


def size_bytes(directory: Path) -> int:
    return sum(file.stat().st_size for file in directory.rglob("*") if file.is_file())


@pytest.mark.parametrize(
    ("frozen_layers", "form", "devices", "form_after", "devices_after"),
    [(0, list, 8, dict, 1), (0, dict, 2, list, 4), (0, list, 1, list, 8), (2, list, 4, list, 2), (1, list, 1, list, 8)],
)
def test_leaf_types_and_holes_to_any_mesh_and_form(
    checkpoints: Checkpoints, frozen_layers: int, form: type, devices: int, form_after: type, devices_after: int
) -> None:
    as_form = {list: lambda state: state, dict: stacked}
    before = place(as_form[form](make_state(0, frozen_layers)), devices)
    after = place(as_form[form_after](make_state(0, frozen_layers)), devices_after)
    save(checkpoints, before)
    # Equal structures: the leaf types, their kinds and ranks, and every hole.
    assert_same(checkpoints.restore(template(after)).tree, after)
    frozen, step = (json.loads((checkpoints.directory / name / "record.json").read_text()) for name in ("frozen", "7"))
    assert all(name.startswith("frozen/") for name in frozen["leaves"])
    assert not any(name.startswith("frozen/") for name in step["leaves"])
    assert {"frozen/embed/tokens", "frozen/layers/q/kernel/base/codes"} < set(frozen["leaves"])
    assert {"step", "params/layers/q/kernel/a", "opt_state/0/mu/layers/norm/scale"} < set(step["leaves"])
    assert frozen["leaves"]["frozen/layers/q/kernel/base/codes"][:2] == [[LAYERS, WIDTH, 512], "uint8"]
    if frozen_layers:
        trained = list(range(frozen_layers, LAYERS))
        assert step["leaves"]["params/layers/q/kernel/a"][0] == [len(trained), WIDTH, 2]
        assert step["leaves"]["params/layers/q/kernel/a"][3] == trained
        assert frozen["leaves"]["frozen/layers/q/kernel/a"][3] == list(range(frozen_layers))
    assert checkpoints.record(7).frozen is not None


@pytest.mark.parametrize("frozen_layers", [0, 1, 3])
def test_parameters_for_inference_are_put_together(checkpoints: Checkpoints, frozen_layers: int) -> None:
    state = make_state(0, frozen_layers)
    save(checkpoints, place(state, 8))
    for form in (whole(state), stacked(whole(state))):
        like = place(form, 2)
        assert_same(checkpoints.load_params(template(like)).tree, like)
    shorter = whole(state)
    shorter["layers"].pop()
    with pytest.raises(CheckpointError, match=r"from another model or another setup") as caught:
        checkpoints.load_params(template(place(shorter, 1)))
    held = ", ".join(map(str, range(frozen_layers, LAYERS)))
    said = f"ema/layers/norm/scale (layers {held} in the checkpoint, all layers here)" if frozen_layers else "model.layers"
    assert said in str(caught.value)


def test_layers_are_not_taken_for_others(checkpoints: Checkpoints) -> None:
    """As many are trained, of the same shapes, but not the same ones."""
    save(checkpoints, make_state(0, 2))
    mirrored = make_state(0, 2)
    for part in (mirrored.params, mirrored.frozen, mirrored.ema, mirrored.opt_state[0].mu, mirrored.opt_state[0].nu):
        part["layers"].reverse()
    with pytest.raises(CheckpointError) as caught:
        checkpoints.restore(template(mirrored))
    assert "params/layers/norm/scale (layers 2, 3 in the checkpoint, layers 0, 1 here)" in str(caught.value)


@pytest.mark.parametrize("form", [{"layers_as": "unrolled"}, {"layers_as": "scan"}], ids=str)
def test_states_of_models(checkpoints: Checkpoints, form: dict[str, str]) -> None:
    chosen = {f"model__{key}": value for key, value in form.items()} | {"train__trainable": ".*mlp.*", "train__ema_decay": 0.5}
    state = tiny.make(**chosen).create()
    save(checkpoints, state)
    for other in ({"parallel__data": 2, "parallel__fsdp": 2, "parallel__tensor": 2}, {"model__layers_as": "scan"}):
        training = tiny.make(**(chosen | other))
        restored = checkpoints.restore(training.abstract()).tree
        assert_same(restored, jax.device_put(training.create(), jax.tree.map(lambda like: like.sharding, training.abstract())))
        assert isinstance(restored, TrainState)


def test_it_is_on_the_disk_once(tmp_path: Path) -> None:
    state = make_state()
    expected = {
        part: sum(leaf.nbytes for leaf in jax.tree.leaves(value)) for part, value in (("frozen", state.frozen), ("all", state))
    }
    # File names, records and the metadata of the storage library; less than a tenth of the frozen tree.
    metadata_bytes = 16_000
    sizes = {}
    for count in (1, 3):
        checkpoints = Checkpoints(tmp_path / str(count), keep_last=9)
        save(checkpoints, *(dataclasses.replace(state, step=jnp.int32(step)) for step in range(count)))
        checkpoints.close()
        sizes[count] = size_bytes(checkpoints.directory)
        assert 0 <= size_bytes(checkpoints.directory / "frozen") - expected["frozen"] < metadata_bytes
    rest_bytes = expected["all"] - expected["frozen"]
    assert expected["frozen"] > 2 * metadata_bytes
    assert 0 <= (sizes[3] - sizes[1]) / 2 - rest_bytes < metadata_bytes
    assert 0 <= sizes[3] - (expected["frozen"] + 3 * rest_bytes) < 4 * metadata_bytes


def test_it_is_written_once_and_never_deleted(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep_last=1, keep_best=1)
    for step in range(1, 5):
        checkpoints.save(step, make_state(step=step), loss=float(step))
        checkpoints.wait()
        (tmp_path / "frozen" / "mark").touch()
    assert {path.name for path in tmp_path.iterdir()} == {"1", "4", "frozen"} and checkpoints.latest() == 4
    checkpoints.close()
    # A resumed run has verified it.
    resumed = Checkpoints(tmp_path)
    resumed.restore(jax.eval_shape(make_state))
    save(resumed, make_state(step=5))
    assert (tmp_path / "frozen" / "mark").exists() and resumed.steps() == [5]
    # One that has not writes it again.
    unaware = Checkpoints(tmp_path)
    save(unaware, make_state(step=6))
    assert not (tmp_path / "frozen" / "mark").exists()
    assert_same(unaware.restore(template(make_state())).tree, make_state(step=6))


def test_without_frozen_parameters_all_is_as_it_was(checkpoints: Checkpoints) -> None:
    save(checkpoints, make_state(0, None))
    assert [path.name for path in checkpoints.directory.iterdir()] == ["7"]
    assert set(json.loads((checkpoints.directory / "7" / "record.json").read_text())) == {
        *("step", "loss", "leaves", "meta", "files", "checksum")
    }
    assert not checkpoints.has_frozen()


def test_a_checkpoint_that_holds_it_itself_is_restored(checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch) -> None:
    """As they were written before; saving goes on in the new way."""
    monkeypatch.setattr("jaxllm.engine.checkpoint.FROZEN", "nothing has this name")
    save(checkpoints, make_state())
    monkeypatch.undo()
    assert [path.name for path in checkpoints.directory.iterdir()] == ["7"]
    resumed = Checkpoints(checkpoints.directory, keep_last=2)
    assert_same(resumed.restore(template(make_state())).tree, make_state())
    assert_same(resumed.load_params(template(whole(make_state()))).tree, whole(make_state()))
    save(resumed, make_state(step=8))
    assert resumed.steps() == [7, 8] and resumed.has_frozen()
    for step in (7, 8):
        assert_same(resumed.restore(template(make_state()), step).tree, make_state(step=step))


def flip_bit(folder: Path) -> None:
    """In the integers of one layer."""
    pattern = np.asarray(make_state().frozen["layers"][1]["q"]["kernel"].base.codes).tobytes()[:64]
    hits = [file for file in folder.rglob("d/*") if pattern in file.read_bytes()]
    assert hits
    for file in hits:
        content = bytearray(file.read_bytes())
        content[content.find(pattern) + 5] ^= 0x10
        file.write_bytes(content)


def delete_data(folder: Path) -> None:
    for file in folder.rglob("d/*"):
        file.unlink()


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (flip_bit, "the digest does not fit frozen/layers/q/kernel/base/codes"),
        (delete_data, " is missing"),
        (lambda folder: (folder / "record.json").unlink(), "its record (record.json) is not there"),
        (shutil.rmtree, "the folder is not there"),
    ],
    ids=["bit", "data", "record", "folder"],
)
def test_damage_hits_every_step(checkpoints: Checkpoints, damage: Callable[[Path], Any], named: str) -> None:
    save(checkpoints, make_state(step=1), make_state(step=2))
    damage(checkpoints.directory / "frozen")
    for attempt in (
        lambda: checkpoints.restore(template(make_state())),
        lambda: checkpoints.load_params(template(whole(make_state()))),
    ):
        with pytest.raises(DamagedError) as caught:
            attempt()
        text = str(caught.value)
        assert f"checkpoint {checkpoints.directory}/frozen is damaged: " in text and named in text
        assert "Nothing was loaded.\n  Accepted: this folder as it was written. All checkpoints of the run share it" in text
        assert text.endswith("\n  Bring it back from a copy, or start again in another --workdir.")
        # No other step is better.
        assert "Step 1" not in text and "delete" not in text
    # A run that still has it in memory writes it again.
    save(checkpoints, make_state(step=3))
    for step in (1, 2, 3):
        assert_same(checkpoints.restore(template(make_state()), step).tree, make_state(step=step))


def test_a_damaged_step_still_names_an_older_one(checkpoints: Checkpoints) -> None:
    save(checkpoints, make_state(step=1), make_state(step=2))
    delete_data(checkpoints.directory / "2")
    with pytest.raises(DamagedError, match=r"(?s)/2 is damaged.*Step 1 was read and verified just now"):
        checkpoints.restore(template(make_state()))


def test_no_step_is_restored_with_another_frozen_tree(checkpoints: Checkpoints, tmp_path: Path) -> None:
    save(checkpoints, make_state())
    other = Checkpoints(tmp_path / "other")
    save(other, make_state(1))
    shutil.rmtree(checkpoints.directory / "frozen")
    shutil.copytree(other.directory / "frozen", checkpoints.directory / "frozen")
    for attempt in (
        lambda: checkpoints.restore(template(make_state())),
        lambda: checkpoints.load_params(template(whole(make_state()))),
    ):
        with pytest.raises(CheckpointError) as caught:
            attempt()
        assert not isinstance(caught.value, DamagedError)
        first, accepted, change = str(caught.value).split("\n")
        assert f"checkpoint {checkpoints.directory}/7 belongs to other frozen parameters than those in" in first
        assert "  Accepted: the folder 'frozen' that the same run wrote (fingerprint " in accepted
        assert "  Bring it back from a copy of the run" in change


def test_the_rest_is_restored_beside_a_frozen_tree_in_memory(checkpoints: Checkpoints) -> None:
    """It is not read, not written again, and has to be the one that the step was saved with."""
    save(checkpoints, make_state(step=1))
    (checkpoints.directory / "frozen" / "mark").touch()
    shutil.rmtree(checkpoints.directory / "frozen" / "state")
    rest = dataclasses.replace(template(make_state()), frozen=None)
    resumed = Checkpoints(checkpoints.directory)
    restored = resumed.restore(rest, frozen=make_state().frozen).tree
    assert_same(dataclasses.replace(restored, frozen=make_state().frozen), make_state(step=1))
    save(resumed, make_state(step=2))
    assert (checkpoints.directory / "frozen" / "mark").exists() and resumed.steps() == [2]
    with pytest.raises(
        CheckpointError, match=r"/2 belongs to other frozen parameters than those in memory.*\n  Accepted: .*\n  Go on"
    ):
        resumed.restore(rest, frozen=make_state(1).frozen)


def test_another_frozen_tree_takes_no_steps_from_the_first(checkpoints: Checkpoints) -> None:
    save(checkpoints, make_state(step=1))
    before = {path: path.stat().st_mtime_ns for path in checkpoints.directory.rglob("*")}
    with pytest.raises(CheckpointError) as caught:
        checkpoints.save(2, make_state(1))
    assert len(str(caught.value).split("\n")) == 3 and "(of step 1)" in str(caught.value)
    assert {path: path.stat().st_mtime_ns for path in checkpoints.directory.rglob("*")} == before
    # One that no step belongs to, as a run leaves it that is killed before its first step is committed, is replaced.
    shutil.rmtree(checkpoints.directory / "1")
    save(checkpoints, make_state(1))
    assert_same(checkpoints.restore(template(make_state())).tree, make_state(1))


def test_donation_after_save_changes_nothing(checkpoints: Checkpoints) -> None:
    overwrite = jax.jit(lambda state: jax.tree.map(lambda leaf: leaf * 0 - 1, state), donate_argnums=0)
    for form in (stacked, lambda state: state):
        state = place(form(make_state()), 8)
        like = template(state)
        checkpoints.save(7, state)
        overwrite(state)
        checkpoints.wait()
        assert_same(checkpoints.restore(like).tree, place(form(make_state()), 8))
        shutil.rmtree(checkpoints.directory)


def test_a_full_disk_leaves_nothing_behind(checkpoints: Checkpoints) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    # Enough for a step, and for no frozen tree.
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**14, limits[1]))
    try:
        checkpoints.save(7, make_state())
        with pytest.raises(CheckpointError, match="(?s)checkpoint of step 7 could not be written.*File too large.*Intact: none"):
            checkpoints.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (checkpoints.steps(), checkpoints.incomplete(), checkpoints.has_frozen()) == ([], [], False)
    save(checkpoints, make_state())
    assert_same(checkpoints.restore(template(make_state())).tree, make_state())


def test_what_a_killed_save_left_is_removed(checkpoints: Checkpoints) -> None:
    save(checkpoints, make_state())
    for name in ("frozen.saving", "frozen.saving.orbax-checkpoint-tmp", "frozen.deleting"):
        shutil.copytree(checkpoints.directory / "frozen", checkpoints.directory / name)
    assert checkpoints.restore(template(make_state())).step == 7
    assert checkpoints.remove_incomplete() == ["frozen.deleting", "frozen.saving", "frozen.saving.orbax-checkpoint-tmp"]
    assert {path.name for path in checkpoints.directory.iterdir()} == {"7", "frozen"}
