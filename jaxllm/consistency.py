"""What the fields of a config must satisfy together; what each may hold by itself is in schema.py."""

from ml_collections import ConfigDict

# Transforms that add something trained to a kernel, and those that hold it in fewer bits.
ADAPTERS, FORMS = ("lora", "dora"), ("int8", "int4", "int3", "nf4")
# Losses of dpo that take some of the pairs for mixed up.
SMOOTHED = ("cdpo", "robust")
# Kinds of tokenizers that are loaded, from tokenizer.path.
LOADED = ("file", "gguf")
# The models that each objective can train.
MODELS = {
    "causal_lm": ("gpt", "llama"),
    "distill": ("gpt", "llama"),
    "dpo": ("gpt", "llama"),
    "kto": ("gpt", "llama"),
    "orpo": ("gpt", "llama"),
    "prefix_lm": ("gpt", "llama"),
    "masked_lm": ("bert",),
    "reward": ("bert", "gpt", "llama"),
    "span_corruption": ("t5", "transformer"),
    "seq2seq": ("t5", "transformer"),
    "sequence_classification": ("bert", "gpt", "llama"),
    "sft": ("gpt", "llama"),
    "simpo": ("gpt", "llama"),
    "token_classification": ("bert", "gpt", "llama"),
    "grpo": ("gpt", "llama"),
    "ppo": ("gpt", "llama"),
}
# The head that it needs, if not "lm".
HEADS = {"reward": "classify", "sequence_classification": "classify", "token_classification": "tag"}
# Objectives that compare answers to a prompt, in forked rows.
PREFERENCES = ("dpo", "kto", "orpo", "reward", "simpo")
# Those of them that compare the model with the one that training began with.
REFERRED = ("dpo", "kto")
# Objectives that learn from answers which the model writes itself.
ON_POLICY = ("grpo", "ppo")
# The objective that learns from a teacher, from rows of another one.
DISTILL = "distill"
# Objectives of models that answer.
ANSWERING = ("sft", "dpo", "kto", "orpo", "simpo", *ON_POLICY)
# Objectives whose documents are more than a text.
PAIRED = ("seq2seq", "sft", *PREFERENCES, *ON_POLICY, "sequence_classification", "token_classification")


def rows_of(config: ConfigDict) -> str:
    """The objective whose rows are trained on: its own, but for distillation."""
    objective: str = config.train.objective
    return config.distill.rows if objective == DISTILL else objective


def check(config: ConfigDict) -> None:
    """ValueError, naming the fields, what is accepted and what to change, for fields that contradict each other."""
    _check_sizes(config)
    _check_objective(config)
    _check_data(config)
    _check_losses(config)
    _check_preferences(config)
    _check_distill(config)
    _check_optimizer(config)
    _check_adapters(config)
    _check_codes(config)
    _check_frozen(config)
    if config.train.objective in ON_POLICY:
        _check_answers(config)
    open_sizes = [f"parallel.{axis}" for axis in ("pipe", "data", "fsdp", "seq", "tensor") if config.parallel[axis] == -1]
    if len(open_sizes) > 1:
        raise ValueError(
            f"{' and '.join(open_sizes)} are -1.\n  Accepted: one of them; parallel.data is -1 unless it is set.\n"
            "  Give the others a size."
        )


def _check_sizes(config: ConfigDict) -> None:
    model, train = config.model, config.train
    if not model.head_dim and model.width % model.heads:
        raise ValueError(_divides("model.heads", model.heads, "model.width", model.width, "or set model.head_dim"))
    if model.kv_heads and model.heads % model.kv_heads:
        raise ValueError(_divides("model.kv_heads", model.kv_heads, "model.heads", model.heads, ""))
    if train.batch_seqs % train.microbatches:
        raise ValueError(_divides("train.microbatches", train.microbatches, "train.batch_seqs", train.batch_seqs, ""))
    if config.data.row_tokens > model.context_tokens:
        raise ValueError(
            f"data.row_tokens = {config.data.row_tokens} is more than model.context_tokens = {model.context_tokens}.\n"
            f"  Accepted: up to {model.context_tokens}, or 0 for the same. Change one of them."
        )
    if config.data.input_tokens > model.context_tokens:
        raise ValueError(
            f"data.input_tokens = {config.data.input_tokens} is more than model.context_tokens = {model.context_tokens}.\n"
            f"  Accepted: up to {model.context_tokens}, or 0 for as many as data.row_tokens. Change one of them."
        )


def _check_objective(config: ConfigDict) -> None:
    """The objective, the model and its head belong together."""
    objective, name = config.train.objective, config.model.name
    if name not in MODELS[objective]:
        fitting = [each for each, names in MODELS.items() if name in names]
        raise ValueError(
            f"train.objective = '{objective}' does not fit model.name = '{name}'.\n"
            f"  Accepted: {' or '.join(MODELS[objective])} for {objective}; {', '.join(fitting)} for {name}.\n"
            "  Set model.name or train.objective."
        )
    head = HEADS.get(objective, "lm")
    if config.model.head != head:
        raise ValueError(
            f"model.head = '{config.model.head}' does not fit train.objective = '{objective}'.\n  Accepted: {head}.\n"
            f"  Set model.head={head}, or another train.objective."
        )
    if objective == "reward" and config.model.classes not in (0, 1):
        raise ValueError(
            f"model.classes = {config.model.classes} with train.objective = 'reward': a reward is one number.\n  Accepted: 1, or 0, which"
            " is the same here.\n  Leave out model.classes."
        )


def _check_losses(config: ConfigDict) -> None:
    """What is said of a loss of preferences is said of one that has it."""
    objective, preference = config.train.objective, config.preference
    if preference.loss != "sigmoid" and objective != "dpo":
        raise ValueError(
            f"preference.loss = '{preference.loss}' with train.objective = '{objective}', which has one loss.\n"
            "  Accepted: sigmoid; another one with train.objective=dpo.\n  Change one of them."
        )
    smooths = preference.loss in SMOOTHED
    if smooths == (not preference.label_smoothing):
        accepted = "a share above 0, such as 0.1" if smooths else f"0; a share with preference.loss = {' or '.join(SMOOTHED)}"
        raise ValueError(
            f"preference.label_smoothing = {preference.label_smoothing:g} with preference.loss = '{preference.loss}'"
            f"{', which would be sigmoid' if smooths else ', which does not smooth'}.\n  Accepted: {accepted}.\n  Change one of them."
        )


def _check_optimizer(config: ConfigDict) -> None:
    optimizer = config.optimizer
    if optimizer.name == "adafactor" and optimizer.state != "float32":
        raise ValueError(
            f"optimizer.state = '{optimizer.state}' with optimizer.name = 'adafactor', whose state is a row and a column of each matrix.\n"
            "  Accepted: float32 with adafactor; adamw, lion or muon with another state.\n"
            "  Set optimizer.state=float32: there is next to nothing to save."
        )


def _check_adapters(config: ConfigDict) -> None:
    """What is trained beside adapters is said where there are adapters, and nothing else says what is trained."""
    transforms, pattern = config.train.transforms, config.train.trainable
    if config.lora.also and (pattern != "auto" or not any(name in ADAPTERS for name in transforms)):
        why = f"train.trainable = '{pattern}'" if pattern != "auto" else f"train.transforms = {transforms!r}, which has no adapter"
        raise ValueError(
            f"lora.also = '{config.lora.also}' has no effect with {why}.\n  Accepted: lora.also beside {' or '.join(ADAPTERS)}, with"
            " train.trainable = 'auto'.\n  Leave out lora.also, and say in train.trainable what is trained."
        )
    for names, what in ((ADAPTERS, "adapters"), (FORMS, "frozen forms")):
        if len(found := [name for name in transforms if name in names]) > 1:
            raise ValueError(
                f"train.transforms = {transforms!r} has {len(found)} {what}, {' and '.join(found)}, for the same kernels.\n"
                f"  Accepted: one of {', '.join(names)}.\n  Take one out."
            )


def _check_codes(config: ConfigDict) -> None:
    """Activations are rounded where the kernels have one scale an output."""
    quant, transforms = config.quant, config.train.transforms
    plain = quant.group <= 0 and quant.symmetric and not quant.ordered
    if quant.activations == "int8" and not ("int8" in transforms and plain):
        given = f"quant.group = {quant.group}, symmetric = {quant.symmetric}, ordered = {quant.ordered}"
        raise ValueError(
            f"quant.activations = 'int8' with train.transforms = {transforms!r}, {given}.\n  Accepted: 'int8' in train.transforms, with one"
            " symmetric scale an output.\n  Set these, or quant.activations=float."
        )


def _check_frozen(config: ConfigDict) -> None:
    """Layers can be frozen one by one, and are there."""
    first, model = config.train.frozen_layers, config.model
    if first and config.precision.frozen != "float32":
        raise ValueError(
            f"precision.frozen = '{config.precision.frozen}' with train.frozen_layers = {first}: the layers of a stack would have different"
            " types.\n  Accepted: float32 with frozen layers; bfloat16 beside adapters, or with train.trainable.\n"
            "  Set precision.frozen=float32."
        )
    if first and model.layers_as != "unrolled":
        raise ValueError(
            f"train.frozen_layers = {first} with model.layers_as = '{model.layers_as}', where all layers are one array.\n"
            "  Accepted: unrolled, and so no pipeline.\n  Set model.layers_as=unrolled."
        )
    depths = {"model.layers": model.layers}
    if model.name in MODELS["seq2seq"] and model.decoder_layers:
        depths["model.decoder_layers"] = model.decoder_layers
    name, layers = min(depths.items(), key=lambda item: item[1])
    if first > layers:
        raise ValueError(
            f"train.frozen_layers = {first}, but {name} = {layers}.\n  Accepted: 0 to {layers}.\n  Set train.frozen_layers."
        )


def _check_data(config: ConfigDict) -> None:
    """Where text comes from, and how it is split."""
    if config.tokenizer.kind in LOADED and not config.tokenizer.path:
        raise ValueError(
            f"tokenizer.kind = '{config.tokenizer.kind}' without a tokenizer.path.\n"
            "  Accepted: the path of a tokenizer.model, tokenizer.json or GGUF file."
            "\n  Set tokenizer.path."
        )
    talks = rows_of(config) in ("sft", *PREFERENCES, *ON_POLICY)
    if talks and config.chat.template == "tokenizer" and config.tokenizer.kind not in LOADED:
        raise ValueError(
            f"chat.template = 'tokenizer' with tokenizer.kind = '{config.tokenizer.kind}', which is made here and has no chat template.\n"
            "  Accepted: alpaca, chatml, llama3 or plain; tokenizer for a tokenizer.path that has one.\n  Set chat.template=chatml."
        )
    if blank := [token for token in config.tokenizer.add_tokens if not token.strip()]:
        raise ValueError(
            f"tokenizer.add_tokens = {config.tokenizer.add_tokens!r} has {blank[0]!r}, which no prompt could show.\n"
            "  Accepted: names such as '<|note|>'.\n  Take it out."
        )
    if not config.data.source:
        raise ValueError(
            "data.source is empty.\n  Accepted: python_docs, a file, a folder, a glob or another source.\n  Set data.source."
        )
    if not config.data.validation_source and not config.data.validation_frac:
        raise ValueError(
            "data.validation_frac = 0 without a data.validation_source: there is nothing to evaluate on.\n"
            "  Accepted: a share above 0, or another source. Set one of them."
        )
    _check_replay(config)
    if config.data.split_by == "characters" and rows_of(config) in PAIRED and not config.data.validation_source:
        raise ValueError(
            f"data.split_by = 'characters' cuts a text, which train.objective = '{config.train.objective}' cannot do with its documents.\n"
            "  Accepted: documents.\n  Set data.split_by=documents, or data.validation_source."
        )


def _check_answers(config: ConfigDict) -> None:
    """Answers fit into rows, are enough to be compared, and are drawn where the mesh allows it."""
    rl, objective = config.rl, config.train.objective
    width = config.data.row_tokens or config.model.context_tokens
    if rl.max_new_tokens > width:
        raise ValueError(
            f"rl.max_new_tokens = {rl.max_new_tokens} in rows of {width} tokens (data.row_tokens, else model.context_tokens).\n"
            f"  Accepted: up to {width}, less the tokens of the prompts.\n  Change one of them."
        )
    if objective == "grpo" and rl.answers < 2:
        raise ValueError(
            "rl.answers = 1 with train.objective = 'grpo', which compares the answers to a prompt with each other.\n"
            "  Accepted: 2 or more.\n  Set rl.answers."
        )
    if rl.kl_target and (objective != "ppo" or not rl.kl):
        given = f"train.objective = '{objective}'" if objective != "ppo" else "rl.kl = 0, which nothing makes larger"
        raise ValueError(
            f"rl.kl_target = {rl.kl_target:g} with {given}.\n  Accepted: with ppo, and a first coefficient rl.kl above 0.\n"
            "  Set rl.kl, or leave out rl.kl_target."
        )
    if rl.refresh_steps % rl.epochs:
        raise ValueError(_divides("rl.epochs", rl.epochs, "rl.refresh_steps", rl.refresh_steps, ""))
    if config.data.replay_source:
        raise ValueError(
            f"data.replay_source = '{config.data.replay_source}' with train.objective = '{objective}', whose rows are answers of the"
            " model.\n  Accepted: none.\n  Leave it out; rl.kl holds the model near where it began."
        )
    for axis in ("pipe", "seq"):
        if config.parallel[axis] != 1:
            raise ValueError(
                f"parallel.{axis} = {config.parallel[axis]} with train.objective = '{objective}', which draws answers on whole models"
                f" and rows.\n  Accepted: 1.\n  Set parallel.{axis}=1, and use data, fsdp or tensor."
            )


def _check_preferences(config: ConfigDict) -> None:
    """What rows with several answers to a prompt cannot be combined with."""
    objective = config.train.objective
    if objective not in PREFERENCES:
        return
    if config.chat.train_on == "all":
        raise ValueError(
            f"chat.train_on = 'all' with train.objective = '{objective}', which compares answers.\n"
            "  Accepted: assistant or last, which are the same here: the answers that are compared.\n  Set chat.train_on=assistant."
        )
    if config.data.replay_source:
        raise ValueError(
            f"data.replay_source = '{config.data.replay_source}' with train.objective = '{objective}', whose loss is one of answers.\n"
            "  Accepted: none; a reference model or an added loss of the chosen answers keeps the model from forgetting.\n"
            "  Leave out data.replay_source and data.replay_frac."
        )
    if config.model.window_tokens:
        raise ValueError(
            f"model.window_tokens = {config.model.window_tokens} with train.objective = '{objective}': a window counts places of a row, and"
            " answers to one prompt stand there one after the other.\n"
            "  Accepted: 0, which is the same for rows that are no longer than the window.\n  Set model.window_tokens=0."
        )
    if config.parallel.seq != 1:
        raise ValueError(
            f"parallel.seq = {config.parallel.seq} with train.objective = '{objective}', whose rows are not cut.\n  Accepted: 1.\n"
            "  Set parallel.seq=1, and parallel.fsdp or parallel.tensor for more devices."
        )


def _check_distill(config: ConfigDict) -> None:
    """A teacher is named where there is something to learn from it, and what is learnt from it is all that is added to the loss."""
    teacher, objective = config.distill.teacher, config.train.objective
    if bool(teacher) != (objective == DISTILL):
        raise ValueError(
            f"distill.teacher = '{teacher}' with train.objective = '{objective}'.\n"
            "  Accepted: a run, a directory of transformers or a GGUF file with distill; '' with other objectives.\n"
            f"  {'Leave out distill.teacher, or set train.objective=distill' if teacher else 'Set distill.teacher'}."
        )
    if objective != DISTILL:
        return
    added = [name for name in ("z_loss", "label_smoothing") if config.train[name]]
    if added:
        raise ValueError(
            f"train.{added[0]} = {config.train[added[0]]:g} with train.objective = 'distill', whose targets are smooth already.\n"
            f"  Accepted: 0.\n  Leave out train.{added[0]}."
        )
    if config.data.replay_source:
        raise ValueError(
            f"data.replay_source = '{config.data.replay_source}' with train.objective = 'distill': a teacher reads the rows of data.source"
            " alone.\n  Accepted: none.\n  Leave out data.replay_source and data.replay_frac, and add its text to data.source."
        )


def _check_replay(config: ConfigDict) -> None:
    data, batch = config.data, config.train.batch_seqs
    if data.replay_frac and not data.replay_source:
        raise ValueError(
            f"data.replay_frac = {data.replay_frac} without a data.replay_source.\n  Accepted: 0, or a source to take rows from.\n"
            "  Set data.replay_source."
        )
    if data.replay_source and not data.validation_frac:
        raise ValueError(
            "data.validation_frac = 0 with a data.replay_source, of which that share is held out to measure what is forgotten.\n"
            "  Accepted: a share above 0.\n  Set data.validation_frac."
        )
    if data.replay_frac and batch < 2:
        raise ValueError(
            f"data.replay_frac = {data.replay_frac} of a batch of train.batch_seqs = {batch} row.\n"
            "  Accepted: 2 rows or more, of which one at least is replayed and one is not.\n  Set train.batch_seqs."
        )


def _divides(name: str, value: int, whole_name: str, whole: int, also: str) -> str:
    return (
        f"{name} = {value} does not divide {whole_name} = {whole}.\n  Accepted: {divisors(whole)}.\n"
        f"  Set {name} to one of these {also}".rstrip()
        + "."
    )


def divisors(whole: int) -> str:
    """The numbers that divide it, listed."""
    return ", ".join(str(part) for part in range(1, whole + 1) if whole % part == 0)
