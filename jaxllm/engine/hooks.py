"""What happens beside training: validation, samples, checkpoints. Each is a closure for `loop.Hook.run`."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]


class Validation:
    """Evaluates and remembers the loss, so that the checkpoint of the same step can be ranked by it.

    Forgetting is the loss on data.replay_source (`replay_loss` of a row) minus that at step 0, in nats a token. first: the row of step
    0, if an earlier session has measured it.
    """

    def __init__(
        self,
        evaluate: Callable[[Any], Row],
        write: Callable[[Row], None],
        message: Callable[[str], None],
        first: Row | None = None,
    ):
        self._evaluate, self._write, self._message = evaluate, write, message
        self._losses: dict[int, float] = {}
        self._first = first or {}

    def run(self, step: int, state: Any) -> None:
        row = {"kind": "eval", "step": step, **self._evaluate(state)}
        self._losses[step] = row["loss"] if "loss" in row else -row["reward"]
        if step == 0:
            self._first = row
        replayed = row.get("replay_loss")
        if replayed is not None and self._first.get("replay_loss") is not None:
            row["forgetting"] = replayed - self._first["replay_loss"]
        self._write(row)
        self._message(f"step {step}: {self._describe(row)}")

    def _describe(self, row: Row) -> str:
        if "loss" not in row:
            worth = ", ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in row.items() if name.startswith("reward"))
            return f"validation {worth}"
        replayed = row.get("replay_loss")
        forgotten = f" (forgetting {row['forgetting']:+.4f})" if row["step"] > 0 and "forgetting" in row else ""
        replay = "" if replayed is None else f"; on replay_source {replayed:.4f}{forgotten}"
        return f"validation loss {row['loss']:.4f} ({', '.join(_facts(row))}){replay}"

    def loss(self, step: int) -> float | None:
        """Validation loss measured at exactly this step, if it was; where answers have rewards instead, minus their mean."""
        return self._losses.get(step)


def _facts(row: Row) -> Iterator[str]:
    """What stands beside the loss, where it was measured."""
    forms = {
        "perplexity": "perplexity {:.2f}",
        "bits_per_byte": "{:.3f} bits per byte",
        "margin": "margin {:+.4f}",
        "kl": "KL {:.4f}",
    }
    yield from (form.format(row[name]) for name, form in forms.items() if row.get(name) is not None)
    if "margin" in row and "accuracy" in row:
        yield f"accuracy {row['accuracy']:.1%}"


def samples(
    generate: Callable[[Any, int], Sequence[str]],
    prompts: Sequence[str],
    write: Callable[[int, str], None],
    message: Callable[[str], None],
) -> Callable[[int, Any], None]:
    """A hook that continues every prompt. `generate(state, step)` gives one text a prompt, `write(step, text)` keeps the section."""

    def run(step: int, state: Any) -> None:
        texts = generate(state, step)
        write(step, "".join(f">>> {prompt}\n{prompt}{text}\n\n" for prompt, text in zip(prompts, texts, strict=True)))
        message(f"step {step}: {prompts[0]}{texts[0]}")

    return run
