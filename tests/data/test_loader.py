"""Batches on the mesh: the right rows on every device, the right step after a jump, errors where they belong, nothing left behind."""

import socket
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxllm.data import loader, order, shards
from jaxllm.data.examples import causal_lm, prefix_lm
from jaxllm.data.mixture import Batches
from jaxllm.data.shards import Column, Shards, Totals
from jaxllm.data.tokenizers.byte import ByteTokenizer

ROWS, ROW_TOKENS = 37, 6


@pytest.fixture
def data(tmp_path: Path) -> Shards:
    return make_shards(tmp_path / "train")


def make_shards(directory: Path) -> Shards:
    """Row r holds the tokens 7 r .. 7 r + 6, so that each token says where it comes from."""
    tokens = np.arange(ROWS * (ROW_TOKENS + 1)).reshape(ROWS, -1)
    ones = np.ones((ROWS, ROW_TOKENS), int)
    block = {"tokens": tokens, "segments": ones, "weights": ones}
    columns = {name: Column(array.shape[1], np.dtype(np.uint16)) for name, array in block.items()}
    totals = Totals(1, tokens.size, ones.size, 100)
    return shards.write(directory, [block], columns, row_tokens=ROW_TOKENS, vocab_size=tokens.size, totals=totals)


CAUSAL = causal_lm.batch(ByteTokenizer())


def batch_of(data: Shards, rows: np.ndarray) -> dict[str, np.ndarray]:
    return CAUSAL(data.rows(rows), rows, 0, 0)


def mesh_sharding(data_size: int, spec: PartitionSpec) -> NamedSharding:
    mesh = jax.make_mesh((data_size, 8 // data_size), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    return NamedSharding(mesh, spec)


@pytest.mark.parametrize(
    ("data_size", "spec"),
    [(1, PartitionSpec()), (4, PartitionSpec("data")), (8, PartitionSpec("data", None)), (4, PartitionSpec("data", "tensor"))],
)
def test_batches_are_the_ordered_rows_split_over_devices(data: Shards, data_size: int, spec: PartitionSpec) -> None:
    sharding = mesh_sharding(data_size, spec)
    with loader.make(Batches(data, CAUSAL, 16, 3), sharding) as source:
        for step in (0, 1, 2, 500, 2, 3):
            rows = order.batch_rows(ROWS, 16, 3, step)
            np.testing.assert_array_equal(source.rows(step), rows)
            batch = source.batch(step)
            for name, expected in batch_of(data, rows).items():
                np.testing.assert_array_equal(batch[name], expected, err_msg=name)
                assert batch[name].sharding == sharding
                assert batch[name].dtype == expected.dtype
                for shard in batch[name].addressable_shards:
                    np.testing.assert_array_equal(shard.data, expected[shard.index], err_msg=name)


class Spy(Shards):
    """Shards that count reads, fail on demand, and wait until they may read."""

    def __init__(self, directory: Path):
        super().__init__(directory)
        self.read: list[list[int]] = []
        self.failing: list[int] = []
        self.reading = threading.Event()

    def rows(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        self.read.append(indices.tolist())
        self.reading.set()
        if indices.tolist() == self.failing:
            raise OSError(5, "Input/output error")
        return super().rows(indices)


def test_following_steps_are_read_ahead_and_only_once(data: Shards) -> None:
    spy = Spy(data.directory)
    expected = [order.batch_rows(ROWS, 4, 0, step).tolist() for step in range(12)]
    with loader.make(Batches(spy, CAUSAL, 4, 0), mesh_sharding(1, PartitionSpec())) as source:
        for step in range(10):
            source.batch(step)
    assert spy.read[:10] == expected[:10]
    assert len(spy.read) <= 10 + loader.AHEAD_STEPS

    spy.read.clear()
    with loader.make(Batches(spy, CAUSAL, 4, 0), mesh_sharding(1, PartitionSpec())) as source:
        source.batch(0)
        while len(spy.read) < 1 + loader.AHEAD_STEPS:
            assert spy.reading.wait(timeout=10)
            spy.reading.clear()
    assert spy.read == expected[: 1 + loader.AHEAD_STEPS]


def test_an_error_while_reading_ahead_belongs_to_its_step(data: Shards) -> None:
    """Steps before it are not touched by it, the step itself raises, and asking once more reads once more."""
    spy = Spy(data.directory)
    spy.failing = order.batch_rows(ROWS, 4, 0, 2).tolist()
    with loader.make(Batches(spy, CAUSAL, 4, 0), mesh_sharding(1, PartitionSpec())) as source:
        source.batch(0)
        source.batch(1)
        with pytest.raises(OSError, match="Input/output error"):
            source.batch(2)
        spy.failing = []
        np.testing.assert_array_equal(source.batch(2)["tokens"], batch_of(data, source.rows(2))["tokens"])


def test_closing_ends_the_thread(data: Shards) -> None:
    before = set(threading.enumerate())
    source = loader.make(Batches(data, CAUSAL, 4, 0), mesh_sharding(1, PartitionSpec()))
    source.batch(0)
    assert len(set(threading.enumerate()) - before) == 1
    source.close()
    source.close()
    assert set(threading.enumerate()) <= before
    with pytest.raises(RuntimeError, match="after shutdown"):
        source.batch(1)


@pytest.mark.parametrize(("batch_seqs", "max_seqs"), [(8, 0), (8, 16), (16, 5), (64, 0), (8, 1000)])
def test_sweep_gives_each_row_once(data: Shards, batch_seqs: int, max_seqs: int) -> None:
    sharding = mesh_sharding(8, PartitionSpec("data"))
    batches = list(loader.sweep(data, CAUSAL, batch_seqs, sharding, max_seqs))
    count = min(max_seqs or ROWS, ROWS)
    assert len(batches) == -(-count // batch_seqs)
    whole = {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}
    rows = whole["tokens"][:count, 0] // (ROW_TOKENS + 1)
    assert len(set(rows.tolist())) == count
    assert (np.diff(rows) > 0).all()
    assert max(np.diff(rows, prepend=0, append=ROWS)) <= -(-ROWS // count)
    for name, expected in batch_of(data, rows).items():
        np.testing.assert_array_equal(whole[name][:count], expected, err_msg=name)
        assert not whole[name][count:].any(), f"{name}: rows that fill the last batch are 0"
    assert all(batch["tokens"].sharding == sharding for batch in batches)


def test_a_batch_that_does_not_split_is_refused(data: Shards) -> None:
    sharding = mesh_sharding(4, PartitionSpec("data"))
    with pytest.raises(ValueError, match=r"train\.batch_seqs = 6 does not split over 4 devices\.\n  Accepted: 4, 8, 12"):
        loader.make(Batches(data, CAUSAL, 6, 0), sharding)
    with pytest.raises(ValueError, match="batch_seqs = 6 does not split over 4 devices"):
        next(loader.sweep(data, CAUSAL, 6, sharding))


HOST = """
    import sys
    import jax
    jax.distributed.initialize(sys.argv[1], num_processes=2, process_id=int(sys.argv[2]))
    from jax.sharding import NamedSharding, PartitionSpec
    from jaxllm.data import loader
    from jaxllm.data.examples import prefix_lm
    from jaxllm.data.mixture import Batches
    from jaxllm.data.shards import Shards
    from jaxllm.data.tokenizers.byte import ByteTokenizer

    read = []
    class Spy(Shards):
        def rows(self, indices):
            read.append(indices.tolist())
            return super().rows(indices)

    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    data, make_batch, sharding = Spy(sys.argv[3]), prefix_lm.batch(ByteTokenizer()), NamedSharding(mesh, PartitionSpec("data"))
    with loader.make(Batches(data, make_batch, 8, 1), sharding) as source:
        batch = source.batch(5)
        local = [row // 7 for shard in batch["tokens"].addressable_shards for row in shard.data[:, 0].tolist()]
        weights = [row.astype(int).tolist() for shard in batch["weights"].addressable_shards for row in shard.data]
        print(batch["tokens"].shape, read[0], local, weights)
"""


def test_each_host_reads_its_own_rows(data: Shards) -> None:
    """Two processes with two devices each: together they hold the batch that one process holds, its noise included, and neither reads
    the other's rows."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    command = [sys.executable, "-c", textwrap.dedent(HOST), address]
    environment = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "2", "PYTHONPATH": str(Path(__file__).parents[2])}
    hosts = [
        subprocess.Popen(
            [*command, str(host), str(data.directory)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for host in range(2)
    ]
    rows = order.batch_rows(ROWS, 8, 1, 5).tolist()
    whole = prefix_lm.batch(ByteTokenizer())(data.rows(np.array(rows)), np.array(rows), 1, 5)["weights"].astype(int).tolist()
    for host, mine, weights in zip(hosts, (rows[:4], rows[4:]), (whole[:4], whole[4:]), strict=True):
        out, errors = host.communicate(timeout=120)
        assert host.returncode == 0, errors
        assert out.strip() == f"(8, {ROW_TOKENS}) {mine} {mine} {weights}"
