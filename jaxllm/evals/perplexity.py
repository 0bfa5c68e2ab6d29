"""How well a model predicts held-out text: loss, perplexity a token and bits a byte.

    loss = sum of -log p(target) / number of weighted targets      (nats a token)
    perplexity = exp(loss)
    bits per byte = loss / ln 2 / bytes per token

Only bits per byte compares models with different tokenizers, and only where each token is predicted from those before it (causal_lm):
other objectives predict a part of the tokens from others on both sides. All three depend on how the text was cut into rows, so a number
is worth little without the name that `metric_name` gives it.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
from ml_collections import ConfigDict

from jaxllm.consistency import rows_of
from jaxllm.data import tokenize
from jaxllm.objectives import distill, tokens
from jaxllm.parallel import measure as on_mesh
from jaxllm.parallel.region import Region
from jaxllm.types import Batch, Metrics, Model, Objective, Params, Tokenizer

Evaluate = Callable[[Params, Iterable[Batch], float], dict[str, Any]]


# What the objective of distillation measures beside the model itself (objectives/distill.py).
TAUGHT = ("kl", "covered")


def make_eval(model: Model, config: ConfigDict, region: Region | None = None, with_reference: bool = False) -> Evaluate:
    """evaluate(params, batches, bytes_per_token) -> {"loss", "perplexity", "bits_per_byte", "accuracy", "tokens", "bytes"}.

    `bytes_per_token`: UTF-8 bytes that a weighted target of these batches stands for (`Shards.bytes_per_token`). "tokens" are
    the weighted targets, "bytes" the text that they spell; it and "bits_per_byte" are None unless the rows are those of causal_lm. Sums
    first, divides once: the size of a batch does not matter. Dropout is off. Compiled once a batch shape. Parameters and batches lie
    on one device, or on the mesh of the region. with_reference: batches have what a teacher says of them, and there are those of TAUGHT.
    """
    objective: Objective = distill.make(model, config) if with_reference else tokens.make(model, config)
    names = ("loss", "accuracy", *(TAUGHT if with_reference else ()))

    def alone(params: Params, batch: Batch) -> Metrics:
        return objective(params, batch, None)[1]

    measure = jax.jit(alone if region is None else on_mesh.make(objective, model, config, region))

    def evaluate(params: Params, batches: Iterable[Batch], bytes_per_token: float) -> dict[str, Any]:
        sums, waiting = dict.fromkeys((*names, "weight"), 0.0), None
        for batch in batches:
            # Read the sums of the batch before while this one is computed; float64 on the host.
            waiting, ready = measure(params, batch), waiting
            if ready is not None:
                sums = _add(sums, ready)
        if waiting is not None:
            sums = _add(sums, waiting)
        row = _row(sums["loss"], sums["accuracy"], sums["weight"], bytes_per_token if rows_of(config) == "causal_lm" else 0.0)
        return row | {name: sums[name] / sums["weight"] for name in names[2:]}

    return evaluate


def _add(sums: dict[str, float], metrics: Metrics) -> dict[str, float]:
    found = jax.device_get(metrics)
    more = {name: found["loss"].weight if name == "weight" else found[name].total for name in sums}
    return {name: so_far + float(more[name]) for name, so_far in sums.items()}


def _row(nll: float, correct: float, weight: float, bytes_per_token: float) -> dict[str, Any]:
    if not weight:
        raise ValueError(
            "nothing to evaluate: no target has a weight above 0.\n  Accepted: rows in which a document has two tokens or more.\n"
            "  Give more text."
        )
    loss = nll / weight
    return {
        "loss": loss,
        "perplexity": math.exp(loss) if loss < 700 else math.inf,
        "bits_per_byte": loss / math.log(2) / bytes_per_token if bytes_per_token else None,
        "accuracy": correct / weight,
        "tokens": int(weight),
        "bytes": round(weight * bytes_per_token) if bytes_per_token else None,
    }


def metric_name(config: ConfigDict, tokenizer: Tokenizer, row_tokens: int) -> str:
    """What the perplexity is of, in full: numbers on one text may be compared if their names are equal.

    The tokenizer is named by its kind, its size and the start of its fingerprint.
    """
    named = f"tokenizer {config.tokenizer.kind}-{tokenizer.vocab_size}-{tokenize.fingerprint(tokenizer)[:8]}"
    return f"{score_name(config)} ({', '.join((*_conditions(config, tokenizer, row_tokens), named))})"


_SCORES = {
    "causal_lm": "token perplexity",
    "prefix_lm": "continuation perplexity",
    "masked_lm": "masked token perplexity",
    "span_corruption": "span corruption perplexity",
    "seq2seq": "target token perplexity",
    "sft": "trained token perplexity",
    "sequence_classification": "perplexity of a text's class",
    "token_classification": "perplexity of a word's class",
}


def score_name(config: ConfigDict) -> str:
    """What the perplexity is of, in short."""
    return _SCORES[rows_of(config)]


def _conditions(config: ConfigDict, tokenizer: Tokenizer, row_tokens: int) -> list[str]:
    """What decides how hard the predictions are, besides the text and the tokenizer."""
    data, objective = config.data, rows_of(config)
    window = f"window {row_tokens}, stride {row_tokens}"
    if objective == "causal_lm":
        start = "BOS at document start" if tokenizer.bos_id is not None else "no BOS"
        end = "EOS at document end is predicted" if tokenizer.eos_id is not None else "no EOS"
        return [window, start, end]
    if objective == "prefix_lm":
        return [window, "behind a prefix of random length"]
    if objective == "masked_lm":
        return [window, f"{data.noise_frac:g} of the {'words' if data.whole_words else 'tokens'} chosen"]
    if objective == "span_corruption":
        return [f"inputs of {row_tokens}", f"{data.noise_frac:g} of the tokens hidden in spans of {data.mean_span_tokens:g}"]
    if objective == "seq2seq":
        return [f"inputs up to {data.input_tokens or row_tokens}, targets up to {row_tokens}", "EOS is predicted"]
    if objective == "sft":
        what = {"assistant": "answers", "last": "last answers", "all": "all tokens"}[config.chat.train_on]
        return [f"{what} of conversations up to {row_tokens}", f"chat template {config.chat.template}", "their ends are predicted"]
    return [f"{config.model.classes} classes", f"texts up to {row_tokens}"]
