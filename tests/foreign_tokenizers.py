"""Small tokenizers in the files of other tools, and what begins a text with each: found by asking transformers 5.24.

tests/parity/test_tokenizers.py asks it again.
"""

import io
import json
from collections.abc import Callable
from typing import Any, NamedTuple

import sentencepiece
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors

BOS, EOS, CHAT = "<s>", "</s>", "<|im_start|>"
SETTINGS = {"bos_token": BOS, "eos_token": EOS, "tokenizer_class": "PreTrainedTokenizerFast"}
Frame = Callable[[tokenizers.Tokenizer], Any]


class Case(NamedTuple):
    """files: of the directory. begins: the token in front of every text, if there is one. model_type: where a class depends on it."""

    files: dict[str, bytes]
    begins: str | None
    model_type: str = "llama"


def byte_level() -> tokenizers.Tokenizer:
    """Bytes, a word, and special tokens above them."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("t", "h"), ("th", "e"), ("c", "a"), ("ca", "t"), ("\u0120", "cat")]
    pieces = [*letters, *("".join(merge) for merge in merges)]
    made = tokenizers.Tokenizer(models.BPE({piece: index for index, piece in enumerate(pieces)}, merges))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made.add_special_tokens([BOS, EOS, CHAT])
    return made


def template(before: str = "", after: str = "") -> Frame:
    def frame(made: tokenizers.Tokenizer) -> Any:
        special = [(token, made.token_to_id(token)) for token in (BOS, EOS)]
        single = f"{before} $A {after}".strip()
        return processors.TemplateProcessing(single=single, pair=f"{single} $B:1 {after}".strip(), special_tokens=special)

    return frame


def roberta(made: tokenizers.Tokenizer) -> Any:
    return processors.RobertaProcessing((EOS, made.token_to_id(EOS)), (BOS, made.token_to_id(BOS)))


def after_bytes(made: tokenizers.Tokenizer) -> Any:
    """As Llama 3 has it."""
    return processors.Sequence([processors.ByteLevel(trim_offsets=False), template(BOS)(made)])


def tokenizer_json(frame: Frame | None = None, **settings: Any) -> dict[str, bytes]:
    made = byte_level()
    if frame is not None:
        made.post_processor = frame(made)
    return {"tokenizer.json": made.to_str().encode(), "tokenizer_config.json": json.dumps(SETTINGS | settings).encode()}


def gpt2(**settings: Any) -> dict[str, bytes]:
    definition = json.loads(byte_level().to_str())["model"]
    vocabulary = definition["vocab"] | {"<|endoftext|>": len(definition["vocab"])}
    merges = "#version: 0.2\n" + "".join(f"{' '.join(merge)}\n" for merge in definition["merges"])
    settings = {"tokenizer_class": "GPT2Tokenizer"} | settings
    files = {"vocab.json": json.dumps(vocabulary), "merges.txt": merges, "tokenizer_config.json": json.dumps(settings)}
    return {name: text.encode() for name, text in files.items()}


def bert() -> dict[str, bytes]:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "cat", "##s"]
    return {"vocab.txt": "\n".join(words).encode(), "tokenizer_config.json": b'{"tokenizer_class": "BertTokenizer"}'}


def pieces(name: str, settings: dict[str, Any], **options: Any) -> dict[str, bytes]:
    model = io.BytesIO()
    lines = ["the cat sat on the mat", "the dog and the cat"] * 20
    shape = {"vocab_size": 300, "hard_vocab_limit": False, "minloglevel": 2}
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(lines), model_writer=model, **shape, **options)
    return {name: model.getvalue(), "tokenizer_config.json": json.dumps(settings).encode()}


def llama2(**settings: Any) -> dict[str, bytes]:
    names = {"tokenizer_class": "LlamaTokenizer", "bos_token": BOS, "eos_token": EOS, "unk_token": "<unk>"}
    plain = {"byte_fallback": True, "normalization_rule_name": "identity", "remove_extra_whitespaces": False}
    return pieces("tokenizer.model", names | settings, model_type="bpe", **plain)


def t5() -> dict[str, bytes]:
    settings = {"tokenizer_class": "T5Tokenizer", "eos_token": EOS, "extra_ids": 2}
    return pieces("spiece.model", settings, pad_id=0, eos_id=1, unk_id=2, bos_id=-1)


# Of a tokenizer.json the post-processor decides, whatever add_bos_token says.
CASES = {
    "nothing": Case(tokenizer_json(), None),
    "nothing, class of GPT-2": Case(tokenizer_json(tokenizer_class="GPT2Tokenizer", bos_token=CHAT), None, "gpt2"),
    "nothing, class of Qwen2": Case(tokenizer_json(tokenizer_class="Qwen2Tokenizer"), None, "qwen2"),
    "nothing, add_bos_token": Case(tokenizer_json(add_bos_token=True), None),
    "nothing, add_bos_token is false": Case(tokenizer_json(add_bos_token=False), None),
    "template": Case(tokenizer_json(template(BOS)), BOS),
    "template, add_bos_token": Case(tokenizer_json(template(BOS), add_bos_token=True), BOS),
    "template, add_bos_token is false": Case(tokenizer_json(template(BOS), add_bos_token=False), BOS),
    "template with another token": Case(tokenizer_json(template(BOS), bos_token=CHAT), BOS),
    "template of eos": Case(tokenizer_json(template(after=EOS)), None),
    "template of both": Case(tokenizer_json(template(BOS, EOS)), BOS),
    "byte-level": Case(tokenizer_json(lambda made: processors.ByteLevel(trim_offsets=False)), None),
    "byte-level, add_bos_token": Case(tokenizer_json(lambda made: processors.ByteLevel(), add_bos_token=True), None),
    "byte-level and template": Case(tokenizer_json(after_bytes), BOS),
    "RoBERTa": Case(tokenizer_json(roberta), BOS),
    "GPT-2": Case(gpt2(), None, "gpt2"),
    "GPT-2, add_bos_token": Case(gpt2(add_bos_token=True), "<|endoftext|>", "gpt2"),
    "BERT": Case(bert(), "[CLS]", "bert"),
    "Llama 2, add_bos_token": Case(llama2(add_bos_token=True), BOS),
    "Llama 2, add_bos_token is false": Case(llama2(add_bos_token=False), None),
    # Here transformers 5 puts none, where transformers 4, llama.cpp and the models' own code put bos.
    "Llama 2": Case(llama2(), BOS),
    "T5": Case(t5(), None, "t5"),
}
