"""What a reward model says of answers: what training sees of them, one by one or together, on one device or on eight."""

from typing import Any

import jax
import numpy as np
import pytest

from jaxllm import config as schema
from jaxllm import models
from jaxllm.data import examples, tokenize
from jaxllm.data.shards import Totals
from jaxllm.data.sources.preferences import document
from jaxllm.decode import classes
from jaxllm.decode.reward_model import RewardModel
from jaxllm.objectives import rewards
from jaxllm.parallel import plan as plans
from jaxllm.types import Unconstrained

WIDTH = 128
MODELS = {"gpt": {"name": "gpt"}, "llama": {"name": "llama", "kv_heads": 2}, "bert": {"name": "bert"}}
PAIRS = [("Say hello.", "Hello!", "No."), ("1 + 1?", "2", "It is three, I think."), ("Who?", "Me, a model.", "x" * 20)]


def config_of(name: str, **changes: Any) -> Any:
    config = schema.base()
    sizes = {"layers": 2, "width": 32, "heads": 4, "context_tokens": WIDTH, "head": "classify", "classes": 1, "init_std": 0.3}
    config.model.update(sizes | MODELS[name])
    config.chat.template, config.tokenizer.kind, config.train.objective = "chatml", "byte", "reward"
    config.model.vocab_size = tokenize.make(config, list).vocab_size
    config.parallel.update(changes)
    return config


def made(name: str, **changes: Any) -> tuple[Any, Any, Any, Any]:
    """(config, model, params, tokenizer)."""
    config = config_of(name, **changes)
    model = models.build(config)
    return config, model, model.init(jax.random.key(1)), tokenize.make(config, list)


def said(prompt: str, answer: str) -> list[Any]:
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]


@pytest.mark.parametrize("name", MODELS)
def test_rewards_are_those_of_training(name: str) -> None:
    """Of pairs as `prepare` packs them and the objective reads them."""
    config, model, params, tokenizer = made(name)
    side, documents = (
        examples.make(config),
        [document(said(p, "")[:1], [said("", a)[1:], said("", b)[1:]], "here") for p, a, b in PAIRS],
    )
    blocks = list(side.pack(iter(documents), tokenizer, (), Totals()))
    stored = {
        key: np.concatenate([block[key] for block in blocks]).astype(column.dtype)
        for key, column in side.columns(tokenizer.vocab_size).items()
    }
    batch = side.batch(tokenizer)(stored, np.arange(len(stored["tokens"])), 0, 0)
    objective = rewards.make(model, config)
    hidden = model.hidden(params, batch["tokens"], **{each: batch[each] for each in objective.reads})
    pairs = objective.compare(hidden, model.head(params), batch)
    there = np.asarray(pairs.there) > 0
    assert there.sum() == len(PAIRS)
    scorer = RewardModel(model, params, tokenizer)
    for which, trained in ((1, pairs.chosen), (2, pairs.rejected)):
        found = scorer.score([said(pair[0], pair[which]) for pair in PAIRS])
        assert found.dtype == np.float32
        np.testing.assert_allclose(sorted(found), sorted(np.asarray(trained)[there]), rtol=0, atol=1e-5)


def test_an_answer_does_not_depend_on_those_beside_it() -> None:
    _, model, params, tokenizer = made("llama")
    scorer = RewardModel(model, params, tokenizer)
    prompts, answers = [pair[0] for pair in PAIRS] * 20, [pair[1] * (1 + index % 3) for index in range(20) for pair in PAIRS]
    together = scorer(prompts, answers, {"tokens": [1] * 60})
    np.testing.assert_allclose(
        together[:9], [scorer([p], [a])[0] for p, a in zip(prompts[:9], answers[:9], strict=True)], rtol=0, atol=1e-5
    )
    assert len(set(together.tolist())) == 9
    # By ids, and behind a conversation instead of a question.
    ids = [scorer.encode(said(*each)) for each in zip(prompts, answers, strict=True)]
    assert ids[0][-1] == tokenizer.special_tokens["<|im_end|>"]
    np.testing.assert_array_equal(scorer.score_ids(ids), together)
    np.testing.assert_array_equal(scorer(["?"] * 60, answers, {"messages": [said(p, "")[:1] for p in prompts]}), together)
    longer = [[{"role": "system", "content": "Be kind."}, *said("A", "B"), {"role": "user", "content": "C"}]]
    assert scorer(["C"], ["D"], {"messages": longer}) != scorer(["C"], ["D"])
    assert scorer.score([]).shape == (0,)


@pytest.mark.parametrize("mesh", [{"data": 8}, {"data": 2, "fsdp": 2, "tensor": 2}], ids=str)
@pytest.mark.parametrize("name", ["llama", "bert"])
def test_a_mesh_gives_the_rewards_of_one_device(name: str, mesh: dict[str, int]) -> None:
    config, model, params, tokenizer = made(name, **mesh)
    conversations = [said(p, a) for p, *both in PAIRS for a in both] * 3
    expected = RewardModel(model, params, tokenizer).score(conversations)
    plan = plans.make(config)
    spread = models.build(config, Unconstrained("the compiler decides"))
    found = RewardModel(spread, jax.device_put(params, plan.replicated), tokenizer, plan).score(conversations)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


REFUSED = {
    "no answer at the end": said("a", "b")[:1],
    "a message that spells <|im_end|>": said("a", "b<|im_end|>"),
    r"\d+ tokens, more than model.context_tokens": said("a", "b" * WIDTH),
    "an answer before the first question": said("a", "b")[1:],
}


@pytest.mark.parametrize("why", REFUSED)
def test_what_cannot_be_scored_is_an_error(why: str) -> None:
    _, model, params, tokenizer = made("gpt")
    with pytest.raises(ValueError, match=rf"conversation 1 cannot be scored: {why}\.\n  Accepted: messages .*\n  Leave it out"):
        RewardModel(model, params, tokenizer).score([said("a", "b"), REFUSED[why]])


def test_other_models_are_refused_and_a_reward_is_no_class() -> None:
    _, model, params, tokenizer = made("gpt")
    with pytest.raises(
        ValueError, match="this model has one class, .*\n  Accepted: two classes or more.\n  Use python -m jaxllm.reward"
    ):
        classes.of_texts(model, params, tokenizer, ["a"], top_k=1)
    config = config_of("gpt")
    config.model.update({"head": "lm"})
    with pytest.raises(ValueError, match=r"gives no reward \(model.head = 'lm', model.classes = 1\)\.\n  Accepted: model.head"):
        RewardModel(models.build(config), params, tokenizer)
    plain = config_of("gpt")
    plain.train.objective, plain.model.head = "causal_lm", "lm"
    with pytest.raises(ValueError, match="has no chat template"):
        RewardModel(model, params, tokenize.make(plain, list))
