"""report.html of one run: what came out, how it went, what it was made from, and how to go on."""

import json
import math
import os
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxllm import config as schema
from jaxllm.consistency import ANSWERING
from jaxllm.report import canvas, curves, healthy, html, runs
from jaxllm.report.html import Html
from jaxllm.report.runs import Run, number
from jaxllm.report.summary import Summary, describe_change, inner, sessions, summarize
from jaxllm.report.units import clock, count, duration, plain, size

REPORT, PICTURES = "report.html", "pictures"


def write_report(workdir: str | Path) -> Path:
    """The path of report.html, written from the files of the run directory, with pictures/*.png. What is missing is said there."""
    run = runs.read(workdir)
    summary = summarize(run)
    (run.directory / PICTURES).mkdir(exist_ok=True)
    pictures = {}
    for name, (draw, caption) in curves.PICTURES.items():
        light, dark = draw(run, canvas.LIGHT), draw(run, canvas.DARK)
        if light is not None and dark is not None:
            plain = canvas.png(light)
            html.write(run.directory / PICTURES / f"{name}.png", plain)
            pictures[name] = html.picture(plain, canvas.png(dark), caption)
    html.write(run.directory / REPORT, _page(run, summary, pictures))
    return run.directory / REPORT


def _page(run: Run, summary: Summary, pictures: dict[str, Html]) -> str:
    small = [picture for name, picture in pictures.items() if name not in ("loss", "reward")]
    reading = REWARDS_READING if run.rollouts else _healthy(run) if runs.prefers(run) else _reading(summary)
    return html.page(
        f"{run.name} - jaxllm",
        html.tag("h1", run.name),
        html.tag("p", _subtitle(run, summary), css="faint"),
        html.notes(_notes(run, summary)),
        html.numbers(_rewards(run) + _numbers(summary)),
        pictures.get("loss", "") or pictures.get("reward", ""),
        html.tag("p", change) if (change := describe_change(run)) else "",
        reading,
        html.tag("div", *small, css="row") if small else "",
        _samples(run),
        _commands(run),
        _data(run),
        _config(run),
        _environment(run),
    )


def _subtitle(run: Run, summary: Summary) -> str:
    steps = f"{summary.steps:,}" + (f" of {summary.total_steps:,}" if summary.total_steps else "") + " steps"
    parts = [
        summary.architecture,
        summary.shape and f"{summary.shape} layers / width / heads",
        steps,
        run.config.get("data.source"),
    ]
    return " · ".join(str(part) for part in parts if part)


def _notes(run: Run, summary: Summary) -> list[str]:
    found = list(run.notes)
    if not run.train and not run.evals:
        found.append("There are no metrics yet.")
    elif summary.total_steps and summary.steps < summary.total_steps:
        reason = sessions(run)[-1].get("reason") if sessions(run) else None
        why = f" ({reason})" if reason else ""
        found.append(f"Training stopped after {summary.steps:,} of {summary.total_steps:,.0f} steps{why}. See below how to resume.")
    if summary.skipped:
        found.append(f"{summary.skipped:,.0f} steps were skipped because the loss or the gradient was not finite.")
    if run.train and not run.evals:
        found.append("The validation loss has not been measured yet.")
    return found


def _numbers(summary: Summary) -> list[tuple[str, str, str]]:
    """(figure, what it is, small print) of everything that is known."""

    def shown(value: Any, form: str) -> str | None:
        return None if number(value) is None else format(value, form)

    final, best = summary.final, summary.best
    at_best = f"best {best['loss']:.4f} at step {best['step']:,}" if best and best["step"] != final["step"] else "also the best"
    compiled = f"compiling took {duration(summary.compile_secs)}" if summary.compile_secs is not None else ""
    found = [
        (shown(final.get("loss"), ".4f"), "validation loss", at_best),
        (shown(final.get("perplexity"), ".2f"), "perplexity", "a token, validation"),
        (shown(final.get("bits_per_byte"), ".3f"), "bits per byte", "any tokenizer"),
        (shown(final.get("accuracy"), ".1%") if "margin" in final else None, "accuracy", "of pairs, validation"),
        (shown(final.get("margin"), "+.3f"), "reward margin", "chosen less rejected, validation"),
        (shown(final.get("calibration_error"), ".3f"), "calibration error", "of probabilities, validation"),
        (shown(final.get("forgetting"), "+.4f"), "forgetting", "nats a token, replay_source"),
        (shown(summary.train_loss, ".4f"), "training loss", "mean of the last rows"),
        (summary.tokens and count(summary.tokens), "tokens seen", ""),
        (summary.tokens_per_sec and count(summary.tokens_per_sec), "tokens a second", "median"),
        (summary.wall_secs and duration(summary.wall_secs), "wall time", compiled),
        (
            summary.parameters and count(summary.parameters),
            "parameters",
            f"{summary.parameters:,.0f}" if summary.parameters else "",
        ),
        (summary.peak_bytes and size(summary.peak_bytes), "peak memory", "a step on one device, by the compiler"),
    ]
    return [(value, name, also) for value, name, also in found if value]


def _rewards(run: Run) -> list[tuple[str, str, str]]:
    """The last validation of a model that learns from rewards."""
    final = [(row, reward) for row in run.evals if (reward := number(row.get("reward"))) is not None][-1:]
    return [
        (f"{reward:.4f}", "validation reward", f"likeliest answers to {row.get('answers', '?')} prompts") for row, reward in final
    ]


REWARDS_READING = html.tag(
    "p",
    "Reward is the mean of what answers are worth: those that the model drew for training, and its likeliest ones to held-out prompts. The"
    " loss of a policy gradient is no measure of progress: its mean is near 0 whatever the model knows.",
    css="faint small",
)


def _reading(summary: Summary) -> Html:
    """One paragraph for those who see such a curve for the first time."""
    if not summary.final and summary.train_loss is None:
        return Html("")
    guess = (
        f" Guessing among {summary.vocab_size:,.0f} tokens with equal chances has loss ln({summary.vocab_size:,.0f}) ="
        f" {math.log(summary.vocab_size):.2f}."
        if summary.vocab_size
        else ""
    )
    return html.tag(
        "p",
        "Loss is the mean of -ln(probability given to the token that came next): lower is better."
        f"{guess} Perplexity is e to the loss. The faint line is one batch, the strong one its moving mean. "
        "A validation curve that turns up while training goes down means overfitting.",
        css="faint small",
    )


def _healthy(run: Run) -> Html:
    """What is measured of preferences: at the beginning, at the end, and what it looks like when all is well."""
    first, last = (run.evals[0], run.evals[-1]) if run.evals else ({}, {})
    told = healthy.of(run.config["train.objective"])

    def cell(row: Mapping[str, Any], name: str) -> str:
        value = number(row.get(name))
        return "" if value is None else f"{value:.4f}"

    present = [name for name in told if any(number(row.get(name)) is not None for row in (*run.evals, *run.train[-1:]))]
    rows = [
        (name.replace("_", " "), cell(first, name), cell(last, name), html.tag("span", told[name], css="faint")) for name in present
    ]
    steps = [f"step {row['step']:,}" if row else "" for row in (first, last)]
    return (
        html.section("What is measured", html.table(("on validation pairs", *steps, "when all is well"), rows))
        if rows
        else Html("")
    )


def _samples(run: Run) -> Html:
    if not run.samples:
        return Html("")
    *earlier, (heading, body) = run.samples
    shown = html.tag("div", html.tag("p", heading, css="faint small"), html.tag("pre", body), css="card")
    older = [
        html.tag("div", html.tag("p", title, css="faint small"), html.tag("pre", text), css="card") for title, text in earlier[::-1]
    ]
    return html.section("What it writes", shown, html.folded(f"Earlier samples ({len(older)})", *older) if older else "")


def _commands(run: Run) -> Html:
    python, place = interpreter(), shlex.quote(str(run.directory))
    config = shlex.quote(str(run.directory / runs.CONFIG))
    prompts = run.config.get("sample.prompts")
    prompt = prompts[0] if isinstance(prompts, list) and prompts and isinstance(prompts[0], str) else "The "
    command = "generate --chat" if runs.learns_from(run) in ANSWERING else "generate"
    use = ("Write text", f"{python} -m jaxllm.{command} --run {place} --prompt {shlex.quote(prompt)}")
    if run.config.get("model.head") in ("classify", "tag"):
        use = ("Classify a text", f"{python} -m jaxllm.classify --run {place} --text TEXT")
    if run.config.get("train.objective") == "reward":
        use = ("Compare answers", f"{python} -m jaxllm.reward --run {place} --prompt PROMPT --answer ANSWER --answer OTHER")
    score = ("Score a text", f"{python} -m jaxllm.evaluate --run {place} --data FILE")
    if runs.prefers(run):
        score = ("Measure it on the validation rows", f"{python} -m jaxllm.evaluate --run {place}")
    rows = [
        use,
        score,
        ("Resume, if it stopped early", f"{python} -m jaxllm.train --config {config} --workdir {place}"),
        ("Compare with other runs", f"{python} -m jaxllm.compare {place} OTHER_RUN"),
        ("Look closer", f"{interpreter('tensorboard')} --logdir {shlex.quote(str(run.directory / 'tensorboard'))}"),
    ]
    return html.section("How to go on", html.table((), [(what, html.tag("code", command)) for what, command in rows]))


def interpreter(name: str = "python") -> str:
    """How a person calls this Python (or another program installed beside it) from the current directory."""
    beside = Path(sys.executable).parent
    if sys.prefix == sys.base_prefix or os.environ.get("VIRTUAL_ENV") == sys.prefix:
        return name
    relative = os.path.relpath(beside / name)
    return shlex.quote(str(beside / name) if relative.startswith("..") else relative)


def _data(run: Run) -> Html:
    if not run.data:
        return Html("")
    grids = [_grid(name, inner(run.data, name)) for name in ("splits", "documents") if inner(run.data, name)]
    origins = [(field, _origin(entry)) for field, entries in inner(run.data, "origins").items() for entry in entries[:20]]
    more = {name: value for name, value in run.data.items() if name not in ("splits", "documents", "origins")}
    return html.section(
        "What it was trained on",
        *grids,
        html.table((), origins) if origins else "",
        html.folded("How it was prepared", html.table((), _lines(more))),
    )


def _grid(title: str, records: Mapping[str, Any]) -> Html:
    """A row a record, a column a field."""
    records = {name: record for name, record in records.items() if isinstance(record, Mapping)}
    fields = list(dict.fromkeys(field for record in records.values() for field in record))
    rows = [(name, *(_cell(field, record.get(field)) for field in fields)) for name, record in records.items()]
    return html.table((title, *(field.replace("_", " ") for field in fields)), rows)


def _origin(entry: Any) -> str:
    """'path, 1.2 MiB, sha256 0123456789abcdef' of one entry of data.json's origins."""
    if not isinstance(entry, Mapping):
        return plain(entry)
    return ", ".join(
        f"{'' if key == 'path' else key + ' '}{_cell(key, value)}" for key, value in entry.items() if key != "mtime_ns" and value
    )


def _cell(field: str, value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {plain(part)}" for name, part in value.items()) or "none"
    if isinstance(value, str) and len(value) == 64 and field in ("sha256", "fingerprint"):
        return value[:16]
    return size(value) if field.endswith("bytes") and number(value) is not None else plain(value)


def _config(run: Run) -> Html:
    if not run.config:
        return Html("")
    default = schema.flatten(json.loads(schema.to_json(schema.base())))

    def line(key: str) -> tuple[Any, ...]:
        meaning = schema.SCHEMA[key].meaning if key in schema.SCHEMA else "not known to this version of jaxllm"
        return (
            html.tag("code", key),
            html.tag("code", plain(run.config[key])),
            plain(default.get(key, "")),
            html.tag("span", meaning, css="faint"),
        )

    header = ("field", "value", "default", "meaning")
    changed = [key for key in run.config if run.config[key] != default.get(key)]
    rows = html.table(header, map(line, changed)) if changed else html.tag("p", "Every field has its default.")
    return html.section(
        "Configuration", rows, html.folded(f"All {len(run.config)} fields", html.table(header, map(line, run.config)))
    )


def _environment(run: Run) -> Html:
    if not run.environment:
        return Html("")
    found = {key: value for key, value in run.environment.items() if key != "sessions"}
    parts = [html.table((), list(_lines(found)))]
    if len(sessions(run)) > 1:
        header = ("started", "ended", "steps", "time", "end")
        parts.append(html.folded(f"{len(sessions(run))} sessions", html.table(header, map(_session, sessions(run)))))
    return html.section("Where it ran", *parts)


def _session(session: Mapping[str, Any]) -> tuple[str, ...]:
    secs = number(session.get("secs"))
    steps = f"{plain(session.get('start_step', '?'))} to {plain(session.get('end_step', '?'))}"
    return (
        plain(session.get("started", "")),
        plain(session.get("ended", "")),
        steps,
        clock(secs) if secs else "",
        plain(session.get("reason", "")),
    )


def _lines(record: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """("versions.jax", "0.10.2"), ...: a nested record as a list."""
    found: list[tuple[str, str]] = []
    for key, value in record.items():
        if isinstance(value, Mapping):
            found += _lines(value, f"{prefix}{key}.")
        else:
            found.append((f"{prefix}{key}", _cell("bytes" if "bytes" in prefix else key, value)))
    return found
