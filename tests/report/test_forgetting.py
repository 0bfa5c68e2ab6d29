"""What a run says about the source that it must not forget: one line, one figure, one curve."""

import json
from pathlib import Path

import pytest
from synthetic_runs import write_run

from jaxllm.report import canvas, curves, runs
from jaxllm.report.summary import describe_change
from jaxllm.report.training import write_report

EVALS = [
    {"step": 0, "loss": 3.12, "perplexity": 22.6, "replay_loss": 3.3, "forgetting": 0.0},
    {"step": 100, "loss": 2.9, "perplexity": 18.2, "replay_loss": 3.2, "forgetting": -0.1},
    {"step": 200, "loss": 2.54, "perplexity": 12.7, "replay_loss": 3.41, "forgetting": 0.11},
]
WITHOUT = [{name: row[name] for name in ("step", "loss", "perplexity")} for row in EVALS]


def read(directory: Path, evals: list[dict]) -> runs.Run:
    write_run(directory, steps=200)
    train = [line for line in (directory / "metrics.jsonl").read_text().splitlines() if '"train"' in line]
    (directory / "metrics.jsonl").write_text("\n".join([*train, *(json.dumps({"kind": "eval", **row}) for row in evals)]) + "\n")
    return runs.read(directory)


@pytest.mark.parametrize(
    ("evals", "line"),
    [
        (EVALS, "validation 3.120 -> 2.540; on replay_source 3.300 -> 3.410 (forgetting +0.110)"),
        (WITHOUT, "validation 3.120 -> 2.540"),
        ([EVALS[0], *WITHOUT[1:]], "validation 3.120 -> 2.540"),
        (EVALS[1:], None),
        (EVALS[:1], None),
        ([], None),
    ],
)
def test_the_change_from_the_start(tmp_path: Path, evals: list[dict], line: str | None) -> None:
    assert describe_change(read(tmp_path / "run", evals)) == line


@pytest.mark.parametrize(("evals", "curve"), [(EVALS, [3.3, 3.2, 3.41]), (WITHOUT, None)])
def test_the_page_has_the_figure_and_the_curve(tmp_path: Path, evals: list[dict], curve: list[float] | None) -> None:
    run = read(tmp_path / "run", evals)
    axes = curves.loss(run, canvas.LIGHT).axes[0]
    assert (curve in [line.get_ydata().tolist() for line in axes.lines]) == (curve is not None)
    assert any(text.get_text() == "replay 3.410" for text in axes.texts) == (curve is not None)
    page = write_report(run.directory).read_text()
    assert ("+0.1100" in page) == ("forgetting" in page) == (curve is not None)
