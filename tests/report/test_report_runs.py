"""Reading run directories, whole and damaged, and the numbers that they come down to."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from synthetic_runs import loss_at, write_run

from jaxllm.report import runs
from jaxllm.report.summary import smoothed, summarize
from jaxllm.report.units import clock, count, duration, plain, size


def test_whole_run(tmp_path: Path) -> None:
    run = runs.read(write_run(tmp_path / "run", steps=1000, floor=2.9, model__layers=4))
    assert run.notes == [] and run.name == "run"
    assert run.config["model.layers"] == 4
    assert [row["step"] for row in run.evals] == list(range(100, 1001, 100))
    assert run.samples[-1] == ("step 1000: samples", ">>> The \nThe function returns <x>")
    summary = summarize(run)
    assert summary.final["loss"] == summary.best["loss"] == pytest.approx(loss_at(1000, 2.9) + 0.05)
    assert (summary.steps, summary.total_steps, summary.tokens) == (1000, 1000, 2_048_000)
    assert summary.train_loss == pytest.approx(loss_at(990, 2.9), abs=0.1)
    assert summary.tokens_per_sec == pytest.approx(12000, rel=0.02)
    assert (summary.peak_bytes, summary.compile_secs, summary.wall_secs) == (92_000_000, 9.6, 190.0)
    assert (summary.shape, summary.vocab_size, summary.devices) == ("4 / 256 / 4", 2048, "cpu")


def test_speed_leaves_compilation_out(tmp_path: Path) -> None:
    """The first row, 150 tokens/s here, includes it. Of a run of one row there is nothing else to tell."""
    assert summarize(runs.read(write_run(tmp_path / "two", steps=10))).tokens_per_sec == pytest.approx(12000, rel=0.1)
    assert summarize(runs.read(write_run(tmp_path / "one", steps=1))).tokens_per_sec == 150


def test_best_is_not_final_when_it_overfits(tmp_path: Path) -> None:
    directory = write_run(tmp_path / "run", steps=300)
    with (directory / "metrics.jsonl").open("a") as file:
        for step, loss in ((310, 9.0), (320, None), (330, math.inf)):
            file.write(json.dumps({"kind": "eval", "step": step, "loss": loss}) + "\n")
    summary = summarize(runs.read(directory))
    assert (summary.best["step"], summary.final["step"]) == (300, 310)


@pytest.mark.parametrize(
    ("name", "content", "note"),
    [
        ("config.json", None, "config.json is missing"),
        ("run.json", "", "run.json is damaged or half written"),
        ("run.json", '{"parameters": 3', "run.json is damaged or half written"),
        ("data.json", "[1, 2]", "data.json is damaged: it holds no JSON object"),
        ("metrics.jsonl", '{"kind": "train", "step": 1, "loss": 2.0}\n{"kind": "tr', "metrics.jsonl: 1 line is damaged"),
        ("metrics.jsonl", '3\n{"kind": "train"}\n{"kind": "train", "step": "x"}\n\n', "metrics.jsonl: 3 lines are damaged"),
        ("samples.txt", None, "samples.txt is missing"),
    ],
)
def test_damage_costs_one_file_only(tmp_path: Path, name: str, content: str | None, note: str) -> None:
    directory = write_run(tmp_path / "run")
    (directory / name).unlink() if content is None else (directory / name).write_text(content)
    run = runs.read(directory)
    assert len(run.notes) == 1 and note in run.notes[0]
    parts = {"config.json": run.config, "run.json": run.environment, "data.json": run.data, "samples.txt": run.samples}
    assert all(bool(part) == (part_name != name) for part_name, part in parts.items())
    assert len(run.train) == (101 if name != "metrics.jsonl" else content.count("loss") if content else 0)


def test_last_row_of_a_step_counts(tmp_path: Path) -> None:
    """Rows repeated by a resumed run, in whatever order."""
    directory = write_run(tmp_path / "run")
    written = [(20, 5.0), (30, 4.0), (10, 6.0), (20, 7.0)]
    (directory / "metrics.jsonl").write_text(
        "".join(f'{{"kind": "train", "step": {step}, "loss": {loss}}}\n' for step, loss in written)
    )
    assert [(row["step"], row["loss"]) for row in runs.read(directory).train] == [(10, 6.0), (20, 7.0), (30, 4.0)]


@pytest.mark.parametrize(("make", "words"), [(False, "does not exist"), (True, "is not a run directory")])
def test_what_is_no_run(tmp_path: Path, make: bool, words: str) -> None:
    place = tmp_path / "place"
    if make:
        write_run(place / "inside")
    with pytest.raises(ValueError, match=rf"place' {words}(.|\n)*Accepted: .*{'inside' if make else ''}"):
        runs.read(place)


def test_elapsed_joins_sessions() -> None:
    rows = [{"secs": secs} for secs in (10, 20, None, 30, 5, 15, 2)]
    np.testing.assert_array_equal(runs.elapsed(rows), [10, 20, math.nan, 30, 35, 45, 47])


@pytest.mark.parametrize(
    ("sessions", "secs"),
    [([190.0, 10.0], 200.0), ([190.0, None], 183.0), ([], 183.0), ([100.0], 183.0), (["?"], 183.0)],
    ids=["both ended", "the last was killed", "none told", "shorter than the rows say", "no number"],
)
def test_wall_time(tmp_path: Path, sessions: list[Any], secs: float) -> None:
    """The last row of the synthetic run is written after 13 + 1000 x 0.17 = 183 seconds."""
    directory = write_run(tmp_path / "run")
    (directory / "run.json").write_text(json.dumps({"sessions": [{"secs": value} for value in sessions]}))
    assert summarize(runs.read(directory)).wall_secs == pytest.approx(secs)


def test_smoothing_keeps_a_line_and_does_not_lag() -> None:
    """A moving mean that is symmetric leaves a straight line as it is, up to the last few rows."""
    line = np.linspace(7.0, 3.0, 200)
    np.testing.assert_allclose(smoothed(line)[:-4], line[:-4], rtol=1e-12)
    gaps = line.copy()
    gaps[[0, 50, 199]] = math.nan
    found = smoothed(gaps)
    assert np.isnan(found[[0, 50, 199]]).all() and np.isfinite(np.delete(found, [0, 50, 199])).all()
    # Row 51 averages rows 47 to 55 without 50.
    assert found[51] == pytest.approx(np.mean(line[[47, 48, 49, 51, 52, 53, 54, 55]]), rel=1e-12)
    assert smoothed(np.array([])).size == 0


@pytest.mark.parametrize(
    ("shown", "words"),
    [
        (count(987), "987"), (count(999.7), "1.00k"), (count(12_345), "12.3k"), (count(999_950), "1.00M"), (count(7.0e9), "7.00G"),
        (clock(7.4), "0:07"), (clock(3723), "1:02:03"), (clock(300_000), "3 days 11 h"),
        (size(512), "512 B"), (size(92_000_000), "87.7 MiB"), (size(1 << 30), "1.00 GiB"),
        (duration(0.5), "0.50 s"), (duration(59.94), "59.9 s"), (duration(190), "3:10"),
        (plain(None), ""), (plain(True), "true"), (plain(12_345), "12,345"), (plain(0.001), "0.001"), (plain(1.2e10), "12,000,000,000"),
        (plain(10_000.5), "10000.5"), (plain(["The ", "a"]), '["The ", "a"]'), (plain([]), ""), (plain(math.inf), "Infinity"),
        (plain(["a", 2]), "a, 2"), (plain([["a", 1.0]]), '[["a", 1.0]]'), (plain(math.nan), "NaN"),
    ],
)  # fmt: skip
def test_units(shown: str, words: str) -> None:
    assert shown == words
