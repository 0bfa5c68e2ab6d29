"""The schema of a config: one field a line, with its default, what is accepted and what it means.

Units end a name: _steps _tokens _seqs _secs _bytes _frac. A batch size is in sequences and global.
"""

import re
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from jaxllm import registry


class Accept(NamedTuple):
    """A test of one value and the words for what passes it."""

    words: str
    test: Callable[[Any], bool]


class Field(NamedTuple):
    """One line of the schema."""

    default: Any
    accept: Accept
    meaning: str


def at_least(low: float) -> Accept:
    return Accept(f"{low} or more", lambda value: value >= low)


def above(low: float) -> Accept:
    return Accept(f"more than {low}", lambda value: value > low)


def between(low: float, high: float) -> Accept:
    return Accept(f"from {low} to {high}", lambda value: low <= value <= high)


def one_of(choices: Iterable[Any]) -> Accept:
    listed = tuple(choices)
    return Accept(", ".join(map(str, listed)), lambda value: value in listed)


def many_of(choices: Iterable[str]) -> Accept:
    listed = tuple(choices)
    return Accept("a tuple of: " + ", ".join(listed), lambda values: all(value in listed for value in values))


def _is_pattern(value: Any) -> bool:
    if not isinstance(value, str):
        return False
    try:
        re.compile(value)
    except re.error:
        return False
    return True


def _is_group(value: Any) -> bool:
    return len(value) == 3 and _is_pattern(value[0]) and all(isinstance(part, int | float) for part in value[1:])


def _is_reward(value: Any) -> bool:
    return len(value) == 2 and (":" in value[0] or value[0] in registry.names("reward")) and isinstance(value[1], int | float)


TEXT = Accept("text", lambda value: isinstance(value, str))
PATTERN = Accept("a regular expression", _is_pattern)
TEXTS = Accept("a tuple of texts", lambda values: all(isinstance(value, str) for value in values))
YES_NO = Accept("True or False", lambda value: isinstance(value, bool))
SIZE = Accept("-1 (whatever is left) or 1 or more", lambda value: value == -1 or value >= 1)
GROUPS = Accept(
    "a tuple of (pattern, learning-rate factor, weight-decay factor)", lambda values: all(_is_group(value) for value in values)
)

REWARDS = Accept(
    f"a tuple of (name, weight); names: {', '.join(registry.names('reward'))} or package.module:function",
    lambda values: len(values) > 0 and all(_is_reward(value) for value in values),
)

SCHEMA: dict[str, Field] = {
    "seed": Field(0, at_least(0), "the one seed: initial weights, data order, dropout"),
    # What is trained.
    "model.name": Field("llama", one_of(registry.names("model")), "architecture; 'auto' below means as this one has it"),
    "model.layers": Field(6, at_least(1), "transformer blocks"),
    "model.width": Field(256, at_least(1), "size of the residual stream"),
    "model.heads": Field(4, at_least(1), "query heads"),
    "model.kv_heads": Field(0, at_least(0), "key and value heads (grouped-query attention); 0 means as many as heads"),
    "model.head_dim": Field(0, at_least(0), "width of a head; 0 means width / heads"),
    "model.mlp_width": Field(
        0, at_least(0), "inner width of the MLP; 0 means 8/3 x width rounded up to 64 (llama), else 4 x width"
    ),
    "model.decoder_layers": Field(0, at_least(0), "of an encoder-decoder; 0 means as many as layers, which are its encoder's"),
    "model.context_tokens": Field(256, at_least(2), "longest sequence the model is built for"),
    "model.vocab_size": Field(0, at_least(0), "rows of the embedding; 0 means the tokenizer's size"),
    "model.start_rows": Field(0, at_least(0), "rows of the embedding that train.start has, filled in; those above are new tokens"),
    "model.token_types": Field(2, at_least(1), "rows of the token type embedding (bert)"),
    "model.head": Field(
        "lm", one_of(("lm", "classify", "tag", "none")), "what is predicted: tokens, a class a row, a class a token"
    ),
    "model.classes": Field(0, at_least(0), "classes of the heads classify and tag; 0 means as many as the data has"),
    "model.norm": Field("auto", one_of(("auto", "rmsnorm", "layernorm")), "normalization"),
    "model.norm_order": Field("auto", one_of(("auto", "pre", "post")), "norm before each sub-block, or after its residual sum"),
    "model.norm_eps": Field(0.0, at_least(0), "added to the variance; 0 means 1e-12 (bert), 1e-6 (t5), else 1e-5"),
    "model.activation": Field(
        "auto",
        one_of(("auto", "swiglu", "geglu", "gelu", "gelu_tanh", "relu", "silu")),
        "MLP; gelu is exact, geglu gates with gelu_tanh",
    ),
    "model.positions": Field("auto", one_of(("auto", "rope", "learned", "sinusoid", "relative")), "how positions enter"),
    "model.rope_theta": Field(10000.0, above(0), "base of the rotary frequencies"),
    "model.rope_scaling": Field(
        "none", one_of(("none", "linear", "dynamic", "llama3", "yarn")), "how rope reaches a longer context"
    ),
    "model.rope_factor": Field(1.0, at_least(1), "how much longer the context is than the original one"),
    "model.rope_original_tokens": Field(0, at_least(0), "context before scaling; 0 means context_tokens"),
    "model.rope_low_freq_factor": Field(1.0, above(0), "llama3: wavelengths above original / this are scaled in full"),
    "model.rope_high_freq_factor": Field(4.0, above(0), "llama3: wavelengths below original / this stay"),
    "model.rope_beta_fast": Field(32.0, above(0), "yarn: dimensions that turn more often than this stay"),
    "model.rope_beta_slow": Field(1.0, above(0), "yarn: dimensions that turn less often than this are scaled in full"),
    "model.rope_attention_factor": Field(0.0, at_least(0), "yarn: times cos and sin; 0 means 0.1 ln factor + 1"),
    "model.relative_buckets": Field(32, at_least(4), "of relative positions"),
    "model.relative_max_tokens": Field(128, at_least(2), "distance from which on all share the last bucket of relative positions"),
    "model.window_tokens": Field(
        0, at_least(0), "a query sees this many last tokens, itself included (sliding window); 0 means all"
    ),
    "model.bias": Field(
        "auto",
        one_of(("auto", "on", "off", "qkv", "attention", "mlp")),
        "biases in all projections and LayerNorm, or in these only",
    ),
    "model.tied_head": Field("auto", one_of(("auto", "on", "off")), "the output projection is the embedding"),
    "model.dropout_frac": Field(0.0, between(0, 0.9), "dropped in attention, after each sub-block and in the embedding"),
    "model.init_std": Field(
        0.0, at_least(0), "of the weights; 0 means 1 / sqrt(width); residual projections have it divided by sqrt(2 x layers)"
    ),
    "model.attention": Field("blocked", one_of(registry.names("attention")), "implementation; all give the same numbers"),
    "model.attention_block_tokens": Field(128, at_least(1), "block of the blocked and flash attention"),
    "model.layers_as": Field("unrolled", one_of(("unrolled", "scan")), "unrolled: faster on CPU; scan: compile time flat in depth"),
    "model.remat": Field(
        "none",
        one_of(("none", "attention", "dots", "named", "full")),
        "recomputed in the backward pass: see jaxllm/models/remat.py",
    ),
    "model.remat_save": Field(
        ("q", "k", "v", "attended", "attention_out"), TEXTS, "arrays that remat=named keeps, by the names of jaxllm/models/remat.py"
    ),
    "model.remat_offload": Field((), TEXTS, "arrays that remat=named keeps in the host's memory (GPU, TPU), by the same names"),
    "precision.compute": Field("float32", one_of(("float32", "bfloat16", "float16")), "of matmuls; master weights stay float32"),
    "precision.frozen": Field(
        "float32", one_of(("float32", "bfloat16")), "of matrices that are not trained, where no transform says it"
    ),
    "precision.cache": Field(
        "compute",
        one_of(("compute", "int8")),
        "of keys and values while text is written; int8: with a scale for each token and head",
    ),
    "precision.loss_scale": Field(32768.0, above(0), "first dynamic loss scale (float16 only)"),
    "precision.loss_scale_growth_steps": Field(2000, at_least(1), "finite steps before the loss scale doubles (float16 only)"),
    "quant.targets": Field(
        ".*layers/.*/kernel", PATTERN, "regular expression over parameter paths: kernels that int8, int4, int3 and nf4 take"
    ),
    "quant.group": Field(0, at_least(-1), "inputs that share a scale; 0: 128 of int4 and int3, all of int8; -1: all"),
    "quant.symmetric": Field(
        True, YES_NO, "int8, int4 and int3: codes reach as far below 0 as above; else groups have zeros of their own"
    ),
    "quant.ordered": Field(False, YES_NO, "int8, int4 and int3: an index says which group an input belongs to; else they are runs"),
    "quant.scale_dtype": Field(
        "float32", one_of(("float32", "bfloat16", "float16")), "of the scales of int4, int3 and of int8 in groups"
    ),
    "quant.activations": Field(
        "float", one_of(("float", "int8")), "int8: what kernels in int8 multiply is rounded, too, with a scale a token (W8A8)"
    ),
    "quant.double": Field(True, YES_NO, "the scales of nf4 are quantized, too"),
    # What it is trained on.
    "tokenizer.kind": Field(
        "bpe", one_of(registry.names("tokenizer")), "bpe, unigram are trained on the data; file, gguf are loaded"
    ),
    "tokenizer.vocab_size": Field(4096, at_least(2), "of a trained bpe or unigram tokenizer"),
    "tokenizer.path": Field("", TEXT, "tokenizer.model or tokenizer.json (kind file) or GGUF file (kind gguf) to load"),
    "tokenizer.add_tokens": Field((), TEXTS, "special tokens added to it, besides those that the chat template needs"),
    "data.source": Field(
        "python_docs",
        TEXT,
        "python_docs, python_questions or sums (sft and rl), a file, a folder, a glob, hf:OWNER/NAME?config=C&split=S, or sequences:copy",
    ),
    "data.validation_source": Field("", TEXT, "as source; empty means that validation_frac of source is held out"),
    "data.validation_frac": Field(0.05, between(0, 0.5), "share of the source held out for validation"),
    "data.split_by": Field("documents", one_of(("documents", "characters")), "how it is held out; characters: the last ones"),
    "data.text_field": Field("text", TEXT, "field that holds the text (JSONL, CSV, Parquet, datasets)"),
    "data.max_documents": Field(0, at_least(0), "stop reading the source after so many; 0 means all"),
    "data.cleaners": Field(
        ("unicode", "control", "whitespace", "min_chars"), many_of(registry.names("cleaner")), "applied in order"
    ),
    "data.min_chars": Field(1, at_least(1), "shorter documents are dropped by the cleaner min_chars"),
    "data.target_field": Field(
        "target", TEXT, "field with what is predicted from text_field: a text, a label, or a list of labels"
    ),
    "data.pair_field": Field("", TEXT, "field with a second text of a row to classify; empty means none"),
    "data.row_tokens": Field(0, at_least(0), "tokens a training row; 0 means model.context_tokens"),
    "data.input_tokens": Field(0, at_least(0), "tokens an encoder row of seq2seq; 0 means as many as row_tokens"),
    "data.noise_frac": Field(0.15, between(0.01, 0.9), "share of tokens that masked_lm and span_corruption predict"),
    "data.mean_span_tokens": Field(3.0, at_least(1), "mean length of a span of span_corruption"),
    "data.whole_words": Field(False, YES_NO, "masked_lm masks all tokens of a word or none"),
    "chat.format": Field(
        "auto", one_of(("auto", "messages", "sharegpt", "alpaca", "prompt")), "how conversations are written in the source (sft)"
    ),
    "chat.template": Field(
        "tokenizer",
        one_of(("tokenizer", *registry.names("chat_template"))),
        "how they become text; tokenizer: as its own template says",
    ),
    "chat.train_on": Field("assistant", one_of(("assistant", "last", "all")), "each answer, the last one, or all tokens"),
    "data.replay_source": Field(
        "", TEXT, "as source: what is not to be forgotten; its held-out part is evaluated, too. Plain text for decoders"
    ),
    "data.replay_frac": Field(0.0, between(0, 0.9), "share of the rows of a batch that come from replay_source"),
    "data.dir": Field("", TEXT, "where prepared shards are kept; empty means WORKDIR/data"),
    "preference.loss": Field(
        "sigmoid", one_of(("sigmoid", "cdpo", "robust", "hinge", "ipo")), "of dpo; see jaxllm/objectives/preference_losses.py"
    ),
    "preference.beta": Field(0.0, at_least(0), "how much the difference of two answers counts; 0 means 2 (simpo), else 0.1"),
    "preference.label_smoothing": Field(0.0, between(0, 0.49), "cdpo and robust: share of the pairs that are thought mixed up"),
    "preference.margin": Field(0.5, at_least(0), "simpo: by how much beta times the difference is to exceed 0"),
    "preference.desirable_weight": Field(1.0, at_least(0), "kto: of the loss of good answers"),
    "preference.undesirable_weight": Field(1.0, at_least(0), "kto: of the loss of bad answers"),
    "reward.centering": Field(
        0.01, at_least(0), "coefficient of the squared sum of a pair's rewards, which keeps them near 0; 0.01 is common"
    ),
    "reward.margin_factor": Field(
        1.0, at_least(0), "times the margin of a pair in the data, by which its rewards are to differ; 0: no margin"
    ),
    "distill.teacher": Field(
        "", TEXT, "of train.objective=distill: a run, a directory of transformers or a GGUF file, with the tokenizer of the student"
    ),
    "distill.rows": Field("causal_lm", one_of(("causal_lm", "sft")), "what is learnt on: text, or the answers of conversations"),
    "distill.kl": Field("forward", one_of(("forward", "reverse")), "divergence: KL(teacher, student), or KL(student, teacher)"),
    "distill.top_k": Field(32, at_least(1), "tokens of the teacher that are kept for each target; all others count as one"),
    "distill.temperature": Field(1.0, above(0), "of both models; the divergence is multiplied by its square"),
    "distill.hard_frac": Field(
        0.1,
        between(0, 1),
        "share of the ordinary cross-entropy in the loss: it alone tells the tokens apart that are not among top_k",
    ),
    # How it is trained.
    "train.objective": Field("causal_lm", one_of(registry.names("objective")), "what is minimized"),
    "train.steps": Field(1000, at_least(1), "optimizer updates"),
    "train.batch_seqs": Field(16, at_least(1), "rows an update"),
    "train.microbatches": Field(1, at_least(1), "parts that a batch is split into (gradient accumulation)"),
    "train.start": Field(
        "",
        TEXT,
        "model to begin with: a run, a directory of transformers, a GGUF file, an adapter of PEFT; it brings model.* and its tokenizer",
    ),
    "train.transforms": Field(
        (),
        many_of(registry.names("transform")),
        "what kernels become, in order: a frozen form, an adapter; ('nf4', 'lora') is QLoRA",
    ),
    "train.trainable": Field(
        "auto",
        PATTERN,
        "regular expression over parameter paths; the others stay as they are. auto: adapters, or without any everything",
    ),
    "train.frozen_layers": Field(
        0, at_least(0), "first layers of each stack that stay as they are, and with them the embeddings; needs layers_as=unrolled"
    ),
    "train.loss_chunk_tokens": Field(256, at_least(0), "tokens whose logits exist at once on a device; 0 means all"),
    "train.z_loss": Field(0.0, at_least(0), "coefficient of log(Z)^2, which keeps logits near 0"),
    "train.label_smoothing": Field(0.0, between(0, 0.9), "share of the target's probability that is spread over the vocabulary"),
    "train.ema_decay": Field(
        0.0, between(0, 0.99999), "of the averaged weights, which are evaluated and saved; lower at first; 0 means none"
    ),
    "train.max_nonfinite_steps": Field(10, at_least(1), "skipped steps in a row that stop the run"),
    "train.log_every_steps": Field(10, at_least(1), "rows in metrics.jsonl"),
    "train.trackers": Field((), many_of(("wandb", "mlflow")), "besides metrics.jsonl and TensorBoard, which are always written"),
    # What stands beside frozen kernels (lora, dora).
    "lora.rank": Field(16, at_least(1), "columns of A and rows of B"),
    "lora.alpha": Field(32.0, above(0), "A B is multiplied by alpha / rank"),
    "lora.rslora": Field(False, YES_NO, "alpha / sqrt(rank) instead, which suits large ranks"),
    "lora.dropout_frac": Field(0.0, between(0, 0.9), "dropped of what A reads"),
    "lora.targets": Field(".*layers/.*/kernel", PATTERN, "pattern of parameter paths: kernels and tables that get an adapter"),
    "lora.also": Field(
        "", PATTERN, "the same of further parameters that are trained as they are (embed/.*, .*norm/.*); empty: none"
    ),
    "lora.lr_ratio": Field(1.0, above(0), "learning rate of B over that of A; LoRA+ takes 16"),
    "lora.init": Field("zero", one_of(("zero", "pissa")), "zero: B is 0; pissa: the largest singular values of the kernel"),
    # What is learnt from answers that the model writes itself (grpo, ppo).
    "rl.prompts": Field(8, at_least(1), "prompts whose answers make up a step"),
    "rl.answers": Field(8, at_least(1), "answers a prompt; grpo compares those of a prompt with each other"),
    "rl.max_new_tokens": Field(64, at_least(1), "longest answer; a longer one is cut off"),
    "rl.temperature": Field(1.0, above(0), "logits are divided by it, both where answers are drawn and where they are learnt from"),
    "rl.refresh_steps": Field(1, at_least(1), "steps that are made with the answers of one model, before the next ones are drawn"),
    "rl.epochs": Field(1, at_least(1), "times that each answer is learnt from; divides refresh_steps"),
    "rl.rewards": Field((("exact_match", 1.0),), REWARDS, "what an answer is worth: a weighted sum"),
    "rl.format": Field(".*", PATTERN, "regular expression that the reward 'format' wants all of an answer to match"),
    "rl.soft_tokens": Field(16, at_least(1), "the reward 'length' falls over so many tokens below max_new_tokens"),
    "rl.mask_truncated": Field(False, YES_NO, "answers that were cut off count in no loss"),
    "rl.loss": Field("dapo", one_of(("grpo", "bnpo", "dr_grpo", "dapo")), "how the mean is taken over tokens and answers"),
    "rl.scale_rewards": Field(
        "group", one_of(("group", "batch", "none")), "grpo: whose standard deviation the advantages are divided by"
    ),
    "rl.clip": Field(0.2, above(0), "a token's probability counts down to 1 - this of what it was when it was drawn"),
    "rl.clip_high": Field(0.0, at_least(0), "and up to 1 + this (dapo: 0.28); 0 means as clip"),
    "rl.kl": Field(0.0, at_least(0), "coefficient of the divergence from the model before step 0"),
    "rl.kl_target": Field(
        0.0, at_least(0), "ppo: nats an answer that rl.kl, its coefficient at first, is to hold; 0 leaves it as it is"
    ),
    "rl.kl_horizon": Field(10000, at_least(1), "ppo: answers over which the coefficient follows; a block counts up to 1"),
    "rl.gamma": Field(1.0, between(0, 1), "ppo: what is earned a token later counts this share"),
    "rl.gae_lambda": Field(0.95, between(0, 1), "ppo: 1 trusts what was earned, 0 the values alone"),
    "rl.value_coef": Field(0.1, above(0), "ppo: weight of the loss of values beside that of the policy"),
    "rl.value_clip": Field(0.2, above(0), "ppo: values are learnt up to so far from what they were"),
    "rl.field_bytes": Field(2048, at_least(2), "most that is kept of what the data knows of a prompt, as JSON"),
    "optimizer.name": Field("adamw", one_of(registry.names("optimizer")), "from optax"),
    "optimizer.learning_rate": Field(1e-3, above(0), "peak"),
    "optimizer.b1": Field(0.9, between(0, 0.9999), "decay of the first moment (momentum in muon)"),
    "optimizer.b2": Field(0.95, between(0, 0.99999), "decay of the second moment"),
    "optimizer.eps": Field(1e-8, above(0), "added to the root of the second moment"),
    "optimizer.weight_decay": Field(0.1, at_least(0), "decoupled, times the learning rate"),
    "optimizer.clip_norm": Field(1.0, at_least(0), "global gradient norm is cut to this; 0 means never"),
    "optimizer.state": Field(
        "float32", one_of(("float32", "bfloat16", "int8")), "how moments are stored: 4, 2 or about 1 byte a number"
    ),
    "optimizer.groups": Field(
        ((".*(scale|bias|magnitude)", 1.0, 0.0),), GROUPS, "first match wins: (pattern, lr factor, decay factor)"
    ),
    "optimizer.layer_decay": Field(
        1.0, Accept("above 0, up to 1", lambda value: 0 < value <= 1), "learning rate of a layer as a share of that of the next one"
    ),
    "schedule.name": Field("cosine", one_of(registry.names("schedule")), "of the learning rate"),
    "schedule.warmup_steps": Field(100, at_least(0), "linear from 0 to the peak"),
    "schedule.end_frac": Field(0.1, between(0, 1), "last learning rate as a share of the peak"),
    "schedule.decay_frac": Field(0.2, between(0, 1), "share of the steps in which wsd decays"),
    # What happens beside it.
    "eval.every_steps": Field(200, at_least(0), "validation loss; 0 means only at the end"),
    "eval.max_seqs": Field(0, at_least(0), "rows of the validation set that are used; 0 means all"),
    "checkpoint.every_steps": Field(200, at_least(1), "also saved at the end and on Ctrl-C or SIGTERM"),
    "checkpoint.keep_last": Field(2, at_least(1), "newest checkpoints kept"),
    "checkpoint.keep_best": Field(1, at_least(0), "kept besides: those with the lowest validation loss"),
    "sample.every_steps": Field(500, at_least(0), "samples.txt; 0 means only at the end"),
    "sample.prompts": Field(("The ",), TEXTS, "continued by the model"),
    "sample.tokens": Field(64, at_least(0), "length of a sample; 0 means no samples"),
    "sample.temperature": Field(0.8, at_least(0), "0 is greedy"),
    "watchdog.step_secs": Field(
        1800.0,
        at_least(0),
        "a part of a step (its batch, the devices) that takes longer ends the run with a diagnosis; 0 means never",
    ),
    "watchdog.beside_secs": Field(
        14400.0, at_least(0), "the same for compiling, restoring, samples, a checkpoint, each batch of validation; 0 means never"
    ),
    # Where it runs: sizes of the mesh axes, slowest link first, and how they are used.
    "parallel.pipe": Field(1, SIZE, "stages of layers; the micro-batches of train.microbatches pass through them"),
    "parallel.data": Field(-1, SIZE, "copies of the model"),
    "parallel.fsdp": Field(1, SIZE, "devices that split the batch, as data, and share the training state by parallel.zero_stage"),
    "parallel.seq": Field(1, SIZE, "parts of each row (context parallelism)"),
    "parallel.tensor": Field(1, SIZE, "devices that share each matrix product"),
    "parallel.zero_stage": Field(3, one_of((1, 2, 3)), "what fsdp shares: 1 optimizer state, 2 also gradients, 3 also parameters"),
    "parallel.sequence": Field(False, YES_NO, "the devices of tensor share rows between blocks (sequence parallelism)"),
    "parallel.context": Field("ring", one_of(registry.names("context")), "how attention crosses the parts of a row"),
    "parallel.schedule": Field("1f1b", one_of(registry.names("pipeline")), "order of forward and backward passes in the pipeline"),
    "parallel.chunks": Field(0, at_least(0), "runs of layers a stage has; 0: 2 if interleaved, one a stack otherwise"),
}
