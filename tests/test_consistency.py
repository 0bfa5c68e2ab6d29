"""Fields of a config that contradict each other are refused, each with the words that say what fits."""

from typing import Any

import pytest

from jaxllm import config as schema
from jaxllm import consistency, registry


def config_of(**changes: Any) -> Any:
    config = schema.base()
    for key, value in changes.items():
        section, _, name = key.partition("__")
        config[section][name] = value
    return config


# objective -> (its models, its head)
FITTING = {
    "causal_lm": ("gpt llama", "lm"),
    "prefix_lm": ("gpt llama", "lm"),
    "masked_lm": ("bert", "lm"),
    "span_corruption": ("t5 transformer", "lm"),
    "seq2seq": ("t5 transformer", "lm"),
    "sequence_classification": ("bert gpt llama", "classify"),
    **dict.fromkeys(("dpo", "kto", "orpo", "sft", "simpo"), ("gpt llama", "lm")),
    "reward": ("bert gpt llama", "classify"),
    "token_classification": ("bert gpt llama", "tag"),
}


@pytest.mark.parametrize("objective", registry.names("objective"))
def test_each_objective_takes_its_models_and_head(objective: str) -> None:
    fitting, head = FITTING[objective]
    for model in registry.names("model"):
        config = config_of(train__objective=objective, model__name=model, model__head=head, chat__template="chatml")
        if model in fitting.split():
            schema.check(config)
        else:
            with pytest.raises(
                ValueError, match=rf"train.objective = '{objective}' does not fit model.name = '{model}'\.\n  Accepted: "
            ):
                schema.check(config)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"train__objective": "masked_lm"}, "Accepted: bert for masked_lm; causal_lm, .*prefix_lm, .* for llama"),
        (
            {"train__objective": "sequence_classification"},
            "model.head = 'lm' does not fit .*Accepted: classify.\n",
        ),
        ({"train__objective": "token_classification", "model__head": "classify"}, "Accepted: tag"),
        ({"model__head": "none"}, "model.head = 'none' does not fit train.objective = 'causal_lm'.\n  Accepted: lm"),
        ({"train__objective": "sft"}, "chat.template = 'tokenizer' with tokenizer.kind = 'bpe', .*Set chat.template=chatml"),
        (
            {"preference__loss": "ipo"},
            "preference.loss = 'ipo' with train.objective = 'causal_lm', which has one loss.\n  Accepted: sigmoid",
        ),
        (
            {"train__objective": "dpo", "chat__template": "plain", "preference__loss": "ipo", "preference__label_smoothing": 0.1},
            "preference.label_smoothing = 0.1 with preference.loss = 'ipo', which does not smooth.\n  Accepted: 0; a share with .*robust",
        ),
        (
            {"train__objective": "dpo", "chat__template": "plain", "preference__loss": "cdpo"},
            "label_smoothing = 0 with preference.loss = 'cdpo', which would be sigmoid.\n  Accepted: a share above 0",
        ),
        ({"data__input_tokens": 300}, "data.input_tokens = 300 is more than model.context_tokens = 256"),
        (
            {"train__objective": "seq2seq", "model__name": "t5", "data__split_by": "characters"},
            "data.split_by = 'characters' cuts a text, .*Set data.split_by=documents",
        ),
        (
            {"train__frozen_layers": 2, "precision__frozen": "bfloat16"},
            r"precision.frozen = 'bfloat16' with train.frozen_layers = 2",
        ),
        ({"lora__also": "embed/.*"}, r"lora.also = 'embed/.\*' has no effect with train.transforms = \(\), which has no adapter"),
        ({"lora__also": "x", "train__transforms": ("lora",), "train__trainable": ".*/b"}, "no effect with train.trainable"),
        (
            {"tokenizer__add_tokens": ("<|note|>", " ")},
            r"tokenizer.add_tokens = .* has ' ', which no prompt could show.\n  Accepted: ",
        ),
        ({"train__transforms": ("lora", "dora")}, "has 2 adapters, lora and dora"),
        ({"train__transforms": ("nf4", "lora", "int8")}, "has 2 frozen forms, nf4 and int8"),
    ],
)
def test_contradictions(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=f"(?s){words}"):
        schema.check(config_of(**changes))


@pytest.mark.parametrize("objective", consistency.PREFERENCES)
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, ""),
        ({"chat__train_on": "last"}, ""),
        ({"model__name": "t5"}, "does not fit model.name = 't5'.\n  Accepted: .*gpt or llama for"),
        ({"chat__train_on": "all"}, "chat.train_on = 'all' .*Set chat.train_on=assistant"),
        ({"data__replay_source": "x.txt"}, "data.replay_source = 'x.txt' .*Leave out data.replay_source"),
        ({"model__window_tokens": 8}, "model.window_tokens = 8 .*Set model.window_tokens=0"),
        ({"parallel__seq": 2}, "parallel.seq = 2 .*Set parallel.seq=1"),
        ({"chat__template": "tokenizer"}, "chat.template = 'tokenizer' with tokenizer.kind = 'bpe', .*Set chat.template=chatml"),
        ({"data__split_by": "characters"}, "data.split_by = 'characters' cuts a text, .*Set data.split_by=documents"),
    ],
)
def test_what_forked_rows_cannot_be_combined_with(objective: str, changes: dict[str, Any], words: str) -> None:
    head = "classify" if objective == "reward" else "lm"
    config = config_of(**{"train__objective": objective, "model__head": head, "chat__template": "chatml"} | changes)
    if not words:
        consistency.check(config)
        return
    with pytest.raises(ValueError, match=f"(?s){words}") as caught:
        consistency.check(config)
    assert len(str(caught.value).splitlines()) == 3
