"""The pictures of one run."""

from collections.abc import Callable

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from jaxllm.report import canvas
from jaxllm.report.canvas import Theme
from jaxllm.report.runs import Row, Run, column, loss_unit, prefers
from jaxllm.report.summary import smoothed

Draw = Callable[[Run, Theme], Figure | None]

# Inches. The small ones share a row of the page, so they are small in inches too: their letters shrink with them.
WIDE, SMALL = (7.0, 3.8), (3.7, 2.4)


def loss(run: Run, theme: Theme) -> Figure | None:
    """Training loss, raw and smoothed, and every evaluation, that of replay too; None if there is nothing worth drawing."""
    if run.rollouts:
        return None  # a policy gradient's, whose size says nothing
    steps, raw = column(run.train, "step"), column(run.train, "loss")
    eval_steps, scores, replayed = (column(run.evals, name) for name in ("step", "loss", "replay_loss"))
    if not np.isfinite(raw).any() and not np.isfinite(scores).any():
        return None
    drawn = canvas.figure(theme, *WIDE)
    axes = drawn.add_subplot()
    canvas.dress(axes, theme, "Loss", "step", loss_unit([run]))
    canvas.count_ticks(axes.xaxis)
    smooth, (blue, orange, third) = smoothed(raw), theme.lines[:3]
    axes.plot(steps, raw, color=blue, linewidth=0.8, alpha=0.35)
    canvas.line(axes, steps, smooth, blue)
    evaluated = [(scores, orange)] + ([(replayed, third)] if np.isfinite(replayed).any() else [])
    for values, color in evaluated:
        axes.plot(eval_steps, values, color=color, linewidth=1.2, marker="o", markersize=5)
    cut = canvas.fit(axes, [raw, scores, replayed])
    if cut is not None:
        first = raw[np.isfinite(raw)][0]
        axes.set_title(f"starts at {first:.2f}, above the picture", loc="right", fontsize=8.5, color=theme.faint, pad=10)
    ends = [
        (f"{name} {_last(values):.3f}", _last(where), _last(values), color)
        for name, where, values, color in (
            ("training", steps, smooth, blue),
            ("validation", eval_steps, scores, orange),
            ("replay", eval_steps, replayed, third),
        )
        if np.isfinite(values).any()
    ]
    axes.set_xlim(left=0)
    canvas.label_ends(axes, ends)
    return drawn


def reward(run: Run, theme: Theme) -> Figure | None:
    """What drawn answers were worth, raw and smoothed, and every evaluation."""
    steps, raw = column(run.rollouts, "step"), column(run.rollouts, "reward")
    eval_steps, scores = column(run.evals, "step"), column(run.evals, "reward")
    if not np.isfinite(raw).any():
        return None
    drawn = canvas.figure(theme, *WIDE)
    axes = drawn.add_subplot()
    canvas.dress(axes, theme, "Reward", "step", "mean of the answers")
    canvas.count_ticks(axes.xaxis)
    smooth, (blue, orange) = smoothed(raw), theme.lines[:2]
    axes.plot(steps, raw, color=blue, linewidth=0.8, alpha=0.35)
    canvas.line(axes, steps, smooth, blue)
    axes.plot(eval_steps, scores, color=orange, linewidth=1.2, marker="o", markersize=5)
    ends = [(f"drawn {_last(smooth):.3f}", _last(steps), _last(smooth), blue)]
    if np.isfinite(scores).any():
        ends.append((f"held out {_last(scores):.3f}", _last(eval_steps), _last(scores), orange))
    axes.set_xlim(left=0)
    canvas.label_ends(axes, ends)
    return drawn


def answer_tokens(run: Run, theme: Theme) -> Figure | None:
    return _small(run.rollouts, theme, "answer_tokens", "Length of answers", "tokens", _plain)


def distance(run: Run, theme: Theme) -> Figure | None:
    return _small(run.rollouts, theme, "kl", "Distance from the beginning", "nats an answer", _plain)


def entropy(run: Run, theme: Theme) -> Figure | None:
    return _small(run.rollouts, theme, "entropy", "Entropy of the policy", "nats a token", _plain)


def explained(run: Run, theme: Theme) -> Figure | None:
    return _small(run.rollouts, theme, "explained", "What values know of returns", "share of the variance", _plain)


def coefficient(run: Run, theme: Theme) -> Figure | None:
    return _small(run.rollouts, theme, "kl_coefficient", "KL coefficient", "reward a nat", _plain)


def _plain(axes: Axes) -> None:
    del axes


def learning_rate(run: Run, theme: Theme) -> Figure | None:
    def ticks(axes: Axes) -> None:
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.1e}".replace("e-0", "e-") if value else "0"))
        axes.set_ylim(bottom=0)

    return _small(run.train, theme, "lr", "Learning rate", "size of a step", ticks)


def gradient_norm(run: Run, theme: Theme) -> Figure | None:
    def ticks(axes: Axes) -> None:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_locator(NullLocator())

    if not (column(run.train, "grad_norm") > 0).any():
        return None  # as where no answer of a short run was worth anything
    return _small(run.train, theme, "grad_norm", "Gradient norm before clipping", "global norm (log scale)", ticks)


def speed(run: Run, theme: Theme) -> Figure | None:
    def ticks(axes: Axes) -> None:
        canvas.count_ticks(axes.yaxis)
        axes.set_ylim(bottom=0)

    # Without its first row, which includes compilation.
    return _small(run.train[1:], theme, "tokens_per_sec", "Speed", "tokens a second", ticks)


def accuracy(run: Run, theme: Theme) -> Figure | None:
    return _compared(run, theme, {"accuracy": "accuracy"}, "Accuracy", "share of the pairs")


def margin(run: Run, theme: Theme) -> Figure | None:
    return _compared(run, theme, {"margin": "margin"}, "Reward margin", "chosen less rejected")


def rewards(run: Run, theme: Theme) -> Figure | None:
    return _compared(run, theme, {"chosen_reward": "chosen", "rejected_reward": "rejected"}, "Rewards", "mean")


def logps(run: Run, theme: Theme) -> Figure | None:
    return _compared(run, theme, {"chosen_logp": "chosen", "rejected_logp": "rejected"}, "Log-probabilities", "nats")


def divergence(run: Run, theme: Theme) -> Figure | None:
    return _compared(run, theme, {"kl": "KL"}, "Divergence from the reference", "nats an answer")


def calibration(run: Run, theme: Theme) -> Figure | None:
    """Of the last evaluation: how often the higher reward is the chosen answer's, by the probability that the rewards give to it."""
    bins = next((row["calibration"] for row in reversed(run.evals) if row.get("calibration")), None)
    if bins is None:
        return None
    predicted, right, pairs = np.array(bins, np.float64).T
    drawn = canvas.figure(theme, *SMALL)
    axes = drawn.add_subplot()
    canvas.dress(axes, theme, "Calibration", "probability by the rewards", "share that is right")
    axes.plot([0.5, 1], [0.5, 1], color=theme.faint, linewidth=0.8)
    canvas.line(axes, predicted, right, theme.lines[0])
    # Their areas are the numbers of pairs.
    axes.scatter(predicted, right, s=10 + 150 * pairs / pairs.max(), color=theme.lines[0], alpha=0.5, linewidth=0)
    axes.set_xlim(0.5, 1.02)
    axes.set_ylim(min(0.45, float(right.min()) - 0.05), 1.05)
    return drawn


# Name of the file and what a screen reader says, in the order of the page.
PICTURES: dict[str, tuple[Draw, str]] = {
    "loss": (loss, "Training and validation loss against the step"),
    "reward": (reward, "Reward of drawn and of held-out answers against the step"),
    "answer_tokens": (answer_tokens, "Tokens an answer against the step"),
    "kl": (distance, "Divergence from the model before step 0 against the step"),
    "entropy": (entropy, "Entropy of the policy against the step"),
    "explained": (explained, "Share of the variance of returns that the values explain against the step"),
    "kl_coefficient": (coefficient, "Coefficient of the divergence in the rewards against the step"),
    "accuracy": (accuracy, "Share of the pairs whose chosen answer has the higher reward against the step"),
    "margin": (margin, "Difference of the rewards of chosen and rejected answers against the step"),
    "rewards": (rewards, "Rewards of chosen and rejected answers against the step"),
    "logps": (logps, "Log-probabilities of chosen and rejected answers against the step"),
    "divergence": (divergence, "Divergence of the model from its reference against the step"),
    "calibration": (
        calibration,
        "Share of the pairs in which the higher reward is right against the probability that the rewards say",
    ),
    "learning_rate": (learning_rate, "Learning rate against the step"),
    "gradient_norm": (gradient_norm, "Gradient norm against the step"),
    "tokens_per_sec": (speed, "Tokens per second against the step"),
}


def _compared(run: Run, theme: Theme, names: dict[str, str], title: str, unit: str) -> Figure | None:
    """Smoothed metrics of preferences in training, each under its name, and its evaluations as points."""
    steps, eval_steps = column(run.train, "step"), column(run.evals, "step")
    found = {shown: (smoothed(column(run.train, name)), column(run.evals, name)) for name, shown in names.items()}
    found = {shown: both for shown, both in found.items() if any(np.isfinite(values).any() for values in both)}
    if not prefers(run) or not found:
        return None
    drawn = canvas.figure(theme, *SMALL)
    axes = drawn.add_subplot()
    canvas.dress(axes, theme, title, "step", unit)
    canvas.count_ticks(axes.xaxis)
    ends = []
    for (shown, (trained, evaluated)), color in zip(found.items(), theme.lines, strict=False):
        canvas.line(axes, steps, trained, color)
        axes.plot(eval_steps, evaluated, color=color, linewidth=0, marker="o", markersize=4)
        where, values = (steps, trained) if np.isfinite(trained).any() else (eval_steps, evaluated)
        ends.append((f"{shown} {_last(values):.3g}", float(where[np.isfinite(values)][-1]), _last(values), color))
    axes.set_xlim(left=0)
    if len(ends) > 1:
        canvas.label_ends(axes, ends)
    return drawn


def _small(rows: list[Row], theme: Theme, name: str, title: str, unit: str, ticks: Callable[[Axes], None]) -> Figure | None:
    values = column(rows, name)
    if not np.isfinite(values).any():
        return None
    drawn = canvas.figure(theme, *SMALL)
    axes = drawn.add_subplot()
    canvas.dress(axes, theme, title, "step", unit)
    canvas.count_ticks(axes.xaxis)
    canvas.line(axes, column(rows, "step"), values, theme.lines[0])
    axes.set_xlim(left=0)
    ticks(axes)
    return drawn


def _last(values: np.ndarray) -> float:
    return float(values[np.isfinite(values)][-1])
