"""What a report says of a run that was trained on preferences: its metrics with what is healthy, and nothing of tokens."""

import json
from pathlib import Path

import pytest
from synthetic_runs import write_run

from jaxllm import evaluate
from jaxllm.report import canvas, comparison, curves, runs
from jaxllm.report.healthy import HEALTHY
from jaxllm.report.training import write_report

STEPS = (0, 100, 200)


def metrics(step: int, objective: str) -> dict[str, float]:
    share = step / 200
    found = {"loss": 0.6931 - 0.4 * share, "margin": 2 * share, "chosen_reward": -0.5 * share, "rejected_reward": -2.5 * share}
    found |= {"chosen_logp": -20 - 5 * share, "rejected_logp": -30 - 25 * share}
    return found | ({"kl": share} if objective == "kto" else {"accuracy": 0.8 * share})


def read(directory: Path, objective: str) -> runs.Run:
    write_run(directory, steps=200)
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    without = ({name: value for name, value in row.items() if name != "accuracy"} for row in rows if row["kind"] == "train")
    rows = [row | metrics(row["step"], objective) for row in without]
    rows += [{"kind": "eval", "step": step, **metrics(step, objective), "pairs": 24} for step in STEPS]
    (directory / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    config = json.loads((directory / "config.json").read_text())
    config["train"]["objective"] = objective
    (directory / "config.json").write_text(json.dumps(config))
    return runs.read(directory)


@pytest.mark.parametrize("objective", ["dpo", "kto"])
def test_the_page_shows_what_was_measured_and_what_is_healthy(tmp_path: Path, objective: str) -> None:
    page = write_report(read(tmp_path / "run", objective).directory).read_text()
    only = {"dpo": "accuracy", "kto": "kl"}
    for name, line in HEALTHY.items():
        assert (line in page) == (name not in only.values() or name == only[objective]), name
    assert "perplexity" not in page.lower() and "nats per token" not in page and "equal chances" not in page
    assert "0.6931" in page and "0.2931" in page and "+2.000" in page
    assert "generate --chat --run" in page and "--data FILE" not in page
    pictures = {path.stem for path in (tmp_path / "run" / "pictures").iterdir()}
    assert {"loss", "margin", "rewards", "logps", "divergence" if objective == "kto" else "accuracy"} <= pictures
    assert ("divergence" in pictures) == (objective == "kto") != ("accuracy" in pictures)


def test_curves_are_those_of_the_rows(tmp_path: Path) -> None:
    run = read(tmp_path / "run", "dpo")
    axes = curves.rewards(run, canvas.LIGHT).axes[0]
    drawn = [line.get_ydata().tolist() for line in axes.lines]
    assert [0.0, -0.25, -0.5] in drawn and [0.0, -1.25, -2.5] in drawn
    assert any(text.get_text().startswith("rejected -2.") for text in axes.texts)
    assert curves.loss(run, canvas.LIGHT).axes[0].get_ylabel() == "mean loss of a pair or answer"


def test_a_run_of_tokens_has_none_of_it(tmp_path: Path) -> None:
    write_run(tmp_path / "run", steps=200)
    run = runs.read(tmp_path / "run")
    assert curves.accuracy(run, canvas.LIGHT) is None and curves.margin(run, canvas.LIGHT) is None
    page = write_report(run.directory).read_text()
    assert "when all is well" not in page and "perplexity" in page


def test_runs_are_compared_by_margin_and_accuracy_of_pairs(tmp_path: Path) -> None:
    read(tmp_path / "one", "dpo")
    read(tmp_path / "other", "dpo")
    write_run(tmp_path / "tokens", steps=200)
    same = {line.name: line.cells for line in comparison.compare([tmp_path / "one", tmp_path / "other"]).lines}
    assert same["accuracy of pairs, final"] == ["80.0%", "80.0%"] and same["reward margin, final"] == ["+2.0000", "+2.0000"]
    assert same["likeliest token is right, final"] == ["", ""]
    mixed = comparison.compare([tmp_path / "one", tmp_path / "tokens"])
    assert {line.name: line.cells for line in mixed.lines}["accuracy of pairs, final"] == ["80.0%", ""]
    assert any("predict different things" in warning for warning in mixed.warnings)


def test_the_table_of_evaluate_has_the_metrics_in_the_order_of_the_report() -> None:
    row = {**metrics(200, "dpo"), "pairs": 24, "parameter_bytes": 2048}
    lines = dict(evaluate._lines(row))
    assert list(lines) == [*(name.replace("_", " ") for name in HEALTHY if name != "kl"), "pairs", "parameters on the device"]
    assert lines["margin"] == "2.0000"
