"""Loads a tokenizer that was made before: a run's, or one of the files that models are published with (see NAMES)."""

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import logging
from ml_collections import ConfigDict

from jaxllm.data import tokenize
from jaxllm.data.tokenizers import chat_template, files, huggingface, sentencepiece, vocabulary
from jaxllm.data.tokenizers.added import NONE, Added

if TYPE_CHECKING:
    from jaxllm.types import Tokenizer

SETTINGS, OLDER_SETTINGS = "tokenizer_config.json", "special_tokens_map.json"
# T5's, whose sentinels are added above its pieces; so many where the settings do not say it.
T5_FILE, T5_SENTINELS = "spiece.model", 100
# In a folder, the first of these that is there: a run's, Hugging Face tokenizers, SentencePiece, GPT-2 (with merges.txt), BERT.
NAMES = (files.RECORD, "tokenizer.json", "tokenizer.model", T5_FILE, vocabulary.BYTE_LEVEL, vocabulary.WORDS)
# What common models call their special tokens; asked only where neither the settings nor the model says it.
CUSTOMARY = {
    "bos": ("<s>", "<|begin_of_text|>", "<bos>", "[CLS]", "<|endoftext|>"),
    "eos": ("</s>", "<|end_of_text|>", "<eos>", "[SEP]", "<|endoftext|>"),
    "pad": ("<pad>", "[PAD]", "<|pad|>", "<|finetune_right_pad_id|>"),
    "mask": ("[MASK]", "<mask>"),
}


def load(config: ConfigDict, texts: Callable[[], Iterable[str]], extra: Added = NONE) -> "Tokenizer":
    """The tokenizer at `tokenizer.path`: a file, or the folder that holds it. The texts are not read, and nothing is added.

    bos is what begins every text, if anything does. A tokenizer.json says it in its post-processor, and in transformers that alone
    counts: a `bos_token` may be one that only a chat template uses. Of other files it is the bos token unless `add_bos_token` is false.

    eos, pad and mask are those of `tokenizer_config.json` beside the file; what that leaves open is taken from the model, or found by
    its customary name. Sentinels are called <extra_id_0>, <extra_id_1>, ... Without a pad token the pad id is 0: padding is known by
    its segment and weight, never by its id. What ends a text besides eos is taken from `generation_config.json`, or where that names
    nothing from `config.json`.
    """
    del texts, extra
    path = _find(Path(config.tokenizer.path).expanduser())
    if path.with_name(files.RECORD).is_file() and path.name in (files.RECORD, *files.read(path.parent).files):
        return tokenize.load(path.parent)
    settings = _settings(path.parent)
    if path.name == T5_FILE:
        settings = {"extra_ids": T5_SENTINELS, **settings}
    template, stop_ids = chat_template.find(path.parent, settings), _stop_ids(path.parent)
    try:
        older = path.name in (vocabulary.BYTE_LEVEL, vocabulary.WORDS)
        data = vocabulary.definition(path, settings) if older else path.read_bytes()
        tokenizer = (_sentencepiece if path.suffix == ".model" else _huggingface)(data, settings, template, stop_ids)
    except files.NotATokenizer as error:
        raise ValueError(
            f"tokenizer.path = '{path}' is not a tokenizer: {error}\n"
            f"  Accepted: what {', '.join(NAMES[1:])} hold where models are published.\n"
            "  Fetch it again (a Git LFS pointer is a small text file), or correct the path."
        ) from error
    specials = {name: getattr(tokenizer, f"{name}_id") for name in CUSTOMARY}
    logging.info("%s: %d tokens, special ones: %s", path, tokenizer.vocab_size, specials)
    return tokenizer


def has_one(directory: Path) -> bool:
    """Whether `load` finds a tokenizer in the folder."""
    return any((directory / name).is_file() for name in NAMES)


def _find(path: Path) -> Path:
    if path.is_file() and (path.suffix in (".model", ".json") or path.name in NAMES):
        return path
    for name in NAMES:
        if path.is_dir() and (path / name).is_file():
            return path / name
    what = "has none of these files" if path.is_dir() else "is no such file" if path.is_file() else "does not exist"
    raise ValueError(
        f"tokenizer.path = '{path}' {what}.\n  Accepted: {', '.join(NAMES[1:])}, or a folder with one of them, such as"
        " RUN/tokenizer.\n  Set tokenizer.path."
    )


def _sentencepiece(
    data: bytes, settings: dict[str, Any], template: chat_template.ChatTemplate | None, stop_ids: Sequence[int]
) -> "Tokenizer":
    processor = sentencepiece.processor(data)

    def find(piece: str) -> int | None:
        index = processor.piece_to_id(piece)
        return index if processor.id_to_piece(index) == piece else None

    sentinels = int(settings.get("extra_ids", 0))
    lost = {index: token for index, token in _added(settings).items() if find(token) is None and not token.startswith("<extra_id_")}
    # Directly above the model's own pieces they can be had as they are.
    above = not sentinels and sorted(lost) == list(range(processor.vocab_size(), processor.vocab_size() + len(lost)))
    if lost and not above:
        names = list(lost.values())
        logging.warning("the SentencePiece model lacks %s, which were added to it: text here; a tokenizer.json has them", names)
    own = {name: _customary(name, find) for name in CUSTOMARY}
    given = {"bos": processor.bos_id(), "eos": processor.eos_id(), "pad": processor.pad_id()}
    own.update({name: index for name, index in given.items() if index >= 0})
    ids = {name: _special(name, settings, find, own[name]) for name in CUSTOMARY}
    if settings.get("add_bos_token") is False:
        ids["bos"] = None
    # The model file of T5 has no sentinels: they were added above it, as many as its settings say.
    extra = Added(sentinels=sentinels, tokens=tuple(lost[index] for index in sorted(lost)) if above else ())
    bos, eos, pad, mask = ids["bos"], ids["eos"], ids["pad"] or 0, ids["mask"]
    others = tuple(index for index in stop_ids if index != eos and index < processor.vocab_size() + len(extra.tokens))
    return sentencepiece.SentencePieceTokenizer(
        data, bos_id=bos, eos_id=eos, pad_id=pad, mask_id=mask, exact=False, extra=extra, other_stop_ids=others, template=template
    )


def _huggingface(
    data: bytes, settings: dict[str, Any], template: chat_template.ChatTemplate | None, stop_ids: Sequence[int]
) -> "Tokenizer":
    library = huggingface.parse(data)
    find = library.token_to_id
    ids = {name: _special(name, settings, find, _customary(name, find)) for name in ("eos", "pad", "mask")}
    sentinels: list[int] = []
    while (index := find(f"<extra_id_{len(sentinels)}>")) is not None:
        sentinels.append(index)
    eos, pad, mask = ids["eos"], ids["pad"] or 0, ids["mask"]
    others = tuple(index for index in stop_ids if index != eos and library.id_to_token(index) is not None)
    return huggingface.HuggingFaceTokenizer(
        data,
        bos_id=_bos(library),
        eos_id=eos,
        pad_id=pad,
        mask_id=mask,
        sentinel_ids=tuple(sentinels),
        other_stop_ids=others,
        template=template,
    )


def _bos(library: Any) -> int | None:
    before = huggingface.begins(library)
    if len(before) > 1:
        tokens = " ".join(map(library.id_to_token, before))
        raise ValueError(
            f"the tokenizer begins a text with {len(before)} special tokens, {tokens}.\n  Accepted: none or one.\n"
            "  Take another model: the architectures known here have no such tokenizer."
        )
    return before[0] if before else None


def _customary(name: str, find: Callable[[str], int | None]) -> int | None:
    """The id of a special token that has one of its customary names."""
    return next((find(token) for token in CUSTOMARY[name] if find(token) is not None), None)


def _settings(directory: Path) -> dict[str, Any]:
    """tokenizer_config.json, if there is one. Without added tokens in it older files count, as in transformers."""
    settings = _read(directory / SETTINGS)
    if "added_tokens_decoder" in settings:
        return settings
    added = {index: {"content": token} for token, index in _read(directory / vocabulary.ADDED).items()}
    return settings | _read(directory / OLDER_SETTINGS) | {"added_tokens_decoder": added}


def _stop_ids(directory: Path) -> list[int]:
    """What the model's files say ends a text, each id once, in their order."""
    said = (_read(directory / name).get("eos_token_id") for name in ("generation_config.json", "config.json"))
    given: Any = next((ids for ids in said if ids is not None), [])
    ids = given if isinstance(given, list) else [given]
    return [index for index in dict.fromkeys(ids) if type(index) is int and index >= 0]


def _added(settings: dict[str, Any]) -> dict[int, str]:
    return {int(index): token["content"] for index, token in settings["added_tokens_decoder"].items()}


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        return dict(json.loads(path.read_bytes()))
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"'{path}' is no JSON object: {error}\n  Accepted: the {path.name} of the model.\n  Fetch it again, or remove it."
        ) from error


def _special(name: str, settings: dict[str, Any], find: Callable[[str], int | None], own: int | None) -> int | None:
    """The id of a special token: as the settings say (null: none), else the tokenizer's own."""
    token = settings.get(f"{name}_token", ...)
    if token is ...:
        return own
    token = token.get("content") if isinstance(token, dict) else token
    index = None if token is None else find(token)
    if token is not None and index is None:
        logging.warning("%s: the %s_token %r is not in the vocabulary; it is not used.", SETTINGS, name, token)
    return index
