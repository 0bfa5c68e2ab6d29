"""Names to code: the toolkit's table of contents.

Each line is `"name": "module:attribute"`, imported only when asked for, so that reading this file costs nothing and optional
packages stay optional. To add a model, objective, optimizer, ... write one file and one line here.
"""

import difflib
import importlib
from typing import Any

TABLE: dict[str, dict[str, str]] = {
    "model": {
        "bert": "jaxllm.models.bert:make",
        "gpt": "jaxllm.models.gpt:make",
        "llama": "jaxllm.models.llama:make",
        "t5": "jaxllm.models.t5:make",
        "transformer": "jaxllm.models.transformer:make",
    },
    # One loss for most of these: they differ in the batches, which the line of the same name under "examples" makes.
    "objective": {
        "causal_lm": "jaxllm.objectives.tokens:make",
        "distill": "jaxllm.objectives.distill:make",
        "dpo": "jaxllm.objectives.preferences:make_pairs",
        "kto": "jaxllm.objectives.preferences:make_labelled",
        "masked_lm": "jaxllm.objectives.tokens:make",
        "orpo": "jaxllm.objectives.preferences:make_pairs",
        "prefix_lm": "jaxllm.objectives.tokens:make",
        "reward": "jaxllm.objectives.rewards:make",
        "seq2seq": "jaxllm.objectives.tokens:make",
        "sequence_classification": "jaxllm.objectives.tokens:make",
        "sft": "jaxllm.objectives.tokens:make",
        "simpo": "jaxllm.objectives.preferences:make_pairs",
        "span_corruption": "jaxllm.objectives.tokens:make",
        "token_classification": "jaxllm.objectives.tokens:make",
        "grpo": "jaxllm.objectives.policy:make",
        "ppo": "jaxllm.objectives.policy:make_ppo",
    },
    "examples": {
        "causal_lm": "jaxllm.data.examples.causal_lm:make",
        "distill": "jaxllm.data.examples.distill:make",
        "dpo": "jaxllm.data.examples.preferences:make_pairs",
        "kto": "jaxllm.data.examples.preferences:make_labelled",
        "masked_lm": "jaxllm.data.examples.masked_lm:make",
        "orpo": "jaxllm.data.examples.preferences:make_pairs",
        "prefix_lm": "jaxllm.data.examples.prefix_lm:make",
        "reward": "jaxllm.data.examples.preferences:make_scored",
        "seq2seq": "jaxllm.data.examples.seq2seq:make",
        "sequence_classification": "jaxllm.data.examples.sequence_classification:make",
        "sft": "jaxllm.data.examples.sft:make",
        "simpo": "jaxllm.data.examples.preferences:make_pairs",
        "span_corruption": "jaxllm.data.examples.span_corruption:make",
        "token_classification": "jaxllm.data.examples.token_classification:make",
        "grpo": "jaxllm.data.examples.prompts:make",
        "ppo": "jaxllm.data.examples.prompts:make",
    },
    # Where the batches of an objective come from, if not from rows that were prepared.
    "feed": {
        "shards": "jaxllm.engine.feed:from_shards",
        "grpo": "jaxllm.engine.on_policy:make",
        "ppo": "jaxllm.engine.on_policy:make",
    },
    # What becomes of kernels.
    "transform": {
        "int8": "jaxllm.transforms.int8:make",
        "int4": "jaxllm.transforms.affine:make_int4",
        "int3": "jaxllm.transforms.affine:make_int3",
        "nf4": "jaxllm.transforms.nf4:make",
        "lora": "jaxllm.transforms.lora:make",
        "dora": "jaxllm.transforms.dora:make",
    },
    "attention": {
        "blocked": "jaxllm.ops.attention.blocked:BACKEND",
        "dot_product": "jaxllm.ops.attention.dot_product:BACKEND",
        "flash": "jaxllm.ops.attention.flash:BACKEND",
        "plain": "jaxllm.ops.attention.plain:BACKEND",
        "splash": "jaxllm.ops.attention.splash:BACKEND",
    },
    # How attention crosses the parts of rows that several devices share.
    "context": {
        "ring": "jaxllm.ops.attention.across:ring_round",
        "ulysses": "jaxllm.ops.attention.across:exchange",
    },
    "optimizer": {
        "adamw": "jaxllm.optim.build:adamw",
        "lion": "jaxllm.optim.build:lion",
        "adafactor": "jaxllm.optim.build:adafactor",
        "muon": "jaxllm.optim.build:muon",
    },
    "schedule": {
        "constant": "jaxllm.optim.schedules:constant",
        "linear": "jaxllm.optim.schedules:linear",
        "cosine": "jaxllm.optim.schedules:cosine",
        "wsd": "jaxllm.optim.schedules:wsd",
        "inverse_sqrt": "jaxllm.optim.schedules:inverse_sqrt",
    },
    # Factories of timetables; "forward_only" is not among them, because it does not train.
    "pipeline": {
        "gpipe": "jaxllm.pipeline.schedule:gpipe",
        "1f1b": "jaxllm.pipeline.schedule:one_forward_one_backward",
        "interleaved": "jaxllm.pipeline.schedule:interleaved",
        "zb_h1": "jaxllm.pipeline.schedule:zb_h1",
    },
    "documents": {
        "python_docs": "jaxllm.data.sources.python_docs:read",
        "python_questions": "jaxllm.data.sources.python_questions:read",
        "text": "jaxllm.data.sources.text:read",
        "jsonl": "jaxllm.data.sources.jsonl:read",
        "csv": "jaxllm.data.sources.tables:read_csv",
        "parquet": "jaxllm.data.sources.tables:read_parquet",
        "hf": "jaxllm.data.sources.hf:read",
        "sequences": "jaxllm.data.sources.sequences:read",
        "sums": "jaxllm.data.sources.sums:read",
    },
    "cleaner": {
        "unicode": "jaxllm.data.clean:unicode",
        "control": "jaxllm.data.clean:control",
        "whitespace": "jaxllm.data.clean:whitespace",
        "min_chars": "jaxllm.data.clean:min_chars",
    },
    "tokenizer": {
        "bpe": "jaxllm.data.tokenizers.sentencepiece:train_bpe",
        "unigram": "jaxllm.data.tokenizers.sentencepiece:train_unigram",
        "byte": "jaxllm.data.tokenizers.byte:train",
        "char": "jaxllm.data.tokenizers.char:train",
        "file": "jaxllm.data.tokenizers.file:load",
        "gguf": "jaxllm.interop.gguf:load_tokenizer",
    },
    "chat_template": {
        "alpaca": "jaxllm.data.chat.templates:alpaca",
        "chatml": "jaxllm.data.chat.templates:chatml",
        "llama3": "jaxllm.data.chat.templates:llama3",
        "plain": "jaxllm.data.chat.templates:plain",
    },
    "reward": {
        "exact_match": "jaxllm.decode.rewards:exact_match",
        "format": "jaxllm.decode.rewards:form",
        "length": "jaxllm.decode.rewards:length",
        "number": "jaxllm.decode.rewards:number",
    },
    "tracker": {
        "jsonl": "jaxllm.engine.trackers.jsonl:make",
        "tensorboard": "jaxllm.engine.trackers.tensorboard:make",
        "wandb": "jaxllm.engine.trackers.wandb:make",
        "mlflow": "jaxllm.engine.trackers.mlflow:make",
    },
}


def names(kind: str) -> tuple[str, ...]:
    """All registered names of a kind, sorted."""
    return tuple(sorted(TABLE[kind]))


def resolve(kind: str, name: str) -> Any:
    """The object registered as `name`; ValueError with the accepted names and the nearest one if there is none."""
    if name not in TABLE[kind]:
        near = difflib.get_close_matches(name, TABLE[kind], n=1)
        hint = f" Did you mean '{near[0]}'?" if near else ""
        raise ValueError(
            f"unknown {kind} '{name}'.{hint}\n  Accepted: {', '.join(names(kind))}.\n  Use one of these, or register another."
        )
    module, attribute = TABLE[kind][name].split(":")
    return getattr(importlib.import_module(module), attribute)
