"""Replay rows in a batch: how many, which, where they stand, and what prepare makes of their source."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from corpus import Lines, document, texts
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import ConfigDict
from test_objectives import MODELS, config_of, sharding_of

from jaxllm import config as schema
from jaxllm.data import loader, mixture, order, shards
from jaxllm.data.examples import causal_lm
from jaxllm.data.mixture import Batches, Replay
from jaxllm.data.prepare import Prepared, prepare
from jaxllm.data.shards import Column, Shards, Totals
from jaxllm.data.tokenizers.byte import ByteTokenizer

ROWS, REPLAY_ROWS, WIDTH, FIRST = 37, 23, 6, 1000
CAUSAL = causal_lm.batch(ByteTokenizer())


def make_shards(directory: Path, rows: int, first: int, weighted_tokens: int = WIDTH) -> Shards:
    """Row r holds the token first + r only, of which so many are counted as trained."""
    tokens = np.repeat(first + np.arange(rows)[:, None], WIDTH + 1, axis=1)
    ones = np.ones((rows, WIDTH), int)
    block = {"tokens": tokens, "segments": ones, "weights": ones}
    columns = {name: Column(array.shape[1], np.dtype(np.uint16)) for name, array in block.items()}
    return shards.write(
        directory, [block], columns, row_tokens=WIDTH, vocab_size=2000, totals=Totals(1, tokens.size, rows * weighted_tokens, 100)
    )


@pytest.fixture
def both(tmp_path: Path) -> tuple[Shards, Shards]:
    return make_shards(tmp_path / "train", ROWS, 0), make_shards(tmp_path / "replay", REPLAY_ROWS, FIRST)


@pytest.mark.parametrize(
    ("batch_seqs", "frac", "seqs"),
    [(16, 0.25, 4), (16, 0.01, 1), (16, 0.9, 14), (2, 0.9, 1), (3, 0.9, 2), (10, 0.36, 4), (8, 0, 0)],
)
def test_the_share_is_the_nearest_number_of_rows(batch_seqs: int, frac: float, seqs: int) -> None:
    config = schema.base()
    config.data.update({"replay_source": "x", "replay_frac": float(frac)})
    config.train.batch_seqs = batch_seqs
    schema.check(config)
    assert mixture.replay_seqs(config) == seqs


@pytest.mark.parametrize("microbatches", [1, 2, 4, 8])
@pytest.mark.parametrize("batch_seqs", [8, 16, 48])
def test_micro_batches_and_devices_share_them_out_evenly(batch_seqs: int, microbatches: int) -> None:
    """A device has the rows of a micro-batch that follow each other."""
    for seqs in range(1, batch_seqs):
        found = mixture.places(batch_seqs, seqs, microbatches)
        assert found.sum() == seqs
        micro_RM = found.reshape(-1, microbatches)
        counts_M = micro_RM.sum(0)
        assert counts_M.max() - counts_M.min() <= 1
        for devices in (devices for devices in (2, 4) if len(micro_RM) % devices == 0):
            counts_DM = micro_RM.reshape(devices, -1, microbatches).sum(1)
            assert (counts_DM.max(0) - counts_DM.min(0)).max() <= 1


def test_either_source_is_visited_once_an_epoch_whatever_the_micro_batches(both: tuple[Shards, Shards]) -> None:
    train, again = both
    replays = [Replay(again, CAUSAL, 4, microbatches) for microbatches in (1, 4)]
    steps = [mixture.batch_rows(ROWS, replays[0], 16, 3, step) for step in range(40)]
    own, other = (np.concatenate([rows[mask(rows)] for rows in steps]) for mask in (lambda x: x < ROWS, lambda x: x >= ROWS))
    np.testing.assert_array_equal(own[: 12 * 40], np.concatenate([order.batch_rows(ROWS, 12, 3, step) for step in range(40)]))
    for stream, first, rows in ((own, 0, ROWS), (other, ROWS, REPLAY_ROWS)):
        epochs = stream[: len(stream) // rows * rows].reshape(-1, rows)
        assert len(epochs) >= 6
        np.testing.assert_array_equal(np.sort(epochs, axis=1), np.broadcast_to(first + np.arange(rows), epochs.shape))
        assert len({tuple(epoch) for epoch in epochs}) == len(epochs)
    other_seed = mixture.batch_rows(ROWS, replays[0], 16, 4, 0)
    assert (other_seed[other_seed >= ROWS] != steps[0][steps[0] >= ROWS]).any()
    for step in (0, 7):
        one, four = (mixture.batch_rows(ROWS, replay, 16, 3, step) for replay in replays)
        assert sorted(one) == sorted(four)
    same = Replay(train, CAUSAL, 8, 1)
    rows = mixture.batch_rows(ROWS, same, 16, 3, 0)
    assert set(rows[rows < ROWS]) != set(rows[rows >= ROWS] - ROWS), "one source twice is not the same rows twice"


@pytest.mark.parametrize("devices", [1, 4, 8])
def test_each_device_gets_its_rows_of_either_source(both: tuple[Shards, Shards], devices: int) -> None:
    train, again = both
    mesh = jax.make_mesh((devices,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:devices])
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    replay = Replay(again, CAUSAL, 3, 2)
    with loader.make(Batches(train, CAUSAL, 16, 3, replay), sharding) as source:
        for step in (0, 5, 1):
            rows = source.rows(step)
            wanted = np.where(rows < ROWS, rows, rows - ROWS + FIRST)
            batch = source.batch(step)
            assert batch["tokens"].sharding == sharding
            np.testing.assert_array_equal(batch["tokens"], np.broadcast_to(wanted[:, None], (16, WIDTH)))
            assert (np.flatnonzero(wanted >= FIRST) == np.flatnonzero(mixture.places(16, 3, 2))).all()


@pytest.fixture(scope="module", params=MODELS)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[ConfigDict, Prepared]:
    """Data of an objective, its own rows replayed."""
    folder = tmp_path_factory.mktemp(request.param)
    config = config_of(folder, request.param)
    config.data.replay_source = config.data.source
    return config, prepare(config, folder / "data", log=Lines())


def test_every_objective_can_be_replayed(case: tuple[ConfigDict, Prepared]) -> None:
    """Rows of both kinds in one batch are what each makes by itself; also where a device's rows are all of one kind."""
    config, prepared = case
    replay = Replay(prepared.replay, prepared.make_replay_batch(config), 4, 1)
    with loader.make(Batches(prepared.train, prepared.make_batch(config), 8, 1, replay), sharding_of(8)) as source:
        rows, batch = source.rows(2), source.batch(2)
    first = len(prepared.train)
    for place, row in enumerate(rows):
        part, row_of = (prepared.train, row) if row < first else (prepared.replay, row - first)
        make_batch = (prepared.make_batch if row < first else prepared.make_replay_batch)(config)
        alone = make_batch(part.rows(np.array([row_of])), np.array([row]), 1, 2)
        for name, array in alone.items():
            np.testing.assert_array_equal(batch[name][place], array[0], err_msg=name)


@pytest.fixture
def replayed(config: ConfigDict, tmp_path: Path) -> ConfigDict:
    """30 other documents, as a second source."""
    source = tmp_path / "general.jsonl"
    source.write_text("".join(json.dumps({"text": f"\N{SNOWMAN} general {document(number)}"}) + "\n" for number in range(30)))
    config.data.replay_source = str(source)
    return config


def test_each_document_of_the_source_is_replayed_or_held_out(replayed: ConfigDict, tmp_path: Path) -> None:
    plain = replayed.copy_and_resolve_references()
    plain.data.replay_source = ""
    before = prepare(plain, tmp_path / "plain", log=Lines())
    lines = Lines()
    prepared = prepare(replayed, tmp_path / "data", log=lines)
    found = [texts(prepared, name) for name in ("replay", "replay_validation")]
    assert sorted(found[0] + found[1]) == sorted(f"\N{SNOWMAN} general {document(number)}" for number in range(30))
    assert min(map(len, found)) >= 2
    # What is trained on and validated is as without it.
    assert (prepared.train.fingerprint, prepared.validation.fingerprint) == (
        before.train.fingerprint,
        before.validation.fingerprint,
    )
    assert prepared.fingerprint not in (before.fingerprint, prepared.train.fingerprint)
    assert prepared.record["documents"]["data.replay_source"]["kept"] == 30
    assert list(prepared.record["splits"]) == ["train", "validation", "replay", "replay_validation"]


def test_a_vocabulary_covers_what_is_replayed(replayed: ConfigDict, tmp_path: Path) -> None:
    replayed.tokenizer.kind = "char"
    prepared = prepare(replayed, tmp_path / "data", log=Lines())
    assert prepared.tokenizer.decode(prepared.tokenizer.encode("\N{SNOWMAN} general")) == "\N{SNOWMAN} general"


def test_the_source_is_part_of_the_recipe_and_the_share_is_not(replayed: ConfigDict, tmp_path: Path) -> None:
    prepared, lines = prepare(replayed, tmp_path / "data", log=Lines()), Lines()
    replayed.data.replay_frac = 0.5
    prepare(replayed, tmp_path / "data", log=lines)
    assert lines == []
    with open(replayed.data.replay_source, "a") as file:
        file.writelines(json.dumps({"text": f"one more, {number}"}) + "\n" for number in range(5))
    with pytest.raises(ValueError, match="are not those that this run began with"):
        prepare(replayed, tmp_path / "data", rows=prepared.fingerprint, log=lines)
    prepare(replayed, tmp_path / "data", log=lines)
    assert f"'{replayed.data.replay_source}' has changed" in lines.text
    replayed.data.update({"replay_source": "", "replay_frac": 0.0})
    after = prepare(replayed, tmp_path / "data", log=lines)
    assert after.replay is None
    assert not (tmp_path / "data" / "replay").exists()


def test_a_batch_that_is_more_than_all_rows_is_told(replayed: ConfigDict, tmp_path: Path) -> None:
    prepared = prepare(replayed, tmp_path, log=lambda line: None)
    replayed.data.replay_frac, rows = 0.5, len(prepared.train)
    for own_seqs, more in ((rows, False), (rows + 1, True)):
        replayed.train.batch_seqs = 2 * own_seqs
        expected = f"a batch has {own_seqs} rows of data.source, which is {rows} rows in all: some of them are in it more than once"
        assert prepared.notes(replayed) == ([expected] if more else [])


def test_the_share_of_tokens_is_told(config: ConfigDict, tmp_path: Path) -> None:
    """Of tokens that are trained, as answers are, and not of all that are read: 6 rows with 3 of them and 2 rows with 6."""
    config.data.replay_frac, config.train.batch_seqs = 0.25, 8
    train, replay = make_shards(tmp_path / "train", 40, 0, weighted_tokens=3), make_shards(tmp_path / "replay", 10, FIRST)
    line = mixture.describe(config, train, replay)
    assert line == "replay: 2 of the 8 rows of a batch, 40.0% of the tokens that it trains on"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data__replay_frac": 0.5}, r"data.replay_frac = 0.5 without a data.replay_source"),
        (
            {"data__replay_source": "x", "data__validation_frac": 0.0, "data__validation_source": "y"},
            "validation_frac = 0 with a data.r",
        ),
        ({"data__replay_source": "x", "data__replay_frac": 0.5, "train__batch_seqs": 1}, r"of train.batch_seqs = 1 row"),
    ],
)
def test_what_cannot_be_replayed_is_refused(changes: dict, message: str) -> None:
    config = schema.base()
    for key, value in changes.items():
        section, _, name = key.partition("__")
        config[section][name] = value
    with pytest.raises(ValueError, match=message):
        schema.check(config)


def test_a_class_that_is_only_replayed_is_refused(tmp_path: Path) -> None:
    config = config_of(tmp_path, "sequence_classification")
    config.data.replay_source = str(tmp_path / "other.jsonl")
    rows = [{"text": document(number), "label": ("left", "down")[number % 2], "other": "more"} for number in range(20)]
    Path(config.data.replay_source).write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match="the replay data has labels that the training data lacks: down"):
        prepare(config, tmp_path / "data", log=Lines())
