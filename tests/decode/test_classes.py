"""Classes: against the softmax of the full forward pass at places counted by hand, and against logits of transformers."""

from functools import cache
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxllm import config, models
from jaxllm.data.tokenizers.byte import ByteTokenizer
from jaxllm.data.tokenizers.char import CharTokenizer
from jaxllm.decode import classes
from jaxllm.interop import directory, weights
from jaxllm.types import Model, Params

GOLDEN = Path(__file__).resolve().parent.parent / "golden"
TOKENIZER = ByteTokenizer()
BOS, EOS = TOKENIZER.bos_id, TOKENIZER.eos_id
NAMES = ("bad", "so so", "good", "none")
TEXTS = ["good", "so so, and much longer"]


@cache
def made(name: str, head: str, **changes: Any) -> tuple[Model, Params]:
    settings = config.base()
    sizes = {"layers": 1, "width": 32, "heads": 4, "context_tokens": 40, "vocab_size": 272, "head": head, "classes": 4}
    settings.model.update({"name": name, **sizes, **changes})
    model = models.build(settings)
    return model, jax.tree.map(lambda x: 3 * x if x.ndim > 1 else x, model.init(jax.random.key(1)))


def expected(model: Model, params: Params, first: list[int], second: list[int] | None = None) -> np.ndarray:
    """The probabilities [T, C] of a row alone, without padding. The second text has the token type 1 if the model knows types."""
    ids, kinds = first + (second or []), [0] * len(first) + [1] * len(second or [])
    more = {"token_types": np.array([kinds])} if model.name == "bert" else {}
    logits = np.asarray(jax.jit(model.apply)(params, np.array([ids]), **more)[0], np.float64)
    return np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)


def check(labels: list[classes.Label], p_C: np.ndarray, top_k: int) -> None:
    """Float32, in rows of another length: 6e-6 apart as measured."""
    best = np.argsort(-p_C)[:top_k].tolist()
    assert [(label.id, label.name) for label in labels] == [(number, NAMES[number]) for number in best]
    np.testing.assert_allclose([label.probability for label in labels], p_C[best], rtol=3e-5)


@pytest.mark.parametrize("paired", [False, True])
@pytest.mark.parametrize(("name", "place"), [("bert", 0), ("gpt", -1)])
def test_a_text_has_the_class_at_its_place(name: str, place: int, paired: bool) -> None:
    """In the batch there are shorter and longer texts, which change nothing."""
    model, params = made(name, "classify")
    pairs = ["but", "no"] if paired else None
    found = classes.of_texts(model, params, TOKENIZER, TEXTS, pairs, names=NAMES, top_k=3)
    for order, (text, labels) in enumerate(zip(TEXTS, found, strict=True)):
        second = [*pairs[order].encode(), EOS] if pairs else None
        check(labels, expected(model, params, [BOS, *text.encode(), EOS], second)[place], 3)


@pytest.mark.parametrize(("name", "places"), [("bert", (1, 3, None, 5)), ("gpt", (2, 4, None, 7))])
def test_each_word_has_the_class_at_its_place(name: str, places: tuple[int | None, ...]) -> None:
    """The first token of a word is the space before it; two spaces have an empty one between them, without a token or a class."""
    model, params = made(name, "tag")
    found = classes.of_words(model, params, TOKENIZER, ["x", "ab c  de", "much longer text than this"], names=NAMES, top_k=2)
    p_TC = expected(model, params, [BOS, *b"ab c de", EOS])
    words = found[1]
    assert [word.text for word in words] == ["ab", "c", "", "de"]
    for word, place in zip(words, places, strict=True):
        if place is None:
            assert not word.labels
        else:
            check(word.labels, p_TC[place], 2)


@pytest.mark.parametrize(("case", "head"), [("bert_sequence", "classify"), ("bert_token", "tag")])
def test_golden_scores_are_those_of_transformers(case: str, head: str) -> None:
    """Of pairs, one row shorter than the other: probabilities are 2e-6 apart as measured."""
    imported, stored = directory.read(GOLDEN / case), load_file(GOLDEN / case / "expected.safetensors")
    model, params, rows = models.build(imported.config), weights.load(imported).params, []
    for ids, seen, kinds in zip(
        *(stored[f"input/{name}"] for name in ("input_ids", "attention_mask", "token_type_ids")), strict=True
    ):
        length = int(seen.sum())
        border = int((kinds[:length] == 0).sum())
        rows.append(classes.Row(ids[:length].tolist(), border, [0] if head == "classify" else range(length)))
    assert model.config.head == head
    for row, logits, p_MC in zip(rows, stored["logits"], classes.score(model, params, rows), strict=True):
        want = np.exp(np.atleast_2d(logits)[: len(row.places)].astype(np.float64))
        np.testing.assert_allclose(p_MC, want / want.sum(-1, keepdims=True), rtol=3e-5)


def test_long_texts_are_cut_as_in_training_with_a_line(caplog: pytest.LogCaptureFixture) -> None:
    """At a word; words behind the cut have no class. A pair loses the end of its longer text. A run's rows may be shorter still."""
    model, params = made("gpt", "tag")
    (words,) = classes.of_words(model, params, TOKENIZER, ["ab cd ef"], names=NAMES, top_k=1, row_tokens=8)
    check(words[1].labels, expected(model, params, [BOS, *b"ab cd"])[-1], 1)
    assert [bool(word.labels) for word in words] == [True, True, False]
    model, params = made("bert", "classify")
    (labels,) = classes.of_texts(model, params, TOKENIZER, ["a" * 50], ["b"], names=NAMES, top_k=4)
    check(labels, expected(model, params, [BOS, *b"a" * 36, EOS], [*b"b", EOS])[0], 4)
    said = [record.getMessage() for record in caplog.records]
    assert said[0].startswith("'ab cd ef' does not fit into 8 tokens") and said[1].startswith(
        "'" + "a" * 40 + "...' does not fit into 40"
    )
    assert len(said) == 2


@pytest.mark.parametrize(
    ("made_of", "texts", "pairs", "options", "words"),
    [
        (
            ("gpt", "lm"),
            ["a"],
            None,
            {},
            r"no head for classes.*'gpt'(.|\n)*Accepted: model.head = 'classify', as (.|\n)*jaxllm.generate",
        ),
        (("bert", "lm"), ["a"], None, {}, r"no head for classes(.|\n)*Accepted: (.|\n)*jaxllm.fill_mask"),
        (("bert", "none"), ["a"], None, {}, r"no head for classes(.|\n)*Accepted: (.|\n)*Train it with such a head"),
        (("bert", "tag"), ["a"], ["b"], {}, r"a class for each word of a text, not (.|\n)*Accepted: (.|\n)*without a pair"),
        (("bert", "classify"), ["a", "b"], ["c"], {}, r"1 second texts of pairs for 2 texts.\n  Accepted: none, or one for each"),
        (("bert", "classify"), ["a", ""], None, {}, r"the text '' has no token.\n  Accepted: "),
        (("bert", "classify"), ["a"], [""], {}, r"the text '' has no token"),
        (("bert", "classify"), ["a"], None, {"top_k": 0}, r"top_k = 0.\n  Accepted: 1 or more"),
        (("bert", "classify"), ["a"], None, {"names": ("x",)}, r"1 names of classes, for a model with 4 classes"),
    ],
)
def test_bad_requests_are_named(made_of: tuple[str, str], texts: list, pairs: list | None, options: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        classes.of_texts(*made(*made_of), TOKENIZER, texts, pairs, **{"top_k": 1, **options})


def test_pairs_need_an_eos_and_an_encoder_two_types() -> None:
    with pytest.raises(ValueError, match=r"tokenizer without an eos(.|\n)*Accepted: .*data.pair_field"):
        classes.of_texts(*made("bert", "classify"), CharTokenizer("ab"), ["a"], ["b"], top_k=1)
    with pytest.raises(ValueError, match=r"model.token_types = 1.\n  Accepted: 2 or more"):
        classes.of_texts(*made("bert", "classify", token_types=1), TOKENIZER, ["a"], ["b"], top_k=1)
