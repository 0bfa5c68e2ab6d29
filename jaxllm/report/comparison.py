"""Several runs side by side: which numbers, what may be compared, and compare.html with compare.png."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxllm.report import canvas, html, overlay, runs
from jaxllm.report.html import Html
from jaxllm.report.runs import Run, number
from jaxllm.report.summary import Summary, inner, summarize
from jaxllm.report.units import count, duration, plain, size

PAGE, PICTURE = "compare.html", "compare.png"
COMPARED = ("data.target_field", "chat.format", "chat.template", "preference.beta")
# Fields that decide which tokens are predicted from what, or which answers are compared how, by objective.
TASKS = {
    "masked_lm": ("data.noise_frac", "data.whole_words"),
    "span_corruption": ("data.noise_frac", "data.mean_span_tokens"),
    "seq2seq": ("data.target_field", "data.input_tokens"),
    "dpo": (*COMPARED, "preference.loss", "preference.label_smoothing"),
    "kto": (*COMPARED, "preference.desirable_weight", "preference.undesirable_weight"),
    "orpo": COMPARED,
    "simpo": (*COMPARED, "preference.margin"),
    "reward": (*COMPARED[:-1], "reward.margin_factor"),
    "sft": ("data.target_field", "chat.format", "chat.template", "chat.train_on"),
    "sequence_classification": ("data.target_field", "data.pair_field"),
    "token_classification": ("data.target_field",),
}
# Fields that decide which text is held out.
HELD_OUT = ("source", "validation_source", "validation_frac", "split_by", "cleaners", "min_chars", "max_documents", "text_field")


@dataclass(frozen=True)
class Line:
    """One line of the table: a cell a run, "" where it is not known, and the runs that are best (none if that means nothing)."""

    name: str
    cells: list[str]
    best: frozenset[int]


@dataclass(frozen=True)
class Comparison:
    """names: short and different for every run. warnings: what does not compare. differences: config fields and their values."""

    runs: list[Run]
    names: list[str]
    lines: list[Line]
    warnings: list[str]
    differences: list[tuple[str, list[Any]]]
    same_tokens: bool


def compare(directories: Sequence[str | Path]) -> Comparison:
    """The runs in `directories`; ValueError for fewer than two, one given twice, what is no run, and a run without metrics."""
    places = [Path(directory).expanduser() for directory in directories]
    _check_places(places)
    found = [runs.read(place) for place in places]
    for run in found:
        if not run.train and not run.evals:
            raise ValueError(
                f"'{run.directory}' has no metrics yet: its metrics.jsonl is missing or empty.\n"
                "  Accepted: runs that have trained for a few steps.\n  Train it first, or leave it out."
            )
    names, summaries = short_names(places), [summarize(run) for run in found]
    same_tokens, same_task = len({_tokenizer(run) for run in found}) == 1, len({_task(run) for run in found}) == 1
    return Comparison(
        found,
        names,
        _lines(summaries, same_tokens, same_task),
        _warnings(found, names, summaries),
        _differences(found),
        same_tokens,
    )


def write(comparison: Comparison, out: str | Path) -> tuple[Path, Path]:
    """(compare.html, compare.png), written to the directory `out`, which is made if need be."""
    out = Path(out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"--out '{out}' cannot be made: {error.strerror}.\n  Accepted: a directory, there or not. Give another --out."
        ) from error
    scores = [_score(comparison), "train_loss"]
    picture = canvas.png(overlay.grid(comparison.runs, comparison.names, scores, canvas.LIGHT))
    html.write(out / PICTURE, picture)
    html.write(out / PAGE, _page(comparison, scores))
    return out / PAGE, out / PICTURE


def short_names(places: Sequence[Path]) -> list[str]:
    """The last part of each path, or as many parts as it takes to tell them apart."""
    parts = [place.resolve().parts for place in places]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return [str(place) for place in places]


def _check_places(places: Sequence[Path]) -> None:
    if len(places) < 2:
        given = f"only '{places[0]}'" if places else "no directory"
        raise ValueError(
            f"{given} was given to compare.\n  Accepted: two run directories or more: python -m jaxllm.compare runs/a runs/b.\n"
            "  Add the other one; report.html in a run directory shows a single run."
        )
    seen: dict[Path, Path] = {}
    for place in places:
        if (first := seen.setdefault(place.resolve(), place)) is not place:
            also = f" (as '{first}' and '{place}')" if str(first) != str(place) else ""
            raise ValueError(f"'{place}' was given twice{also}.\n  Accepted: different run directories. Leave one of them out.")


def _lines(summaries: Sequence[Summary], same_tokens: bool, same_task: bool) -> list[Line]:
    def line(
        name: str, get: Callable[[Summary], Any], form: Callable[[Any], str], better: Callable[..., float] | None = None
    ) -> Line:
        values = [get(summary) for summary in summaries]
        known = [value for value in values if number(value) is not None]
        winner = better(known) if better and len(set(known)) > 1 else None
        best = frozenset(index for index, value in enumerate(values) if value == winner) if winner is not None else frozenset()
        return Line(name, ["" if value is None else form(value) for value in values], best)

    # What does not compare is told, but none is called the best: losses a token of different tokenizers or objectives, speed on
    # different devices, time for different amounts of text, and compile time, as a program may come from the cache on disk.
    lowest, highest = (min, max) if same_tokens and same_task else (None, None)
    same_devices = len({summary.devices for summary in summaries}) == 1
    least, most = (min, max) if same_devices else (None, None)
    same_work = len({summary.tokens for summary in summaries}) == 1
    return [
        line("architecture", lambda s: s.architecture, str),
        line("objective", lambda s: s.objective, str),
        line("layers / width / heads", lambda s: s.shape, str),
        line("parameters", lambda s: s.parameters, count),
        line("steps", lambda s: s.steps, lambda value: f"{value:,}"),
        line("tokens seen", lambda s: s.tokens, count),
        line("training loss", lambda s: s.train_loss, "{:.4f}".format, lowest),
        line("validation loss, best", lambda s: number(s.best.get("loss")), "{:.4f}".format, lowest),
        line("validation loss, final", lambda s: number(s.final.get("loss")), "{:.4f}".format, lowest),
        line("token perplexity, final", lambda s: number(s.final.get("perplexity")), "{:.2f}".format, lowest),
        line("likeliest token is right, final", _final("accuracy", of_pairs=False), "{:.1%}".format, highest),
        *(
            line(f"{name}, final", _final(key, of_pairs=True), form, highest)
            for name, key, form in (
                ("accuracy of pairs", "accuracy", "{:.1%}".format),
                ("reward margin", "margin", "{:+.4f}".format),
            )
            if any("margin" in summary.final for summary in summaries)
        ),
        *(
            line(f"unigram baseline: {name}", _final(key), form)
            for name, key, form in (("loss", "baseline_loss", "{:.4f}".format), ("right", "baseline_accuracy", "{:.1%}".format))
            if any(key in summary.final for summary in summaries)
        ),
        line("bits per byte, final", lambda s: number(s.final.get("bits_per_byte")), "{:.3f}".format, min),
        line("devices", lambda s: s.devices, str),
        line("tokens a second, median", lambda s: s.tokens_per_sec, count, most),
        line("peak memory of a step", lambda s: s.peak_bytes, size, least),
        line("compile time", lambda s: s.compile_secs, duration),
        line("wall time", lambda s: s.wall_secs, duration, least if same_work else None),
    ]


def _final(key: str, of_pairs: bool | None = None) -> Callable[[Summary], float | None]:
    """The number under this name in a run's last validation. of_pairs: where that is of preferences (True), or where it is not (False)."""

    def get(summary: Summary) -> float | None:
        return number(summary.final.get(key)) if of_pairs in (None, "margin" in summary.final) else None

    return get


def _warnings(found: Sequence[Run], names: Sequence[str], summaries: Sequence[Summary]) -> list[str]:
    told = []
    tasks = list(dict.fromkeys(_task(run) for run in found))
    if len(tasks) > 1:
        told.append(
            f"The runs predict different things ({' / '.join(tasks)}): losses, perplexities and accuracies do not compare between them,"
            " each does with its own unigram baseline. Bits per byte are of causal_lm alone."
        )
    if len({_tokenizer(run) for run in found}) > 1:
        told.append("The tokenizers differ: losses and perplexities a token do not compare, bits per byte does.")
    differing = [f"data.{name}" for name in HELD_OUT if _differs(found, f"data.{name}")]
    if differing or _differs(found, "eval.max_seqs"):
        fields = ", ".join([*differing, *(["eval.max_seqs"] if _differs(found, "eval.max_seqs") else [])])
        told.append(f"The runs were not validated on the same text ({fields} differ), so no validation figure compares exactly.")
    windows = [run.config.get("data.row_tokens") or run.config.get("model.context_tokens") for run in found]
    if len(set(windows)) > 1:
        told.append(
            f"The rows have {_listed(list(dict.fromkeys(windows)))} tokens: a longer context makes each token easier to predict."
        )
    devices = list(dict.fromkeys(summary.devices for summary in summaries))
    if len(devices) > 1:
        told.append(f"The runs had different devices ({_listed(devices)}): speed, memory and times do not compare.")
    for run, name, summary in zip(found, names, summaries, strict=True):
        if summary.total_steps and summary.steps < summary.total_steps:
            told.append(f"{name} stopped at step {summary.steps:,} of {summary.total_steps:,.0f}.")
        told += [f"{name}: {note}" for note in run.notes]
    return told


def _listed(values: Sequence[Any]) -> str:
    return " / ".join("unknown" if value is None else str(value) for value in values)


def _differs(found: Sequence[Run], key: str) -> bool:
    return len({repr(run.config.get(key)) for run in found if run.config}) > 1


def _differences(found: Sequence[Run]) -> list[tuple[str, list[Any]]]:
    keys = dict.fromkeys(key for run in found for key in run.config)
    return [(key, [run.config.get(key) for run in found]) for key in keys if _differs(found, key)]


def _task(run: Run) -> str:
    """What is predicted, in words: equal for runs whose losses compare."""
    objective = runs.learns_from(run) or "unknown"
    fields = {key.partition(".")[2]: run.config.get(key) for key in TASKS.get(objective, ())}
    return objective + (f" ({', '.join(f'{name} {value}' for name, value in fields.items())})" if fields else "")


def _tokenizer(run: Run) -> str:
    """Equal for equal tokenizers: its fingerprint, or what it was made from if data.json does not tell."""
    known = inner(run.data, "tokenizer").get("fingerprint")
    return str(
        known or [run.config.get(key) for key in ("tokenizer.kind", "tokenizer.vocab_size", "tokenizer.path", "data.source")]
    )


def _score(comparison: Comparison) -> str:
    """What the validation curves show: bits per byte where losses do not compare and every run has measured it."""
    measured = all(any(number(row.get("bits_per_byte")) is not None for row in run.evals) for run in comparison.runs)
    return "bits_per_byte" if not comparison.same_tokens and measured else "loss"


def _page(comparison: Comparison, scores: Sequence[str]) -> str:
    def cells(line: Line) -> list[Html]:
        return [html.tag("td", cell, css="best" if index in line.best else "") for index, cell in enumerate(line.cells)]

    header = ("", *comparison.names)
    rows = [(line.name, *cells(line)) for line in comparison.lines]
    pictures = [_picture(comparison, score, against) for score in scores for against in overlay.AGAINST]
    fields = [
        (html.tag("code", key), *(html.tag("code", plain(value)) for value in values)) for key, values in comparison.differences
    ]
    places = [(name, html.tag("code", str(run.directory))) for name, run in zip(comparison.names, comparison.runs, strict=True)]
    return html.page(
        "Comparison - jaxllm",
        html.tag("h1", f"{len(comparison.runs)} runs compared"),
        html.tag("p", ", ".join(comparison.names), css="faint"),
        html.notes(comparison.warnings),
        html.table(header, rows, css="runs"),
        html.tag(
            "p",
            "The best figure of a line is green and bold, where one can be called the best. "
            "Compile time is short where the compiled program was in the cache on disk.",
            css="faint small",
        ),
        html.tag("div", *pictures, css="row pairs"),
        html.section(
            "What differs in the configuration",
            html.table(("field", *comparison.names), fields, css="runs") if fields else "Nothing.",
        ),
        html.section("Directories", html.table((), places)),
    )


def _picture(comparison: Comparison, score: str, against: str) -> Html:
    light, dark = (
        canvas.png(overlay.panel(comparison.runs, comparison.names, score, against, theme)) for theme in (canvas.LIGHT, canvas.DARK)
    )
    return html.picture(light, dark, f"{overlay.SCORES[score][0]} of every run against {overlay.AGAINST[against]}")
