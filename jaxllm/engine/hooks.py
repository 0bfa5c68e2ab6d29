"""What happens beside training: validation, samples, checkpoints. Each is a closure for `loop.Hook.run`."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]


class Validation:
    """Evaluates and remembers the loss, so that the checkpoint of the same step can be ranked by it."""

    def __init__(self, evaluate: Callable[[Any], Row], write: Callable[[Row], None], message: Callable[[str], None]):
        self._evaluate, self._write, self._message = evaluate, write, message
        self._losses: dict[int, float] = {}

    def run(self, step: int, state: Any) -> None:
        row = {"kind": "eval", "step": step, **self._evaluate(state)}
        self._losses[step] = row["loss"]
        self._write(row)
        bits = f", {row['bits_per_byte']:.3f} bits per byte" if row.get("bits_per_byte") is not None else ""
        self._message(f"step {step}: validation loss {row['loss']:.4f} (perplexity {row['perplexity']:.2f}{bits})")

    def loss(self, step: int) -> float | None:
        """Validation loss measured at exactly this step, if it was."""
        return self._losses.get(step)


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
