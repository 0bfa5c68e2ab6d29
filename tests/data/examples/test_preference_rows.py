"""Forked rows: each answer stands behind its prompt as it would alone, none is lost or cut, and what cannot be used is named."""

import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from corpus import Lines
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from jaxllm import config as schema
from jaxllm.data import examples, tokenize
from jaxllm.data.chat import answers
from jaxllm.data.documents import Document
from jaxllm.data.examples import forked, preferences, shown
from jaxllm.data.prepare import prepare
from jaxllm.data.shards import Totals
from jaxllm.data.sources.preferences import document
from jaxllm.prepare import show_rows, table

BOS, EOS, PAD, START, END = range(256, 261)
TEXT = st.text(alphabet="ab é\n", min_size=1, max_size=6).filter(str.strip)
# Prompt, chosen and rejected, which differ.
PAIRS = st.lists(st.tuples(TEXT, TEXT, TEXT).filter(lambda each: each[1] != each[2]), min_size=1, max_size=8)


def config_of(objective: str = "dpo", template: str = "chatml", width: int = 96, **changes: Any) -> Any:
    config = schema.base()
    config.train.objective, config.model.context_tokens = objective, 512
    config.data.row_tokens, config.tokenizer.kind, config.chat.template = width, "byte", template
    for key, value in changes.items():
        section, _, name = key.partition("__")
        config[section][name] = value
    return config


def judged(prompt: str, *said: str, score: float | None = None) -> Document:
    return document(
        [{"role": "user", "content": prompt}], [[{"role": "assistant", "content": each}] for each in said], "here", score
    )


def packed(config: Any, documents: list[Document], tokenizer: Any = None) -> tuple[dict[str, np.ndarray], Totals]:
    """(the arrays of a batch of all rows, what was counted)."""
    tokenizer = tokenizer or tokenize.make(config, list)
    side, totals = examples.make(config), Totals()
    blocks = list(side.pack(iter(documents), tokenizer, (), totals))
    rows = {
        name: np.concatenate([block[name] for block in blocks]).astype(column.dtype).astype(np.int32)
        for name, column in side.columns(tokenizer.vocab_size).items()
    }
    batch = side.batch(tokenizer)(rows, np.arange(len(rows["tokens"])), 0, 0)
    assert {name: (array.shape[1], array.dtype) for name, array in batch.items()} == side.arrays
    return batch, totals


def unfolded(batch: dict[str, np.ndarray]) -> list[list[tuple[list[int], list[int]]]]:
    """Of each segment of the rows, for each of its branches what a row alone would hold: (ids, those that are predicted)."""
    found = []
    for row in range(len(batch["tokens"])):
        for number in range(1, batch["segments"][row].max() + 1):
            here = {name: array[row][batch["segments"][row] == number] for name, array in batch.items()}
            assert (np.diff(here["branches"]) >= 0).all()
            alone = []
            for branch in range(1, here["branches"].max() + 1):
                seen = np.isin(here["branches"], (0, branch))
                own = here["branches"] == branch
                assert here["positions"][seen].tolist() == list(range(seen.sum()))
                assert here["tokens"][own][1:].tolist() == here["targets"][own][:-1].tolist()
                assert not here["weights"][here["branches"] == 0].any()
                last = here["targets"][own][-1]
                alone.append(([*here["tokens"][seen].tolist(), int(last)], here["targets"][own][here["weights"][own] > 0].tolist()))
            found.append(alone)
    return found


def by_hand(prompt: str, said: str) -> tuple[list[int], list[int]]:
    """ChatML written byte by byte."""
    answer = [*said.encode(), END]
    return [BOS, START, *f"user\n{prompt}".encode(), END, *b"\n", START, *b"assistant\n", *answer], answer


@settings(max_examples=60, deadline=None)
@given(PAIRS)
def test_pairs_come_back(pairs: list[tuple[str, str, str]]) -> None:
    """Packed, and each in a row alone: the same pairs, and those that are written by hand."""
    documents = [judged(*each) for each in pairs]
    batch, totals = packed(config_of(), documents)
    expected = [[by_hand(prompt, said) for said in pair] for prompt, *pair in pairs]
    assert sorted(unfolded(batch)) == sorted(expected)
    padded = [packed(config_of(), [each])[0] for each in documents]
    assert [unfolded(each) for each in padded] == [[each] for each in expected]
    assert totals.documents == len(pairs) and not totals.dropped and not totals.cut
    assert totals.tokens == (batch["segments"] > 0).sum() and totals.weighted_tokens == batch["weights"].sum()
    # A prompt stands there once, without its last token, which every answer begins with.
    assert totals.tokens == sum(len(chosen[0]) + len(rejected[1]) - 2 + 1 for chosen, rejected in expected)
    padding = batch["segments"] == 0
    assert (batch["tokens"][padding] == PAD).all() and (batch["targets"][padding] == PAD).all()
    assert not batch["weights"][padding].any() and not batch["branches"][padding].any()


def test_a_row_by_eye() -> None:
    a, b, c, d, e, line = *b"abcde", 10
    documents = [judged("a", "bc", "d", score=1.5), judged("b", "e", "ee")]
    batch, _ = packed(config_of("dpo", "plain", 16), documents)
    expected = {
        #          trunk  chosen       rejected   trunk  chosen    rejected
        "tokens": [BOS, a, line, b, c, line, d, BOS, b, line, e, line, e, e, PAD, PAD],
        "targets": [a, line, b, c, EOS, d, EOS, b, line, e, EOS, e, e, EOS, PAD, PAD],
        "segments": [1] * 7 + [2] * 7 + [0] * 2,
        "branches": [0, 0, 1, 1, 1, 2, 2, 0, 0, 1, 1, 2, 2, 2, 0, 0],
        "positions": [0, 1, 2, 3, 4, 2, 3, 0, 1, 2, 3, 2, 3, 4, 0, 1],
        "weights": [0, 0, 1, 1, 1, 1, 1, 0, 0, 1, 1, 1, 1, 1, 0, 0],
    }
    assert batch.keys() == expected.keys()
    for name, row in expected.items():
        np.testing.assert_array_equal(batch[name], [row], err_msg=name)
    tokenizer = tokenize.make(config_of("dpo", "plain"), list)
    parts = shown.pairs({name: array[0] for name, array in batch.items()}, tokenizer, ())
    assert [(part.title, list(map(tuple, part.pieces))) for part in parts] == [
        ("pair 1, prompt, 3 tokens", [("<s>a\n", False)]),
        ("pair 1, chosen, 3 tokens, 3 trained", [("bc</s>", True)]),
        ("pair 1, rejected, 2 tokens, 2 trained", [("d</s>", True)]),
        ("pair 2, prompt, 3 tokens", [("<s>b\n", False)]),
        ("pair 2, chosen, 2 tokens, 2 trained", [("e</s>", True)]),
        ("pair 2, rejected, 3 tokens, 3 trained", [("ee</s>", True)]),
        ("padding, 2 tokens", []),
    ]


def test_a_row_of_scored_pairs_by_eye() -> None:
    """The token that ends an answer is read there, and counts; so does the prompt's last one."""
    a, b, c, d, e, line = *b"abcde", 10
    documents = [judged("a", "bc", "d", score=-1.55), judged("b", "e", "ee")]
    batch, totals = packed(config_of("reward", "plain", 18), documents)
    expected = {
        "tokens": [BOS, a, line, b, c, EOS, d, EOS, BOS, b, line, e, EOS, e, e, EOS, PAD, PAD],
        "segments": [1] * 8 + [2] * 8 + [0] * 2,
        "branches": [0, 0, 0, 1, 1, 1, 2, 2, 0, 0, 0, 1, 1, 2, 2, 2, 0, 0],
        "positions": [0, 1, 2, 3, 4, 5, 3, 4, 0, 1, 2, 3, 4, 3, 4, 5, 0, 1],
        "weights": [0, 0, 0, 0, 0, 1, 0, 1, 0, 0, 0, 0, 1, 0, 0, 1, 0, 0],
        "margins": [np.float32(-1.55)] * 8 + [0] * 10,
    }
    for name, row in expected.items():
        np.testing.assert_array_equal(batch[name], [row], err_msg=name)
    assert totals.weighted_tokens == 4


@pytest.mark.parametrize("count", [2, 3, 7])
def test_mismatched_answers_are_rotated_by_one(count: int) -> None:
    """As TRL does within a batch (trl 1.16, KTOTrainer, add_kl_completion_ids): [y[-1]] + y[:-1]."""
    said = [f"answer {number}" for number in range(count)]
    documents = [judged(f"ask {number}", each, score=number % 2) for number, each in enumerate(said)]
    batch, totals = packed(config_of("kto", width=160), documents)
    others = said[-1:] + said[:-1]
    expected = [[by_hand(f"ask {n}", said[n]), by_hand(f"ask {n}", others[n])] for n in range(count)]
    assert sorted(unfolded(batch)) == sorted(expected)
    assert totals.documents == count
    for row in range(len(batch["tokens"])):
        for number in range(1, batch["segments"][row].max() + 1):
            here = batch["segments"][row] == number
            asked = bytes(each for each in batch["tokens"][row][here].tolist() if each < 256).decode()
            assert set(batch["desirable"][row][here].tolist()) == {int(re.search(r"ask (\d)", asked)[1]) % 2}  # type: ignore[index]
    assert not batch["desirable"][batch["segments"] == 0].any()


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 2), min_size=2, max_size=8).filter(lambda asked: len(set(asked)) > 1))
def test_a_mismatched_answer_is_none_to_the_same_prompt(asked: list[int]) -> None:
    """It is that of the nearest example before it, in a circle, that has another prompt."""
    given_examples = [preferences.Prompted(judged(str(prompt), str(place)), [], [], 1, False) for place, prompt in enumerate(asked)]
    found = {int(a.document.answers[0][0]["content"]): b.document for a, b in preferences.mismatched(given_examples)}
    assert sorted(found) == list(range(len(asked)))
    for place, other in found.items():
        before = [(place - step) % len(asked) for step in range(1, len(asked))]
        assert int(other.answers[0][0]["content"]) == next(each for each in before if asked[each] != asked[place])


def test_answers_to_one_prompt_have_no_mismatch() -> None:
    with pytest.raises(
        ValueError, match=r"all 3 answers that can be used have one and the same prompt, here: .*\n  Accepted: .*\n  Give"
    ):
        packed(config_of("kto"), [judged("a", str(number), score=1) for number in range(3)])


def test_a_mismatched_answer_is_cut_where_the_row_ends() -> None:
    """No example is lost because another one is long; without any room for another answer it is."""
    long = "y" * 40
    batch, totals = packed(config_of("kto", "plain", 50), [judged("a", long, score=1), judged("b", "z", score=0)])
    assert totals.documents == 2 and not totals.dropped and (batch["segments"] == 1).sum(1).tolist() == [2 + 2 + 41, 2 + 41 + 2]
    batch, totals = packed(config_of("kto", "plain", 44), [judged("a", long, score=1), judged("b", "z", score=0)])
    assert totals.documents == 2 and (batch["segments"] == 1).sum(1).tolist() == [2 + 2 + 40, 2 + 41 + 1]
    assert [len(other[1]) for _, other in unfolded(batch)] == [40, 1]
    _, totals = packed(
        config_of("kto", "plain", 43), [judged(each, said, score=1) for each, said in zip("abc", (long, "y", "y"), strict=True)]
    )
    assert (totals.documents, totals.dropped) == (2, {preferences.LONG["answers"]: 1})


def test_prompts_that_are_split_otherwise_before_one_answer(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where an answer's first token takes in the end of the prompt, the branches begin earlier, and what is the prompt's does not count."""
    rows = {
        "x": ([1, 2, 3, 4, 9], [0, 0, 0, 1, 1]),
        "y": ([1, 2, 5, 6, 7, 9, 8], [0, 0, 0, 0, 1, 1, 0]),
        "z": ([1, 2, 6, 6, 6, 6, 7, 9], [0, 0, 0, 0, 0, 0, 1, 1]),
        "all": ([1, 2, 9], [1, 1, 1]),
    }

    def encode(messages: Any) -> answers.Encoded:
        ids, trained = rows[messages[-1]["content"]]
        return answers.Encoded(np.array(ids, np.int32), np.array(trained, bool), True)

    found = preferences.prompted(judged("q", "x", "y"), encode)
    side = forked.predicted(found.ids, found.trained, found.prompt_tokens)
    assert {name: array.tolist() for name, array in side.items()} == {
        "tokens": [1, 2, 3, 4, 2, 5, 6, 7],
        "targets": [2, 3, 4, 9, 5, 6, 7, 9],
        "weights": [0, 0, 1, 1, 0, 0, 1, 1],
        "branches": [0, 1, 1, 1, 2, 2, 2, 2],
    }
    assert found.resplit and found.length == len(side["tokens"]) == 8
    for said in (("x", "z"), ("z", "x")):
        assert preferences.prompted(judged("q", *said), encode).prompt_tokens == 2
    with pytest.raises(answers.Refused, match="no token before the answer"):
        preferences.prompted(judged("q", "x", "all"), encode)
    monkeypatch.setattr(answers, "make", lambda tokenizer, train_on: encode)
    packed(config_of(), [judged("q", "x", "y"), judged("q", "x", "z")])
    assert "in 2 of 2 prompts with answers what stands before an answer is split into other tokens" in caplog.text


def test_ids_beyond_the_vocabulary_are_refused() -> None:
    tokenizer = tokenize.make(config_of(), list)
    tokenizer.vocab_size = END
    with pytest.raises(ValueError, match=rf"gave ids from .* to {END}.\n  Accepted: 0 to {END - 1}"):
        packed(config_of(), [judged("a", "b", "c")], tokenizer)


def test_a_tokenizer_is_made_of_all_answers(tmp_path: Path) -> None:
    rows = [{"prompt": f"p{number}", "chosen": "yes", "rejected": "é!"} for number in range(9)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = config_of("dpo", "plain", data__source=str(tmp_path / "rows.jsonl"), tokenizer__kind="char", data__validation_frac=0.3)
    tokenizer = prepare(config, tmp_path / "data", log=Lines()).tokenizer
    assert tokenizer.decode(tokenizer.encode("pyesé!")) == "pyesé!"


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.lists(st.integers(1, 3), min_size=1, max_size=4)), max_size=4), st.integers(0, 3))
def test_positions(segments: list[tuple[int, list[int]]], padding: int) -> None:
    """Of trunks of any length, of none, too, and of any number of branches."""
    expected: list[tuple[int, int, int]] = []
    for number, (trunk, branches) in enumerate(segments, 1):
        expected += [(number, 0, place) for place in range(trunk)]
        expected += [(number, b, trunk + place) for b, length in enumerate(branches, 1) for place in range(length)]
    expected += [(0, 0, place) for place in range(padding)]
    columns = np.array(expected, np.int32).reshape(-1, 3).T[:, None]
    np.testing.assert_array_equal(forked.positions(columns[0], columns[1]), columns[2])


UNUSABLE = {
    preferences.IDENTICAL: judged("a", "same", "same"),
    preferences.EMPTY: judged("a", "b", " \n"),
    preferences.LONG_PROMPT: judged("x" * 100, "b", "c"),
    preferences.LONG["pairs"]: judged("a", "b" * 50, "c" * 50),
    "a message that spells <|im_end|>": judged("a", "b", "c<|im_end|>"),
}


@pytest.mark.parametrize("objective", ["orpo", "reward"])
def test_what_cannot_be_used_is_left_out_by_its_reason(objective: str, caplog: pytest.LogCaptureFixture) -> None:
    good = [judged(f"ask {number}", "b", "c") for number in range(6)]
    _, totals = packed(config_of(objective), [*UNUSABLE.values(), *good])
    assert totals.dropped == dict.fromkeys(UNUSABLE, 1) and totals.documents == 6
    assert "2 of 11 pairs are longer than a row: to be whole, the longest pair needs rows of" in caplog.text
    assert "data.row_tokens is 96" in caplog.text


def test_a_set_of_which_most_cannot_be_used_is_refused_with_an_example() -> None:
    same = UNUSABLE[preferences.IDENTICAL]
    with pytest.raises(
        ValueError, match=r"3 of 4 pairs cannot be used:\n    2 x chosen and rejected are identical\n    1 x"
    ) as caught:
        packed(config_of(), [same, same, UNUSABLE[preferences.EMPTY], judged("a", "b", "c")])
    text = str(caught.value)
    assert text.count("    <s><|im_start|>user\n    a<|im_end|>\n    <|im_start|>assistant\n    same<|im_end|>") == 2
    assert "\n  Accepted: answers that are not empty" in text and "\n  Set another chat.template" in text
    with pytest.raises(ValueError, match="1 of 1 pairs cannot be used") as caught:
        packed(config_of(), [UNUSABLE[preferences.LONG["pairs"]]])
    needed = len(by_hand("a", "b" * 50)[0]) + len(by_hand("a", "c" * 50)[1]) - 1
    assert f"the longest pair needs rows of {needed} tokens" in str(caught.value) and "\n  Raise data.row_tokens" in str(
        caught.value
    )


def test_pairs_that_just_fit() -> None:
    """27 tokens around and before the answers of 2 and 3, and one more where the prompt's last token is not shared."""
    around = len(by_hand("a", "")[0]) - 1
    pair = [judged("a", "b", "cc")]
    for objective, needed in (("dpo", around - 1 + 2 + 3), ("reward", around + 2 + 3)):
        batch, _ = packed(config_of(objective, width=needed), pair)
        assert (batch["segments"] == 1).all()
        with pytest.raises(ValueError, match="1 x a pair longer than the row"):
            packed(config_of(objective, width=needed - 1), pair)


def test_an_encoder_reads_each_answer_with_its_prompt_in_a_segment_of_its_own() -> None:
    a, b, c, d, e, line = *b"abcde", 10
    documents = [judged("a", "bc", "d", score=1.5), judged("b", "e", "c")]
    config = config_of("reward", "plain", 24, model__name="bert", model__head="classify")
    batch, totals = packed(config, documents)
    expected = {
        #          with chosen             with rejected       with chosen        with rejected
        "tokens": [BOS, a, line, b, c, EOS, BOS, a, line, d, EOS, BOS, b, line, e, EOS, BOS, b, line, c, EOS, PAD, PAD, PAD],
        "segments": [1] * 6 + [2] * 5 + [3] * 5 + [4] * 5 + [0] * 3,
        "pairs": [1] * 11 + [2] * 10 + [0] * 3,
        "branches": [1] * 6 + [2] * 5 + [1] * 5 + [2] * 5 + [0] * 3,
        "positions": [*range(6), *range(5), *range(5), *range(5), *range(3)],
        "weights": [1, 0, 0, 0, 0, 0] + [1, 0, 0, 0, 0] * 3 + [0] * 3,
        "margins": [1.5] * 11 + [0] * 13,
    }
    for name, row in expected.items():
        np.testing.assert_array_equal(batch[name], [row], err_msg=name)
    assert totals.tokens == 21 and totals.weighted_tokens == 4
    parts = list(shown.scored({name: array[0] for name, array in batch.items()}, tokenize.make(config, list), ()))
    assert parts[0] == ("pair 1, chosen, 6 tokens, better by 1.5", [("<s>", True), ("a\nbc</s>", False)]) and len(parts) == 5
    with pytest.raises(ValueError, match="the longest pair needs rows of 11 tokens"):
        packed(config_of("reward", "plain", 10, model__name="bert", model__head="classify"), documents[:1])


@pytest.fixture
def source(tmp_path: Path) -> Path:
    rows = [
        {"prompt": f"say {number}", "chosen": f"yes, {number}", "rejected": "no", "completion": f"so {number}", "label": number % 2}
        for number in range(60)
    ]
    rows += [{"prompt": "say", "chosen": "same", "rejected": "same", "completion": "", "label": 1}] * 2
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row | {"margin": 0.5}) + "\n" for row in rows))
    return tmp_path / "rows.jsonl"


SHOWN = {
    "dpo": ["pair 1, prompt, ", "pair 1, chosen, ", "pair 1, rejected, 3 tokens, 3 trained", "⟦no</s>⟧"],
    "reward": ["pair 1, chosen, ", " tokens, better by 0.5", "pair 1, rejected, 3 tokens", "no⟦</s>⟧"],
    "kto": ["example 1, good answer, ", "bad answer, ", "example 1, answer of another example for the estimate of KL, ", "⟦so "],
}


@pytest.mark.parametrize("objective", SHOWN)
def test_prepare_tells_what_it_made(tmp_path: Path, source: Path, objective: str) -> None:
    config = config_of(objective, "plain", data__source=str(source), data__validation_frac=0.2)
    lines = Lines()
    prepared = prepare(config, tmp_path / "data", log=lines)
    unit = {"kto": "answers"}.get(objective, "pairs")
    train = prepared.train
    assert f"train: {train.documents:,} {unit}, {train.filled_frac:.1%} of the positions are filled" in lines
    why = preferences.EMPTY if objective == "kto" else preferences.IDENTICAL
    assert re.search(f"(train|validation): 2 {unit} dropped: 2 by {why}", lines.text), "equal prompts are on one side"
    assert train.documents + prepared.validation.documents == 60
    assert train.filled_frac > 0.9
    out = io.StringIO()
    console = Console(file=out, width=200, highlight=False)
    show_rows(console, config, prepared, 4)
    console.print(table(prepared))
    for words in SHOWN[objective]:
        assert words in out.getvalue(), out.getvalue()


def test_pairs_are_made_once_for_all_objectives_that_predict_them(tmp_path: Path, source: Path) -> None:
    """Not so for those of a reward model, and for another way to read or write them."""
    changes = {"data__source": str(source)}
    prepare(config_of("dpo", "plain", **changes), tmp_path / "data", log=Lines())
    for objective, more, made_again in (
        ("orpo", {}, False),
        ("simpo", {}, False),
        ("reward", {}, True),
        ("dpo", {}, True),
        ("dpo", {"chat__format": "prompt"}, True),
        ("dpo", {"data__text_field": "completion"}, True),
    ):
        lines = Lines()
        prepare(config_of(objective, "plain", **changes, **more), tmp_path / "data", log=lines)
        assert bool(lines) == made_again, (objective, more)


def test_pairs_of_mixed_lengths_fill_nine_tenths() -> None:
    """Of 1,000 pairs with lengths as those of HH-RLHF: log-normal, a few of them close to a row's."""
    rng = np.random.default_rng(0)
    lengths = np.clip(np.exp(rng.normal(3.2, 0.9, (1000, 3))).astype(int), 1, 150)
    documents = [judged("a" * p, "b" * c, "c" * r) for p, c, r in lengths.tolist()]
    batch, totals = packed(config_of(width=512), documents)
    assert totals.documents == 1000
    assert (batch["segments"] > 0).mean() > 0.98
