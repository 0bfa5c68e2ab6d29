"""The report and the comparison as files: complete, escaped, self-contained, reproducible."""

import json
import math
import os
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from synthetic_runs import write_run

from jaxllm.config import SCHEMA
from jaxllm.report import canvas, comparison, curves, overlay, runs
from jaxllm.report.training import write_report

PNG = b"\x89PNG\r\n\x1a\n"
VOID = ("meta", "img", "source")


class Page(HTMLParser):
    """Text and links of a page; fails on tags that do not match."""

    def __init__(self, source: str):
        super().__init__()
        self.open, self.words, self.links, self.tags = list[str](), list[str](), list[str](), set[str]()
        self.feed(source)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "srcset")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return "\n".join(self.words)


def read_page(path: Path) -> Page:
    page = Page(path.read_text(encoding="utf-8"))
    assert all(link.startswith("data:image/png;base64,") for link in page.links)
    assert not {"script", "link", "iframe", "object"} & page.tags
    return page


def test_report_of_a_whole_run(tmp_path: Path) -> None:
    directory = write_run(tmp_path / "run", model__layers=4, sample__prompts=("it's ",))
    assert write_report(directory) == directory / "report.html"
    page = read_page(directory / "report.html")
    final = runs.read(directory).evals[-1]
    for words in (
        f"{final['loss']:.4f}",
        f"{final['perplexity']:.2f}",
        f"{final['bits_per_byte']:.3f}",
        "2.05M",
        "12.0k",
        "3:10",
        "87.7 MiB",
    ):
        assert words in page.text
    assert "2,164,416" in page.text and "= 7.62" in page.text and "sha256" not in page.text
    assert "The function returns <x>" in page.text and "The <b>old & co" in page.text
    assert f"jaxllm.generate --run {directory} --prompt 'it'\"'\"'s '" in page.text
    assert "Training stopped" not in page.text and "missing" not in page.text
    assert (
        "layers" in page.text.partition(f"All {len(SCHEMA)} fields")[0]
        and "rope_theta" not in page.text.partition(f"All {len(SCHEMA)} fields")[0].partition("Configuration")[2]
    )
    names = sorted(path.name for path in (directory / "pictures").iterdir())
    assert names == ["gradient_norm.png", "learning_rate.png", "loss.png", "tokens_per_sec.png"]
    assert all((directory / "pictures" / name).read_bytes().startswith(PNG) for name in names)
    # Light and dark of each.
    assert len(set(page.links)) == 2 * len(names)
    assert not list(directory.rglob(".*"))


def test_report_is_reproducible_and_reads_only_the_run(tmp_path: Path) -> None:
    directory = write_run(tmp_path / "run")
    first = write_report(directory).read_bytes()
    assert write_report(directory).read_bytes() == first


HOSTILE = "<script>alert(1)</script><img src=x onerror=y>\"'&"


def test_every_text_is_escaped(tmp_path: Path) -> None:
    """From the directory's name, the config, the provenance, the environment and the samples."""
    directory = write_run(tmp_path / 'a <img src="x"> & $b', data__source=HOSTILE, sample__prompts=(HOSTILE,))
    for name in ("run.json", "data.json"):
        record = json.loads((directory / name).read_text())
        record[HOSTILE] = {HOSTILE: HOSTILE}
        record["origins"] = record["splits"] = {HOSTILE: [{"path": HOSTILE, HOSTILE: HOSTILE}]}
        record["sessions"] = [{"reason": HOSTILE, "started": HOSTILE}] * 2
        (directory / name).write_text(json.dumps(record))
    with (directory / "samples.txt").open("a") as file:
        file.write(f"=== {HOSTILE} ===\n{HOSTILE}\n=== step 9: samples ===\n{HOSTILE}\n")
    page = read_page(write_report(directory))
    assert page.text.count(HOSTILE) > 10
    other = write_run(tmp_path / "other")
    read_page(comparison.write(comparison.compare([directory, other]), tmp_path)[0])


def damage_metrics(directory: Path) -> None:
    text = (directory / "metrics.jsonl").read_text()
    (directory / "metrics.jsonl").write_text(text[: len(text) // 3])


def lose_values(directory: Path) -> None:
    """A run in which nothing was ever finite."""
    rows = [{"kind": "train", "step": step, "loss": None, "lr": None, "skipped": step, "secs": None} for step in range(1, 30)]
    (directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def confuse(directory: Path) -> None:
    """Files that are JSON, but not of the expected kind."""
    (directory / "config.json").write_text(
        '{"model": {"layers": {"a": 1}, "name": 3, "width": null}, "train": 7, "sample": {"prompts": 5}}'
    )
    (directory / "run.json").write_text('{"memory_bytes": 5, "sessions": [3, {}], "parameters": "many", "versions": null}')
    (directory / "data.json").write_text('{"splits": {"train": 3}, "tokenizer": [], "origins": {"a": [1]}, "documents": 0}')
    (directory / "samples.txt").write_bytes(b"\xff\xfe no heading \xed\xa0\x80")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (damage_metrics, "Training stopped after 330 of 1,000 steps"),
        (lose_values, "29 steps were skipped"),
        (confuse, "no heading"),
        (lambda directory: (directory / "metrics.jsonl").unlink(), "There are no metrics yet."),
        (
            lambda directory: [(directory / name).unlink() for name in ("run.json", "data.json", "samples.txt")],
            "data.json is missing.",
        ),
        (lambda directory: [path.write_text("") for path in directory.iterdir()], "config.json is damaged or half written"),
    ],
    ids=["half", "never finite", "confused", "no metrics", "metrics only", "all empty"],
)
def test_report_says_what_is_missing(tmp_path: Path, damage: Any, words: str) -> None:
    directory = write_run(tmp_path / "run")
    damage(directory)
    assert words in read_page(write_report(directory)).text


def test_commands_work_where_they_are_typed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A relative path stays relative, and one with a space is quoted."""
    monkeypatch.chdir(tmp_path)
    assert "--run 'my runs/a'" in read_page(write_report(write_run(Path("my runs/a")))).text


@pytest.mark.parametrize("places", [[0.5, 0.5, 0.5], [0.0, 0.1, 0.11, 0.9], [0.2], [], [0.0, 0.05, 0.1, 0.15, 0.2]])
def test_labels_are_spread(places: list[float]) -> None:
    """Gap kept, order kept, the mean of each touching group kept, and nothing moved without need."""
    found = canvas.spread(places, 0.1)
    assert len(found) == len(places)
    assert all(upper - lower >= 0.1 - 1e-9 for lower, upper in zip(found, found[1:], strict=False))
    assert sum(found) == pytest.approx(sum(places))
    if len(places) == 4:
        assert found[3] == 0.9


@pytest.mark.parametrize(
    ("curve", "cut"),
    [
        ([9.0, *[3.0 - step / 100 for step in range(99)]], 9.0),
        ([3.0 - step / 100 for step in range(100)], None),
        ([2.0, 2.0], None),
        ([], None),
    ],
    ids=["a high start", "even", "flat", "empty"],
)
def test_vertical_range_shows_what_happens(curve: list[float], cut: float | None) -> None:
    axes = canvas.figure(canvas.LIGHT, 4, 3).add_subplot()
    assert canvas.fit(axes, [np.array(curve), np.array([math.nan])]) == cut
    if curve:
        low, high = axes.get_ylim()
        assert low < min(curve) and high > max(value for value in curve if value != cut)
        assert cut is None or high < cut


def line_data(figure: Any) -> list[tuple[list[float], list[float]]]:
    return [(list(line.get_xdata()), list(line.get_ydata())) for line in figure.axes[0].lines]


def test_loss_picture_draws_the_rows(tmp_path: Path) -> None:
    run = runs.read(write_run(tmp_path / "run", steps=300))
    figure = curves.loss(run, canvas.LIGHT)
    assert figure is not None
    raw, _, evals = line_data(figure)
    assert raw == ([row["step"] for row in run.train], [row["loss"] for row in run.train])
    assert evals == ([100, 200, 300], [row["loss"] for row in run.evals])
    labels = {text.get_text() for text in figure.axes[0].texts}
    assert f"validation {run.evals[-1]['loss']:.3f}" in labels


def test_curves_against_tokens_and_time_after_a_resume(tmp_path: Path) -> None:
    directory = write_run(tmp_path / "run")
    rows = [
        {"kind": "train", "step": step, "loss": 3.0, "tokens": step * 100, "secs": secs}
        for step, secs in ((10, 5), (20, 9), (30, 4))
    ]
    rows += [{"kind": "eval", "step": step, "loss": 3.1, "tokens": 77} for step in (15, 30)]
    (directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = runs.read(directory)
    for against, wanted in (("tokens", [1500, 3000]), ("time", [7, 13])):
        assert line_data(overlay.panel([run], ["run"], "loss", against, canvas.LIGHT))[0] == (wanted, [3.1, 3.1])


def test_comparison_table_and_best(tmp_path: Path) -> None:
    places = [
        write_run(tmp_path / name, floor=floor, seed=seed)
        for seed, (name, floor) in enumerate([("a", 2.9), ("b", 2.7), ("c", 3.1)])
    ]
    found = comparison.compare(places)
    lines = {line.name: line for line in found.lines}
    assert found.names == ["a", "b", "c"] and found.warnings == []
    finals = [runs.read(place).evals[-1] for place in places]
    assert lines["validation loss, final"].cells == [f"{row['loss']:.4f}" for row in finals]
    assert lines["bits per byte, final"].cells == [f"{row['bits_per_byte']:.3f}" for row in finals]
    assert lines["validation loss, best"].best == lines["token perplexity, final"].best == {1}
    # Nothing is best where all are equal, or where more is neither better nor worse.
    assert lines["wall time"].best == lines["parameters"].best == lines["architecture"].best == frozenset()
    page, picture = comparison.write(found, tmp_path / "out")
    assert picture.read_bytes().startswith(PNG) and lines["training loss"].cells[1] in read_page(page).text
    again = comparison.write(comparison.compare(places), tmp_path / "again")
    assert [path.read_bytes() for path in again] == [page.read_bytes(), picture.read_bytes()]


def test_config_differences_are_all_and_only_those(tmp_path: Path) -> None:
    places = [
        write_run(tmp_path / name, model__layers=layers, optimizer__name=way)
        for name, layers, way in (("a", 2, "lion"), ("b", 4, "adamw"))
    ]
    assert comparison.compare(places).differences == [("model.layers", [2, 4]), ("optimizer.name", ["lion", "adamw"])]


def test_runs_of_different_tokenizers(tmp_path: Path) -> None:
    """Bits per byte is drawn and ranked, losses are only told."""
    places = [write_run(tmp_path / "a"), write_run(tmp_path / "b", floor=1.0, fingerprint="b" * 64)]
    found = comparison.compare(places)
    lines = {line.name: line for line in found.lines}
    assert "bits per byte does" in found.warnings[0] and len(found.warnings) == 1
    assert (
        lines["validation loss, best"].best == lines["token perplexity, final"].best == lines["training loss"].best == frozenset()
    )
    assert lines["bits per byte, final"].best == {1}
    assert "Validation bits per byte of every run" in comparison.write(found, tmp_path)[0].read_text()
    # One run did not measure it: what there is is drawn.
    metrics = places[0] / "metrics.jsonl"
    metrics.write_text(re.sub(r', "bits_per_byte": [\d.]+', "", metrics.read_text()))
    assert "Validation loss of every run" in comparison.write(comparison.compare(places), tmp_path)[0].read_text()


def test_runs_of_different_objectives(tmp_path: Path) -> None:
    """Side by side, each with its own baseline, and none is called the best; noise that none of them draws does not matter."""
    masked = {"model__name": "bert", "train__objective": "masked_lm"}
    places = [write_run(tmp_path / "a", data__noise_frac=0.3), write_run(tmp_path / "b", floor=1.0, **masked)]
    metrics = places[1] / "metrics.jsonl"
    metrics.write_text(re.sub(r'"bits_per_byte": [\d.]+', '"accuracy": 0.5, "baseline_loss": 4.25', metrics.read_text()))
    found = comparison.compare(places)
    lines = {line.name: line for line in found.lines}
    assert found.warnings == [
        "The runs predict different things (causal_lm / masked_lm (noise_frac 0.15, whole_words False)): losses, perplexities and"
        " accuracies do not compare between them, each does with its own unigram baseline. Bits per byte are of causal_lm alone."
    ]
    assert lines["objective"].cells == ["causal_lm", "masked_lm"]
    assert lines["unigram baseline: loss"].cells == ["", "4.2500"] and "unigram baseline: right" not in lines
    assert lines["likeliest token is right, final"].cells == ["", "50.0%"]
    assert not any(line.best for line in found.lines if "loss" in line.name or "perplexity" in line.name)
    again = [write_run(tmp_path / "c", **masked), write_run(tmp_path / "d", data__noise_frac=0.3, **masked)]
    assert "noise_frac 0.15" in comparison.compare(again).warnings[0]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"data__source": "other.txt"}, r"not validated on the same text \(data.source differ\)"),
        ({"eval__max_seqs": 5}, r"eval.max_seqs differ"),
        ({"data__row_tokens": 64}, "rows have 256 / 64 tokens"),
        ({"steps": 1000, "train__steps": 2000}, "b stopped at step 1,000 of 2,000"),
    ],
)
def test_what_does_not_compare_is_said(tmp_path: Path, fields: dict[str, Any], words: str) -> None:
    places = [write_run(tmp_path / "a"), write_run(tmp_path / "b", **fields)]
    (warning,) = comparison.compare(places).warnings
    assert re.search(words, warning)


def test_speed_and_time_are_ranked_only_where_they_compare(tmp_path: Path) -> None:
    """Unequal devices rank no speed, memory or time; unequal amounts of text no time. Compile time may be cached: never ranked."""
    places = [write_run(tmp_path / name, seed=seed) for seed, name in enumerate("ab")]
    place = places[1] / "run.json"
    record = json.loads(place.read_text())
    record["compile_secs"] = record["memory_bytes"]["peak"] = record["sessions"][0]["secs"] = 185

    def best() -> dict[str, frozenset[int]]:
        place.write_text(json.dumps(record))
        found = comparison.compare(places)
        assert [warning for warning in found.warnings if "devices" in warning] == (
            ["The runs had different devices (cpu / 8 x NVIDIA H100): speed, memory and times do not compare."]
            if len(record["devices"]) > 1
            else []
        )
        names = ("tokens a second, median", "peak memory of a step", "wall time", "compile time")
        ranked = {line.name: line.best for line in found.lines if line.name in names}
        return {name.split()[0]: runs for name, runs in ranked.items() if runs}

    assert best().keys() == {"tokens", "peak", "wall"} and best()["wall"] == best()["peak"] == {1}
    metrics = places[0] / "metrics.jsonl"
    metrics.write_text("\n".join(metrics.read_text().splitlines()[:-3]) + "\n")
    assert best().keys() == {"tokens", "peak"}
    record["devices"] = ["NVIDIA H100"] * 8
    assert best() == {}


def test_names_beside_curves_are_short_and_different() -> None:
    given = ["short", "a" * 12 + "-lr0.001-" + "b" * 12, "a" * 12 + "-lr0.003-" + "b" * 12, "x" * overlay.LABEL_CHARS]
    found = overlay.labels(given)
    cut = "a" * 11 + "…" + "b" * 11
    assert found == ["short", f"{cut} (2)", f"{cut} (3)", given[3]]


def test_names_tell_runs_apart(tmp_path: Path) -> None:
    places = [tmp_path / "x" / "one" / "run", tmp_path / "y" / "one" / "run", tmp_path / "x" / "two"]
    assert comparison.short_names(places) == ["x/one/run", "y/one/run", f"{tmp_path.name}/x/two"]


def test_what_cannot_be_compared(tmp_path: Path) -> None:
    one, two = write_run(tmp_path / "one"), write_run(tmp_path / "two")
    (tmp_path / "link").symlink_to(one)
    empty = tmp_path / "empty"
    shutil.copytree(two, empty)
    (empty / "metrics.jsonl").write_text("")
    for places, words in (
        ([], "no directory was given"),
        ([one], f"only '{one}' was given"),
        ([one, two, one], f"'{one}' was given twice"),
        ([one, tmp_path / "link"], f"was given twice (as '{one}' and"),
        ([one, tmp_path], "is not a run directory"),
        ([one, empty], f"'{empty}' has no metrics yet"),
    ):
        with pytest.raises(ValueError, match=re.escape(words)) as error:
            comparison.compare(places)
        assert "\n  Accepted: " in str(error.value)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="--out '.*file' cannot be made"):
        comparison.write(comparison.compare([one, two]), tmp_path / "file")


def test_many_runs_and_any_name(tmp_path: Path) -> None:
    """More runs than colours; names with mathematics, and letters that the font lacks."""
    places = [write_run(tmp_path / f"run {index} $x_$ \u4e2d", steps=100, seed=index) for index in range(8)]
    page, _ = comparison.write(comparison.compare(places), tmp_path / "out")
    assert all(place.name in read_page(page).text for place in places)
    assert os.path.getsize(page) < 3_000_000
