"""Filled masks: against the softmax of the full forward pass, whatever else is filled beside them."""

from functools import cache
from typing import Any

import jax
import numpy as np
import pytest

from jaxllm import config, models
from jaxllm.data.tokenizers.added import Added
from jaxllm.data.tokenizers.byte import ByteTokenizer
from jaxllm.decode import marks, masks
from jaxllm.types import Model, Params

TOKENIZER = ByteTokenizer(Added(mask=True))
TEXTS = ["The [MASK] sat.", "a<mask>b[MASK]c[MASK]", "[MASK]"]


@cache
def made(name: str = "bert", vocab_size: int = 272, **changes: Any) -> tuple[Model, Params]:
    """More rows in the embedding than the tokenizer has tokens."""
    settings = config.base()
    settings.model.update(
        {"name": name, "layers": 2, "width": 32, "heads": 4, "context_tokens": 40, "vocab_size": vocab_size, **changes}
    )
    model = models.build(settings)
    return model, jax.tree.map(lambda x: 3 * x if x.ndim > 1 else x, model.init(jax.random.key(1)))


def encoded(text: str) -> list[int]:
    middle: list[int] = []
    for part in text.replace("<mask>", "[MASK]").split("[MASK]"):
        middle += [*part.encode(), TOKENIZER.mask_id]
    return [TOKENIZER.bos_id, *middle[:-1], TOKENIZER.eos_id]


def test_guesses_are_the_softmax_of_the_full_forward_pass() -> None:
    """Of a text alone, a first one by its token types, without padding; in the batch there are longer texts and texts with more masks.
    Logits of size 10 in float32: probabilities are 7e-6 apart as measured, and guesses 3 % and more."""
    model, params = made()
    found = masks.fill(model, params, TOKENIZER, TEXTS, 5)
    for text, guesses in zip(TEXTS, found, strict=True):
        ids = encoded(text)
        logits = np.asarray(model.apply(params, np.array([ids]), token_types=np.zeros((1, len(ids)), int))[0], np.float64)
        logits = logits[:, : TOKENIZER.vocab_size]
        places = [place for place, token in enumerate(ids) if token == TOKENIZER.mask_id]
        assert len(guesses) == len(places)
        for place, mine in zip(places, guesses, strict=True):
            p = np.exp(logits[place]) / np.exp(logits[place]).sum()
            best = np.argsort(-p)[:5]
            assert [guess.id for guess in mine] == best.tolist()
            np.testing.assert_allclose([guess.probability for guess in mine], p[best], rtol=3e-5)
            assert [guess.text for guess in mine] == [marks.spell(TOKENIZER, int(token)) for token in best]
    (alone,) = masks.fill(model, params, TOKENIZER, TEXTS[1:2], 5)
    assert [[guess.id for guess in mine] for mine in alone] == [[guess.id for guess in mine] for mine in found[1]]


def test_texts_are_completed_by_the_likeliest() -> None:
    model, params = made()
    (whole,) = masks.complete(model, params, TOKENIZER, ["The [MASK] sat."])
    ((best, *_),) = masks.fill(model, params, TOKENIZER, ["The [MASK] sat."], 1)[0]
    assert whole == TOKENIZER.decode([*b"The ", best.id, *b" sat."])
    assert masks.has_mask(TOKENIZER, "a <mask>") and not masks.has_mask(TOKENIZER, "a mask")


def test_special_tokens_are_named() -> None:
    assert marks.spell(TOKENIZER, 97) == "a"
    assert marks.spell(TOKENIZER, TOKENIZER.eos_id) == "</s>"


@pytest.mark.parametrize(
    ("name", "text", "top_k", "words"),
    [
        ("bert", "nothing hidden", 5, r"no mask in the text 'nothing hidden'.\n  Accepted: a text with \[MASK\] or <mask> in it"),
        ("bert", "[MASK]" + "a" * 40, 5, r"a text of 43 tokens[\s\S]*Accepted: 1 to 40"),
        ("bert", "[MASK]", 0, r"top_k = 0.\n  Accepted: 1 to 260"),
        ("gpt", "[MASK]", 5, r"'gpt' fills no masks[\s\S]*jaxllm.generate"),
    ],
)
def test_bad_requests_are_named(name: str, text: str, top_k: int, words: str) -> None:
    model, params = made(name)
    with pytest.raises(ValueError, match=words):
        masks.fill(model, params, TOKENIZER, [text], top_k)


def test_models_and_tokenizers_without_masks_are_refused() -> None:
    model, params = made(head="tag", classes=2)
    with pytest.raises(ValueError, match=r"model.head = 'tag'"):
        masks.fill(model, params, TOKENIZER, ["[MASK]"], 1)
    with pytest.raises(ValueError, match=r"the tokenizer has no mask token"):
        masks.fill(*made(), ByteTokenizer(), ["[MASK]"], 1)
