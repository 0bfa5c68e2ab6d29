"""The few numbers that a run comes down to."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxllm.report.runs import Row, Run, column, elapsed, number

# Rows on either side that a smoothed value averages over, as a share of all rows.
SMOOTH_FRAC = 0.02


@dataclass(frozen=True)
class Summary:
    """None: the run directory does not say.

    train_loss is the smoothed loss at the end; best and final are rows of kind "eval"; tokens_per_sec is the median of the logged
    rows; peak_bytes is the compiler's figure for one device; wall_secs adds up the sessions; devices is "cpu" or "8 x NVIDIA H100".
    """

    architecture: str | None
    objective: str | None
    shape: str | None
    devices: str | None
    parameters: float | None
    steps: int
    total_steps: float | None
    tokens: float | None
    train_loss: float | None
    final: Row
    best: Row
    tokens_per_sec: float | None
    peak_bytes: float | None
    compile_secs: float | None
    wall_secs: float | None
    skipped: float | None
    vocab_size: float | None


def summarize(run: Run) -> Summary:
    rows, environment = run.train, run.environment
    smooth = smoothed(column(rows, "loss"))
    scored = [row for row in run.evals if number(row.get("loss")) is not None]
    # The first row includes compilation.
    speeds = column(rows[1:] or rows, "tokens_per_sec")
    return Summary(
        architecture=run.config.get("model.name"),
        objective=run.config.get("train.objective"),
        shape=_shape(run.config),
        devices=_devices(environment.get("devices")),
        parameters=number(environment.get("parameters")),
        steps=max((row["step"] for row in [*rows, *run.evals]), default=0),
        total_steps=number(run.config.get("train.steps")),
        tokens=number(rows[-1].get("tokens")) if rows else None,
        train_loss=float(smooth[np.isfinite(smooth)][-1]) if np.isfinite(smooth).any() else None,
        final=scored[-1] if scored else {},
        best=min(scored, key=lambda row: row["loss"]) if scored else {},
        tokens_per_sec=float(np.nanmedian(speeds)) if np.isfinite(speeds).any() else None,
        peak_bytes=number(inner(environment, "memory_bytes").get("peak")),
        compile_secs=number(environment.get("compile_secs")),
        wall_secs=_wall_secs(run),
        skipped=max(filter(None, (number(row.get("skipped")) for row in rows)), default=0) if rows else None,
        vocab_size=number(inner(run.data, "tokenizer").get("vocab_size")) or number(run.config.get("model.vocab_size")) or None,
    )


def describe_change(run: Run) -> str | None:
    """What changed from step 0 to the last evaluation, in one line; None unless both are there."""
    if change := _reward_change(run):
        return change
    scored = [row for row in run.evals if number(row.get("loss")) is not None]
    if len(scored) < 2 or scored[0]["step"] != 0:
        return None
    first, last = scored[0], scored[-1]
    line = f"validation {first['loss']:.3f} -> {last['loss']:.3f}"
    before, forgetting = number(first.get("replay_loss")), number(last.get("forgetting"))
    if before is None or forgetting is None:
        return line
    return f"{line}; on replay_source {before:.3f} -> {before + forgetting:.3f} (forgetting {forgetting:+.3f})"


def _reward_change(run: Run) -> str | None:
    rewarded = [row for row in run.evals if number(row.get("reward")) is not None]
    if len(rewarded) < 2 or rewarded[0]["step"] != 0:
        return None
    return f"validation reward {rewarded[0]['reward']:.3f} -> {rewarded[-1]['reward']:.3f}"


def smoothed(values: np.ndarray) -> np.ndarray:
    """Mean over 2 % of the rows (at least 2) on either side, so that it does not lag; NaN counts for nothing and stays NaN.

    The window is smaller near the first row, whose neighbours on one side would pull it down, and one-sided near the last one.
    """
    index = np.arange(len(values))
    reach = np.minimum(index, max(2, round(SMOOTH_FRAC * len(values))))
    finite = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(finite, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(finite)])
    first, end = index - reach, np.minimum(index + reach + 1, len(values))
    means = (sums[end] - sums[first]) / np.maximum(counts[end] - counts[first], 1)
    return np.where(finite, means, np.nan)


def sessions(run: Run) -> list[dict[str, Any]]:
    """Each start of the run, from run.json."""
    found = run.environment.get("sessions")
    return [session for session in found if isinstance(session, dict)] if isinstance(found, list) else []


def inner(record: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """The JSON object under this name; empty if there is none."""
    found = record.get(name)
    return found if isinstance(found, Mapping) else {}


def _shape(config: dict[str, Any]) -> str | None:
    layers, width, heads = (config.get(f"model.{name}") for name in ("layers", "width", "heads"))
    if None in (layers, width, heads):
        return None
    kv_heads = config.get("model.kv_heads") or heads
    return f"{layers} / {width} / {heads}" + (f" ({kv_heads} kv)" if kv_heads != heads else "")


def _devices(kinds: Any) -> str | None:
    if not isinstance(kinds, list):
        return None
    counts = Counter(str(kind) for kind in kinds)
    return ", ".join(kind if count == 1 else f"{count} x {kind}" for kind, count in counts.items()) or None


def _wall_secs(run: Run) -> float | None:
    """Sum over the sessions; by the rows if run.json lacks one, as when the last session was killed."""
    from_rows = elapsed(run.train)
    latest = float(np.nanmax(from_rows)) if np.isfinite(from_rows).any() else None
    told = [number(session.get("secs")) for session in sessions(run)]
    if not told or None in told:
        return latest
    return max(sum(secs for secs in told if secs is not None), latest or 0.0)
