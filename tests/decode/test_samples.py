"""Samples of a training run: what each kind of model shows behind a prompt, and which runs have none."""

from typing import Any

import jax
import numpy as np
import pytest

from jaxllm import config, models
from jaxllm.data import tokenize
from jaxllm.data.tokenizers.added import Added
from jaxllm.data.tokenizers.byte import ByteTokenizer
from jaxllm.decode import generate, masks, samples, text
from jaxllm.ops import attention, sampling
from jaxllm.ops.attention import splash

TOKENIZER = ByteTokenizer(Added(mask=True))


def settings_of(**fields: Any) -> Any:
    settings = config.base()
    sizes = {"layers": 1, "width": 16, "heads": 2, "context_tokens": 32, "vocab_size": TOKENIZER.vocab_size}
    settings.model.update(sizes)
    settings.sample.update({"tokens": 6, "prompts": ("The", "a [MASK] b")})
    for key, value in fields.items():
        section, _, name = key.partition("__")
        settings[section][name] = value
    return settings


@pytest.mark.parametrize(("name", "arrow"), [("llama", ""), ("t5", " -> ")])
def test_writers_write_behind_every_prompt(name: str, arrow: str) -> None:
    settings, said = settings_of(model__name=name), []
    sampler = samples.make(settings, TOKENIZER, said.append)
    assert sampler is not None and sampler.prompts == ("The", "a [MASK] b")
    model = models.build(settings)
    params = model.init(jax.random.key(0))
    drawn = sampling.Settings(temperature=settings.sample.temperature)
    expected = text.complete(model, params, TOKENIZER, sampler.prompts, drawn, max_new_tokens=6, seed=7)
    assert sampler.generate(params, 7) == [arrow + written for written in expected]
    assert not said


def test_prompts_of_conversations_are_messages_and_answers_end_where_the_template_ends_them() -> None:
    settings = settings_of(train__objective="sft", chat__template="chatml", tokenizer__kind="byte", model__context_tokens=64)
    talker: Any = tokenize.make(settings, list)
    settings.model.vocab_size = talker.vocab_size
    sampler = samples.make(settings, talker, print)
    assert sampler is not None and sampler.prompts == ("The", "a [MASK] b")
    model = models.build(settings)
    params = model.init(jax.random.key(0))
    prompts_ids = [
        talker.encode_with_specials(f"<s><|im_start|>user\n{p}<|im_end|>\n<|im_start|>assistant\n") for p in sampler.prompts
    ]
    drawn = sampling.Settings(temperature=settings.sample.temperature)
    options = {"max_new_tokens": 6, "stop_ids": (257, 260), "vocab_size": 261, "seed": 7}
    expected = generate.generate(model, params, prompts_ids, drawn, **options)
    assert sampler.generate(params, 7) == [f" -> {talker.decode(ids)}" for ids in expected]


def test_an_encoder_fills_the_prompts_that_have_a_mask() -> None:
    settings, said = settings_of(model__name="bert"), []
    sampler = samples.make(settings, TOKENIZER, said.append)
    assert sampler is not None and sampler.prompts == ("a [MASK] b",)
    assert said == ["samples: 1 of sample.prompts left out, as there is no [MASK] in it for this model to fill"]
    model = models.build(settings)
    params = model.init(jax.random.key(0))
    assert sampler.generate(params, 0) == [" -> " + masks.complete(model, params, TOKENIZER, ["a [MASK] b"])[0]]
    assert samples.make(settings_of(model__name="bert", sample__prompts=("a",)), TOKENIZER, said.append) is None


def test_samples_ask_no_kernel_to_run_on_each_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiler lays out their arrays, so nobody knows what a device holds."""
    said: list[tuple[str, ...]] = []
    monkeypatch.setattr(attention, "explain", lambda *words: said.append(words))
    monkeypatch.setattr(splash, "BACKEND", splash.BACKEND._replace(refuse=lambda *_: None))
    monkeypatch.setattr(masks, "complete", lambda model, params, *_: [str(model.apply(params, np.zeros((1, 4), np.int32)).shape)])
    settings = settings_of(model__name="bert", model__attention="splash")
    sampler = samples.make(settings, TOKENIZER, print)
    assert sampler is not None
    params = jax.eval_shape(models.build(settings).init, jax.random.key(0))
    jax.eval_shape(lambda params: jax.tree.leaves((sampler.generate(params, 0), params))[1:], params)
    assert said == [("splash", "blocked", "the compiler alone decides where the arrays of a sample lie")]


def test_there_are_runs_without_samples() -> None:
    for fields in ({"sample__tokens": 0}, {"sample__prompts": ()}, {"model__head": "classify", "model__classes": 2}):
        assert samples.make(settings_of(**fields), TOKENIZER, print) is None


def test_prompts_that_cannot_be_used_are_told_beforehand() -> None:
    with pytest.raises(ValueError, match=r"sample.prompts: a prompt of 41 tokens[\s\S]*Accepted: 1 to 31"):
        samples.make(settings_of(sample__prompts=("a" * 40,)), TOKENIZER, print)
    with pytest.raises(ValueError, match=r"sample.prompts: a text of 43 tokens"):
        samples.make(settings_of(model__name="bert", sample__prompts=("[MASK]" + "a" * 40,)), TOKENIZER, print)
