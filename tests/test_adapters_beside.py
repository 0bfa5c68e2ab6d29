"""Adapters beside a base, which may have one, too: alone, several in a conversation, with tokens, tokenizers and heads of their own."""

import json
import shutil
from pathlib import Path
from typing import Any, cast

import jax
import numpy as np
import pytest
from adapted_runs import ROOT, TRAINED, command, logits, train
from rich.console import Console
from safetensors.numpy import load_file

from jaxllm import adapters, conversation, convert, models, runs, start
from jaxllm import config as schema
from jaxllm.data import tokenize
from jaxllm.data.chat import templates
from jaxllm.data.tokenizers.chat_template import ChatTemplate
from jaxllm.decode.talk import Talk
from jaxllm.engine.workdir import Workdir
from jaxllm.interop import peft, peft_tokenizer
from jaxllm.ops import sampling


def test_one_base_and_several_adapters(adapted: Path) -> None:
    base = runs.load(adapted / "base")
    several = adapters.Adapters(base)
    for name in TRAINED:
        several.add(name, adapted / f"{name}_peft")
    assert several.names() == tuple(TRAINED)
    assert several.use(None) is base
    theirs = {id(array) for array in jax.tree.leaves(base.params)}
    for name in (*TRAINED, *TRAINED):
        run = several.use(name)
        assert run.model is base.model and run.workdir.path == adapted / f"{name}_peft"
        np.testing.assert_array_equal(logits(run), logits(runs.load(adapted / f"{name}_peft")))
        own = sum(array.size for array in jax.tree.leaves(run.params) if id(array) not in theirs)
        assert own == sum(np.prod(shape) for shape in peft.read(adapted / f"{name}_peft").shapes.values())
    with pytest.raises(ValueError, match=r"an adapter 'lora' is there already.\n  Accepted: a name other than lora, dora, pissa"):
        several.add("lora", adapted / "dora_peft")
    with pytest.raises(ValueError, match=r"no adapter 'lara'.\n  Accepted: lora, dora, pissa, or None"):
        several.use("lara")


@pytest.fixture(scope="module")
def chat(adapted: Path) -> Path:
    """A folder with: run, whose vocabulary grew for a chat template; files, its adapter; merged, both as one model."""
    config, base, chat = schema.base(), runs.load(adapted / "base"), adapted / "chat"
    config.chat.template = "chatml"
    template = templates.choose(config, base.tokenizer)
    tokenizer = tokenize.extend(base.tokenizer, templates.tokens(config), template, templates.end(config))
    train(adapted, "chat/run", base, tokenizer, rank=2)
    adapters.export(str(chat / "run"), chat / "files")
    assert convert.convert(chat / "files", chat / "merged", "hf", None, Console(quiet=True), checked=True) == 0
    return chat


def test_a_vocabulary_that_grew(adapted: Path, chat: Path, tmp_path: Path) -> None:
    """Its new rows, its tokenizer and its template are in the files, which are the run."""
    run = runs.load(chat / "run")
    before, after = runs.load(adapted / "base").config.model.vocab_size, run.config.model.vocab_size
    said = adapters.export(str(chat / "run"), tmp_path / "files")
    assert after == before + 2 and f"the vocabulary grew from {before} to {after}: in PEFT call base.resize_token_emb" in said
    tokens = np.array([[before, 5, before + 1, 7]])
    expected, stops = np.asarray(run.model.apply(run.params, tokens)), tokenize.stop_ids(run.tokenizer)
    assert expected.shape[-1] == after and len(stops) == 2
    for opened in (runs.load(chat / "files"), runs.load(chat / "merged")):
        np.testing.assert_allclose(opened.model.apply(opened.params, tokens), expected, atol=1e-4)
        theirs: Any = opened.tokenizer
        assert theirs.template.text == run.tokenizer.template.text and tokenize.stop_ids(theirs) == stops
        for text in ("The quick Größe, 日本語\n", ""):
            assert theirs.encode(text) == run.tokenizer.encode(text)
    asked = ("--chat", "--temperature=0", "--max_tokens=9", "--prompt=Who?")
    done = command("jaxllm.generate", f"--run={chat / 'files'}", *asked)
    assert done.returncode == 0 and done.stdout.strip(), done.stderr
    beside = command("jaxllm.generate", f"--run={adapted / 'base'}", f"--adapter=chat={chat / 'files'}", *asked)
    assert (beside.returncode, beside.stdout) == (0, done.stdout), beside.stderr
    # The run trained the new rows of two tables; the files have all rows.
    rows = {Path(row.path).name: row.parameters for row in adapters.find([chat]).rows}
    assert rows["files"] - rows["run"] == 2 * before * run.config.model.width


@pytest.fixture(scope="module")
def spoken(adapted: Path) -> Path:
    """The first run as one whose vocabulary grew, without adapters; its tokenizer has a template that needs no new tokens."""
    path = adapted / "chat" / "spoken"
    shutil.copytree(adapted / "first", path)
    values = json.loads((path / "config.json").read_text())
    values["model"]["start_rows"] = 250
    (path / "config.json").write_text(json.dumps(values))
    tokenizer = tokenize.load(path / "tokenizer")
    text = "{% for message in messages %}{{ message.role[0] }}:{{ message.content }}\n{% endfor %}a:"
    tokenize.extend(tokenizer, (), ChatTemplate(text, {})).save(str(path / "tokenizer"))
    return path


def test_new_tokens_and_none_beside_one_base_in_one_conversation(adapted: Path, chat: Path, spoken: Path, tmp_path: Path) -> None:
    """Each answers what it answers when it is opened alone, and they share the base's arrays, and models where these are alike."""
    base, paths = runs.load(spoken, for_decoding=True), {"plain": tmp_path, "chat": chat / "files"}
    for name in (peft.CONFIG, peft.TENSORS):
        shutil.copy(adapted / "lora_peft" / name, tmp_path)
    several = adapters.Adapters(base)
    for name, path in (*paths.items(), ("again", paths["chat"])):
        several.add(name, path)
    grown = several.use("chat")
    assert grown.model is several.use("again").model is not base.model
    assert several.use("plain").model is base.model and several.use("plain").tokenizer is base.tokenizer
    theirs = {id(array) for array in jax.tree.leaves(base.params)}
    own = sum(array.size for array in jax.tree.leaves(grown.params) if id(array) not in theirs)
    assert own == sum(np.prod(shape) for shape in peft.read(paths["chat"]).shapes.values())

    def talk(run: runs.Run) -> Talk:
        settings = sampling.Settings(temperature=0)
        return Talk(run.model, run.params, run.tokenizer, settings, system="", max_tokens=6, seed=0)

    alone = {name: talk(runs.load(path, base=spoken, for_decoding=True)) for name, path in paths.items()}
    alone[conversation.NONE] = talk(runs.load(spoken, for_decoding=True))
    together, choice, answers = talk(base), conversation.Choice(several, None), set()
    for name in (conversation.NONE, "chat", "plain", conversation.NONE, "chat"):
        alone[name].messages = together.messages
        "".join(alone[name].ask("Hi").pieces)
        conversation.converse(together, [f"/adapter {name}", "Hi"], choice)
        assert together.messages == alone[name].messages
        # Of what was said before it knows it all, as a switch leaves nothing that another one has read.
        answers.add(together.messages[-1]["content"])
    assert len(answers) > 2


def test_the_tokenizer_of_an_average(chat: Path, tmp_path: Path) -> None:
    one, other, mean = chat / "files", tmp_path / "other", tmp_path / "mean"
    adapters.average([str(one)] * 2, mean)
    assert (mean / "tokenizer.json").read_bytes() == (one / "tokenizer.json").read_bytes()
    np.testing.assert_allclose(logits(runs.load(mean)), logits(runs.load(one)), atol=1e-4)
    shutil.copytree(one, other)
    (other / "tokenizer.json").unlink()
    assert "note: they have different tokenizers, or not all" in adapters.average([str(one), str(other)], tmp_path / "none")
    assert not (tmp_path / "none" / "tokenizer.json").exists()


def test_the_tokenizer_beside_an_adapter(adapted: Path, chat: Path, tmp_path: Path) -> None:
    """It takes the place of the base's, but what ends a text still does; and it fits the embedding."""
    shutil.copytree(adapted / "lora_peft", tmp_path / "lora")
    shutil.copy(chat / "files" / "tokenizer.json", tmp_path / "lora")
    with pytest.raises(ValueError, match=r"its tokenizer has \d+ tokens, its embedding \d+ rows"):
        runs.load(tmp_path / "lora")
    base, opened = runs.load(chat / "merged"), runs.load(tmp_path / "lora", base=chat / "merged")
    assert base.tokenizer.template and not opened.tokenizer.template
    assert tokenize.stop_ids(opened.tokenizer) == tokenize.stop_ids(base.tokenizer)
    # A token of text does, too, where generation_config.json of the base alone says it.
    shutil.copytree(adapted / "base", tmp_path / "ends")
    (tmp_path / "ends" / "generation_config.json").write_text(json.dumps({"eos_token_id": [base.tokenizer.eos_id, 65, 97]}))
    shutil.copytree(adapted / "lora_peft", tmp_path / "text")
    shutil.copy(adapted / "base" / "tokenizer.json", tmp_path / "text")
    opened = runs.load(tmp_path / "text", base=tmp_path / "ends").tokenizer
    assert tokenize.stop_ids(opened) == (base.tokenizer.eos_id, 65, 97) and opened.encode("Aa") == [65, 97]
    # What is no token of its own, or another one, ends nothing.
    (tmp_path / "plain").mkdir()
    shutil.copy(adapted / "base" / "tokenizer.json", tmp_path / "plain")
    plain = runs.load(adapted / "base")
    alone = peft_tokenizer.choose(tmp_path / "plain", plain.config.copy_and_resolve_references(), base.tokenizer)
    assert len(tokenize.stop_ids(alone)) < len(tokenize.stop_ids(base.tokenizer))
    # It is written where the base has another one, and where transformers would miss its chat template.
    assert not peft_tokenizer.make(plain.tokenizer, plain.tokenizer, plain.model.config).files
    for same in (plain.tokenizer, base.tokenizer, None):
        assert peft_tokenizer.make(base.tokenizer, same, base.model.config).files


def test_an_adapter_with_a_head_of_its_own_beside_a_tied_base() -> None:
    """As PEFT has it, and the base stays tied."""
    golden = ROOT / "tests" / "golden"
    imported, none = runs.read_imported(golden / "gpt2"), cast("Any", None)
    model, params = models.build(imported.config), runs.weights.load(imported).params
    base = runs.Run(Workdir(golden / "gpt2"), imported.config, none, model, params, 0, (), imported)
    several = adapters.Adapters(base)
    for name in ("lora", "head"):
        several.add(name, golden / "peft" / f"gpt2_{name}")
        run, tokens = several.use(name), load_file(golden / "gpt2" / "expected.safetensors")["input/input_ids"]
        expected = load_file(golden / "peft" / f"gpt2_{name}" / "expected.safetensors")["logits"]
        np.testing.assert_allclose(run.model.apply(run.params, tokens)[0], expected[0], atol=2e-5)  # row 1 has padding
    assert several.use("lora").model is base.model is not several.use("head").model
    assert several.use("head").params["embed"]["tokens"] is base.params["embed"]["tokens"]
    assert "kernel" not in base.params.get("head", {})


def test_an_adapter_that_was_trained_on_another(adapted: Path, tmp_path: Path) -> None:
    """Names it as its base, and stands beside the merged weights. A base that is given has none."""
    shutil.copytree(adapted / "dora_peft", tmp_path / "dora")
    values = json.loads((tmp_path / "dora" / peft.CONFIG).read_text())
    assert convert.convert(adapted / "lora_peft", tmp_path / "merged", "hf", None, Console(quiet=True)) == 0
    expected = logits(runs.load(tmp_path / "dora", base=tmp_path / "merged"))
    assert np.abs(expected - logits(runs.load(tmp_path / "dora"))).max() > 0.1
    for other in ("lora_peft", "lora"):
        (tmp_path / "dora" / peft.CONFIG).write_text(json.dumps(values | {"base_model_name_or_path": str(adapted / other)}))
        np.testing.assert_allclose(logits(runs.load(tmp_path / "dora")), expected, atol=1e-4)
        with pytest.raises(ValueError, match=r"the base has an adapter already.\n  Accepted: a base without one"):
            runs.load(tmp_path / "dora", base=adapted / other)


@pytest.mark.parametrize("names", [("one", "two"), ("one", "two", "three"), ("out", "one", "two")])
def test_bases_that_go_in_a_circle(adapted: Path, tmp_path: Path, names: tuple[str, ...]) -> None:
    """Of all of them, or of those that one outside of it comes to. A model that is given ends it."""
    values = json.loads((adapted / "lora_peft" / peft.CONFIG).read_text())
    begin = 0 if names[0] == "one" else 1
    for name, base in zip(names, (*names[1:], names[begin]), strict=True):
        shutil.copytree(adapted / "lora_peft", tmp_path / name)
        (tmp_path / name / peft.CONFIG).write_text(json.dumps(values | {"base_model_name_or_path": base}))
    path = tmp_path / names[0]
    for opened in (runs.load, lambda path: start.open_start(str(path))):
        with pytest.raises(
            ValueError, match=rf"'{path}' is an adapter, and its base never comes: .* -> .*{names[begin]}\.\n"
        ) as error:
            opened(path)
        assert len(str(error.value).splitlines()) == 3
    np.testing.assert_array_equal(logits(runs.load(path, base=adapted / "base")), logits(runs.load(adapted / "lora_peft")))


def test_where_a_base_is_and_is_not(adapted: Path, tmp_path: Path) -> None:
    """From here, or from a directory that the adapter is in."""
    with pytest.raises(
        ValueError, match=r"is an adapter, and its base 'gone' is not a path here.\n  Accepted: the model .*\n  Give"
    ):
        runs.load(adapted / "lora_peft", base="gone")
    shutil.copytree(adapted / "base", tmp_path / "models" / "base")
    shutil.copytree(adapted / "lora_peft", tmp_path / "mine" / "lora")
    values = json.loads((adapted / "lora_peft" / peft.CONFIG).read_text())
    for named in ("models/base", "../models/base"):
        (tmp_path / "mine" / "lora" / peft.CONFIG).write_text(json.dumps(values | {"base_model_name_or_path": named}))
        np.testing.assert_array_equal(logits(runs.load(tmp_path / "mine" / "lora")), logits(runs.load(adapted / "lora_peft")))
    for named in ("models/gone", "lora"):  # the second one is its own name
        (tmp_path / "mine" / "lora" / peft.CONFIG).write_text(json.dumps(values | {"base_model_name_or_path": named}))
        words = rf"its base '{named}' is not a path here, nor beside it.\n  Accepted: the model .*\n  Give"
        with pytest.raises(ValueError, match=words):
            runs.load(tmp_path / "mine" / "lora")
    with pytest.raises(ValueError, match=r"--base x with '.*first', which is no adapter.\n  Accepted: "):
        runs.load(adapted / "first", base="x")
    with pytest.raises(ValueError, match=r"step 3 of '.*lora_peft', which is no run"):
        runs.load(adapted / "lora_peft", 3)
