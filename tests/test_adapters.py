"""`python -m jaxllm.adapters` and `Adapters`: runs that trained adapters, their files, and what generate makes of both."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import jax
import numpy as np
import pytest
from random_run import write_run
from rich.console import Console
from safetensors.numpy import load_file

from jaxllm import adapters, conversation, convert, models, runs
from jaxllm import config as schema
from jaxllm.data import tokenize
from jaxllm.data.chat import templates
from jaxllm.data.tokenizers.chat_template import ChatTemplate
from jaxllm.decode.talk import Talk
from jaxllm.engine import state
from jaxllm.engine.checkpoint import Checkpoints
from jaxllm.engine.workdir import Workdir
from jaxllm.interop import peft, peft_tokenizer
from jaxllm.ops import sampling
from jaxllm.transforms import adapt, tree

ROOT = Path(__file__).resolve().parent.parent
TOKENS_BT = np.random.default_rng(0).integers(0, 200, (2, 9))
TRAINED = {
    "lora": {"rank": 4, "targets": ".*(q|v)/kernel"},
    "dora": {"rank": 2, "rslora": True, "also": "norm/scale"},
    "pissa": {"rank": 3, "init": "pissa", "targets": ".*mlp/.*/kernel"},
}


def train(folder: Path, name: str, base: runs.Run, tokenizer: Any = None, **settings: Any) -> None:
    """A run as one that began with the base: its adapter has moved, and the rest is as it was. tokenizer: one with new tokens."""
    config = schema.load(folder / "first" / "config.json").copy_and_resolve_references()
    config.train.transforms = ("dora" if name == "dora" else "lora",)
    config.train.start = str(folder / "base")
    config.model.layers_as = "scan" if name == "pissa" else "unrolled"
    config.lora.update(settings)
    config.model.start_rows = base.config.model.vocab_size
    (folder / name).mkdir(parents=True)
    (folder / name / "config.json").write_text(schema.to_json(config))
    tokenizer = tokenizer or tokenize.load(folder / "first" / "tokenizer")
    tokenizer.save(str(folder / name / "tokenizer"))
    config.model.vocab_size = tokenizer.vocab_size
    model = models.build(config)
    stacked = tree.stack_layers(base.params) if name == "pissa" else base.params
    more = [(0, config.model.vocab_size - config.model.start_rows), (0, 0)]
    stacked = {
        **stacked,
        **{part: jax.tree.map(lambda table: jax.numpy.pad(table, more), stacked[part]) for part in ("embed", "head")},
    }
    dense = config.copy_and_resolve_references()
    dense.train.transforms = ()
    params = adapt.Adaptation(models.build(dense).axes, model.config.transforms).params(stacked, jax.random.key(0))
    moved, rng = state.trainable(config, model.axes), np.random.default_rng(1)
    params = jax.tree.map_with_path(
        lambda path, array: (
            array + 0.1 * rng.normal(size=array.shape).astype("float32") if tree.path_name(path) in moved else array
        ),
        params,
    )
    checkpoints = Checkpoints(folder / name / "checkpoints")
    checkpoints.save(5, {"params": params})
    checkpoints.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """first, a run; base, the same for transformers; lora, dora and pissa, which began with it; NAME_peft, their files."""
    folder = tmp_path_factory.mktemp("adapters")
    write_run(folder / "first", model__kv_heads=4)
    convert.convert(folder / "first", folder / "base", "hf", None, Console(quiet=True))
    base = runs.load(folder / "base")
    for name, settings in TRAINED.items():
        train(folder, name, base, **settings)
        adapters.export(str(folder / name), folder / f"{name}_peft")
    return folder


def logits(run: runs.Run) -> np.ndarray:
    return np.asarray(run.model.apply(run.params, TOKENS_BT))


def command(*flags: str) -> "subprocess.CompletedProcess[str]":
    environment = {**os.environ, "COLUMNS": "200"}
    return subprocess.run(
        [sys.executable, "-m", *flags], cwd=ROOT, env=environment, capture_output=True, text=True, check=False, errors="replace"
    )


@pytest.mark.parametrize("name", TRAINED)
def test_a_run_and_its_files_are_one_model(folder: Path, name: str) -> None:
    run, opened = runs.load(folder / name), runs.load(folder / f"{name}_peft")
    np.testing.assert_allclose(logits(opened), logits(run), atol=1e-4)
    assert np.abs(logits(run) - logits(runs.load(folder / "base"))).max() > 0.1
    assert opened.config.lora.rank == run.config.lora.rank * (2 if name == "pissa" else 1)
    assert opened.config.train.transforms == run.config.train.transforms
    assert opened.workdir.path == folder / f"{name}_peft"
    elsewhere = runs.load(folder / f"{name}_peft", base=folder / "first")
    np.testing.assert_allclose(logits(elsewhere), logits(opened), atol=1e-4)


def test_one_base_and_several_adapters(folder: Path) -> None:
    base = runs.load(folder / "base")
    several = adapters.Adapters(base)
    for name in TRAINED:
        several.add(name, folder / f"{name}_peft")
    assert several.names() == tuple(TRAINED)
    assert several.use(None) is base
    theirs = {id(array) for array in jax.tree.leaves(base.params)}
    for name in (*TRAINED, *TRAINED):
        run = several.use(name)
        assert run.model is base.model and run.workdir.path == folder / f"{name}_peft"
        np.testing.assert_array_equal(logits(run), logits(runs.load(folder / f"{name}_peft")))
        own = sum(array.size for array in jax.tree.leaves(run.params) if id(array) not in theirs)
        assert own == sum(np.prod(shape) for shape in peft.read(folder / f"{name}_peft").shapes.values())
    with pytest.raises(ValueError, match=r"an adapter 'lora' is there already.\n  Accepted: a name other than lora, dora, pissa"):
        several.add("lora", folder / "dora_peft")
    with pytest.raises(ValueError, match=r"no adapter 'lara'.\n  Accepted: lora, dora, pissa, or None"):
        several.use("lara")


@pytest.fixture(scope="module")
def chat(folder: Path) -> Path:
    """A folder with: run, whose vocabulary grew for a chat template; files, its adapter; merged, both as one model."""
    config, base, chat = schema.base(), runs.load(folder / "base"), folder / "chat"
    config.chat.template = "chatml"
    template = templates.choose(config, base.tokenizer)
    tokenizer = tokenize.extend(base.tokenizer, templates.tokens(config), template, templates.end(config))
    train(folder, "chat/run", base, tokenizer, rank=2)
    adapters.export(str(chat / "run"), chat / "files")
    assert convert.convert(chat / "files", chat / "merged", "hf", None, Console(quiet=True), checked=True) == 0
    return chat


def test_a_vocabulary_that_grew(folder: Path, chat: Path, tmp_path: Path) -> None:
    """Its new rows, its tokenizer and its template are in the files, which are the run."""
    run = runs.load(chat / "run")
    before, after = runs.load(folder / "base").config.model.vocab_size, run.config.model.vocab_size
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
    beside = command("jaxllm.generate", f"--run={folder / 'base'}", f"--adapter=chat={chat / 'files'}", *asked)
    assert (beside.returncode, beside.stdout) == (0, done.stdout), beside.stderr
    # The run trained the new rows of two tables; the files have all rows.
    rows = {Path(row.path).name: row.parameters for row in adapters.find([chat]).rows}
    assert rows["files"] - rows["run"] == 2 * before * run.config.model.width


@pytest.fixture(scope="module")
def spoken(folder: Path) -> Path:
    """The first run as one whose vocabulary grew, without adapters; its tokenizer has a template that needs no new tokens."""
    path = folder / "chat" / "spoken"
    shutil.copytree(folder / "first", path)
    values = json.loads((path / "config.json").read_text())
    values["model"]["start_rows"] = 250
    (path / "config.json").write_text(json.dumps(values))
    tokenizer = tokenize.load(path / "tokenizer")
    text = "{% for message in messages %}{{ message.role[0] }}:{{ message.content }}\n{% endfor %}a:"
    tokenize.extend(tokenizer, (), ChatTemplate(text, {})).save(str(path / "tokenizer"))
    return path


def test_new_tokens_and_none_beside_one_base_in_one_conversation(folder: Path, chat: Path, spoken: Path, tmp_path: Path) -> None:
    """Each answers what it answers when it is opened alone, and they share the base's arrays, and models where these are alike."""
    base, paths = runs.load(spoken, for_decoding=True), {"plain": tmp_path, "chat": chat / "files"}
    for name in (peft.CONFIG, peft.TENSORS):
        shutil.copy(folder / "lora_peft" / name, tmp_path)
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


def test_each_weight_is_that_of_its_adapter(folder: Path, tmp_path: Path) -> None:
    """In the order in which both are given: with 1 and 0 the first one is left."""
    one, other = (str(folder / f"{name}_peft") for name in ("lora", "pissa"))
    for paths in ((one, other), (other, one)):
        target = tmp_path / Path(paths[0]).name
        adapters.average(paths, target, ["1", "0"])
        np.testing.assert_allclose(logits(runs.load(target)), logits(runs.load(paths[0])), atol=1e-4)
    assert np.abs(logits(runs.load(one)) - logits(runs.load(other))).max() > 1e-2


def test_the_tokenizer_beside_an_adapter(folder: Path, chat: Path, tmp_path: Path) -> None:
    """It takes the place of the base's, but what ends a text still does; and it fits the embedding."""
    shutil.copytree(folder / "lora_peft", tmp_path / "lora")
    shutil.copy(chat / "files" / "tokenizer.json", tmp_path / "lora")
    with pytest.raises(ValueError, match=r"its tokenizer has \d+ tokens, its embedding \d+ rows"):
        runs.load(tmp_path / "lora")
    base, opened = runs.load(chat / "merged"), runs.load(tmp_path / "lora", base=chat / "merged")
    assert base.tokenizer.template and not opened.tokenizer.template
    assert tokenize.stop_ids(opened.tokenizer) == tokenize.stop_ids(base.tokenizer)
    # What is no token of its own, or another one, ends nothing.
    (tmp_path / "plain").mkdir()
    shutil.copy(folder / "base" / "tokenizer.json", tmp_path / "plain")
    plain = runs.load(folder / "base")
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


def test_list(folder: Path) -> None:
    done = command("jaxllm.adapters", "list", str(folder), str(ROOT / "tests" / "golden" / "peft" / "llama_rslora"))
    assert done.returncode == 0, done.stderr
    rows = {Path(row.path).name: row for row in adapters.find([folder]).rows}
    assert rows.keys() == {*TRAINED, *(f"{name}_peft" for name in TRAINED)}
    assert rows["dora_peft"][2:5] == ("dora, rslora", "2", "32") and rows["dora"][2:5] == ("dora, rslora", "2", "32")
    assert rows["pissa"].kind == "lora, pissa" and rows["pissa_peft"].rank == "6"
    for name in ("lora", "dora"):
        assert rows[name].parameters == rows[f"{name}_peft"].parameters
        assert rows[name].base == rows[f"{name}_peft"].base == str(folder / "base")
    for words in ("dora, rslora, rank 2, alpha 32", "of q_proj, v_proj", f" {rows['lora'].parameters:,} "):
        assert words in done.stdout
    with pytest.raises(ValueError, match=r"is no adapter, and has none in it.\n  Accepted: a run whose train.transforms"):
        adapters.find([folder / "base"])


def test_list_goes_past_what_cannot_be_read(folder: Path, tmp_path: Path) -> None:
    """And says why below the table. Where nothing can be read that is the error, in full where it is one thing."""
    for name in ("lora_peft", "dora_peft", "lora"):
        shutil.copytree(folder / name, tmp_path / name)
    (tmp_path / "dora_peft" / peft.TENSORS).write_bytes(b"cut")
    shutil.rmtree(tmp_path / "lora" / "tokenizer")
    (tmp_path / "hurt").mkdir()
    (tmp_path / "hurt" / "config.json").write_text("{")
    done = command("jaxllm.adapters", "list", str(tmp_path), str(folder / "first"), str(tmp_path / "gone"))
    assert done.returncode == 0, done.stderr
    table, *below = done.stdout.partition("MB: of these in float32\n")
    assert "lora_peft" in table and "dora_peft" not in table
    reasons = "".join(below).splitlines()[1:]
    assert [line.startswith("not listed: ") for line in reasons] == [True] * 5
    for name, line in zip(("dora_peft", "hurt", "lora", "first", "gone"), reasons, strict=True):
        assert name in line, line
    assert reasons[3].endswith("is no adapter, and has none in it.") and reasons[4].endswith("does not exist.")
    shutil.rmtree(tmp_path / "lora_peft")
    done = command("jaxllm.adapters", "list", str(tmp_path))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: there is no adapter that can be read:\n    ") and done.stderr.count("\n    ") == 3
    assert "\n  Accepted: a run whose train.transforms has lora or dora" in done.stderr
    done = command("jaxllm.adapters", "list", str(tmp_path / "dora_peft"))
    assert done.returncode == 2 and done.stderr.startswith(f"error: '{tmp_path / 'dora_peft' / peft.TENSORS}'"), done.stderr


def test_export_average_and_generate(folder: Path, tmp_path: Path) -> None:
    done = command("jaxllm.adapters", "export", "--run", str(folder / "lora"), "--to", str(tmp_path / "one"), "--base=moved")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "one" / peft.CONFIG).read_text())["base_model_name_or_path"] == "moved"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one"]
    both = ("--from", str(folder / "lora_peft"), "--from", str(folder / "pissa_peft"))
    done = command("jaxllm.adapters", "average", *both, "--to", str(tmp_path / "mean"), "--weights=0.5,0.25", "--rank=3")
    assert done.returncode == 0, done.stderr
    assert "relative error (Frobenius)" in done.stdout and "0.25 * " in done.stdout
    assert {product.rank for product in peft.read(tmp_path / "mean").products.values()} == {3}
    prompt = ("--prompt=The quick", "--max_tokens=8", "--temperature=0")
    texts = [
        command("jaxllm.generate", f"--run={path}", *flags, *prompt).stdout
        for path, flags in ((folder / "lora", ()), (tmp_path / "one", (f"--base={folder / 'base'}",)))
    ]
    assert texts[0] == texts[1] != ""


def test_an_average_without_an_error_and_one_of_a_run(folder: Path, tmp_path: Path) -> None:
    """Two of rank 4 that are one are of rank 4, exactly; of rank 3 they are not. A run is exported first, as the error says."""
    one = str(folder / "lora_peft")
    assert "of the products: exact up to rounding" in adapters.average([one, one], tmp_path / "exact", rank=4)
    said = adapters.average([one, one], tmp_path / "thin", rank=3)
    assert "exact" not in said and re.search(r"of the products: \d\.\d\de-0\d of all", said)
    shutil.copytree(folder / "lora", tmp_path / "lora")
    with pytest.raises(
        ValueError, match=r"lora/' is a run, and what .* of PEFT.\n  Accepted: directories with ad.*\n  Export"
    ) as error:
        adapters.average([str(tmp_path / "lora") + "/", one], tmp_path / "mean")
    done = command(*re.findall(r"\(python -m (.*)\)", str(error.value))[0].split())
    assert done.returncode == 0, done.stderr
    adapters.average([f"{tmp_path / 'lora'}_peft", one], tmp_path / "mean")
    np.testing.assert_allclose(logits(runs.load(tmp_path / "mean")), logits(runs.load(one)), atol=1e-3)
    with pytest.raises(ValueError, match=rf"has no {peft.CONFIG}.\n  Accepted: "):
        adapters.average([str(folder / "first"), one], tmp_path / "other")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("lsit", "x"), "unexpected argument 'lsit'.\n  Accepted: list PATH ..., train, export, average"),
        ((), "no action is given.\n  Accepted: list PATH ..., train, export, average"),
        (("list",), "no path is given.\n  Accepted: list PATH ..."),
        (("export", "--run=x"), "--to is not given.\n  Accepted: a directory that does not exist"),
        (("export", "--run=x", "--to=jaxllm"), "--to jaxllm is there already"),
    ],
)
def test_misuse(flags: tuple[str, ...], words: str) -> None:
    done = command("jaxllm.adapters", *flags)
    assert done.returncode == 2 and words in done.stderr, done.stderr


def test_pissa_whose_rest_was_quantized_is_refused_before_its_base_is_asked_for(tmp_path: Path) -> None:
    fields = {"model__name": "llama", "train__transforms": ("lora", "int8"), "lora__init": "pissa", "lora__rank": 2}
    run = write_run(tmp_path / "run", train__start="gone", **fields)
    words = r"quantized what that left of layers/attention/k/kernel, .*\n  Accepted: runs of PiSSA.*\n  Write the merged"
    for base in ("", str(tmp_path / "nowhere")):
        with pytest.raises(ValueError, match=words):
            adapters.export(str(run), tmp_path / "out", base=base)
    # Where other kernels are quantized than those with adapters, it is the base that is missing.
    run = write_run(
        tmp_path / "apart", train__start="gone", **fields, lora__targets=".*mlp/.*/kernel", quant__targets=".*attention/.*/kernel"
    )
    with pytest.raises(ValueError, match="its base 'gone' is not here"):
        adapters.export(str(run), tmp_path / "out")


def test_an_adapter_that_was_trained_on_another(folder: Path, tmp_path: Path) -> None:
    """Names it as its base, and stands beside the merged weights. A base that is given has none."""
    shutil.copytree(folder / "dora_peft", tmp_path / "dora")
    values = json.loads((tmp_path / "dora" / peft.CONFIG).read_text())
    assert convert.convert(folder / "lora_peft", tmp_path / "merged", "hf", None, Console(quiet=True)) == 0
    expected = logits(runs.load(tmp_path / "dora", base=tmp_path / "merged"))
    assert np.abs(expected - logits(runs.load(tmp_path / "dora"))).max() > 0.1
    for other in ("lora_peft", "lora"):
        (tmp_path / "dora" / peft.CONFIG).write_text(json.dumps(values | {"base_model_name_or_path": str(folder / other)}))
        np.testing.assert_allclose(logits(runs.load(tmp_path / "dora")), expected, atol=1e-4)
        with pytest.raises(ValueError, match=r"the base has an adapter already.\n  Accepted: a base without one"):
            runs.load(tmp_path / "dora", base=folder / other)


def test_what_is_not_exported(folder: Path) -> None:
    target = folder / "x"
    for name, words in (("first", r"'.*first' trained no adapter"), ("base", r"'.*base' is no run"), ("lora_peft", "is no run")):
        with pytest.raises(ValueError, match=rf"{words}.\n  Accepted: a run whose train.transforms"):
            adapters.export(str(folder / name), target)
    with pytest.raises(
        ValueError, match=r"took a part of each kernel away, and its base 'gone' is not here.\n  Accepted: the model"
    ):
        adapters.export(str(folder / "pissa"), target, base="gone")
    shutil.copytree(folder / "lora", folder / "all")
    values = json.loads((folder / "all" / "config.json").read_text())
    values["train"]["trainable"] = ".*"
    (folder / "all" / "config.json").write_text(json.dumps(values))
    with pytest.raises(
        ValueError, match=r"trained layers/attention/q/kernel/base, .*, which have adapters beside them.\n  Accepted"
    ):
        adapters.export(str(folder / "all"), target)
    shutil.rmtree(folder / "all")
    with pytest.raises(ValueError, match=r"1 adapters to average.\n  Accepted: two or more"):
        adapters.average([str(folder / "lora_peft")], target)
    with pytest.raises(ValueError, match=r"--weights 1,b for 2 adapters.\n  Accepted: 2 numbers"):
        adapters.average([str(folder / "lora_peft")] * 2, target, ["1", "b"])
    assert not target.exists()


def test_where_a_base_is_and_is_not(folder: Path, tmp_path: Path) -> None:
    """From here, or from a directory that the adapter is in."""
    with pytest.raises(
        ValueError, match=r"is an adapter, and its base 'gone' is not a path here.\n  Accepted: the model .*\n  Give"
    ):
        runs.load(folder / "lora_peft", base="gone")
    shutil.copytree(folder / "base", tmp_path / "models" / "base")
    shutil.copytree(folder / "lora_peft", tmp_path / "mine" / "lora")
    values = json.loads((folder / "lora_peft" / peft.CONFIG).read_text())
    for named in ("models/base", "../models/base"):
        (tmp_path / "mine" / "lora" / peft.CONFIG).write_text(json.dumps(values | {"base_model_name_or_path": named}))
        np.testing.assert_array_equal(logits(runs.load(tmp_path / "mine" / "lora")), logits(runs.load(folder / "lora_peft")))
    for named in ("models/gone", "lora"):  # the second one is its own name
        (tmp_path / "mine" / "lora" / peft.CONFIG).write_text(json.dumps(values | {"base_model_name_or_path": named}))
        words = rf"its base '{named}' is not a path here, nor beside it.\n  Accepted: the model .*\n  Give"
        with pytest.raises(ValueError, match=words):
            runs.load(tmp_path / "mine" / "lora")
    with pytest.raises(ValueError, match=r"--base x with '.*first', which is no adapter.\n  Accepted: "):
        runs.load(folder / "first", base="x")
    with pytest.raises(ValueError, match=r"step 3 of '.*lora_peft', which is no run"):
        runs.load(folder / "lora_peft", 3)
