"""Training that begins with an adapter of PEFT and the base that it names: read once, with its tokens and its head."""

import dataclasses
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from begun import BYTES, begin, config_of, equal, write_adapter, write_sources

from jaxllm import runs, start
from jaxllm.data import tokenize
from jaxllm.engine.checkpoint import Checkpoints
from jaxllm.interop import peft, peft_attach, weights
from jaxllm.transforms import adapt, tree


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_sources(tmp_path_factory.mktemp("models"))


@pytest.mark.parametrize("name", ["peft_unrolled", "peft_hf", "chain"])
def test_the_weights_of_an_adapter_and_its_base_are_read_once(
    sources: dict[str, Path], tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the first look at the config to the parameters; also where the base of the base is a model."""
    path = sources.get(name) or tmp_path / name
    if name not in sources:
        shutil.copytree(sources["peft_hf"], path)
        values = json.loads((path / peft.CONFIG).read_text())
        (path / peft.CONFIG).write_text(json.dumps(values | {"base_model_name_or_path": str(sources["peft_hf"])}))
    expected, read = tree.stack_layers(adapt.merged(runs.load(path).params)), []
    for place, function in ((weights, "load"), (Checkpoints, "load_params")):
        original = getattr(place, function)
        monkeypatch.setattr(place, function, lambda *given, original=original: read.append(1) or original(*given))
    _, params, _ = begin(config_of(path, model__layers_as="scan"), tmp_path / "new")
    equal(params, expected)
    assert len(read) == 1


@pytest.mark.parametrize(("stored", "tied"), [("its own", "off"), ("the base's", "on")])
def test_a_head_beside_a_tied_base_is_known_without_its_weights(stored: str, tied: str) -> None:
    """Those of the embedding are asked for, as a head that is the same stays tied."""
    golden = Path(__file__).parent / "golden"
    imported = runs.read_imported(golden / "gpt2")
    params, adapter = weights.load(imported).params, peft.read(golden / "peft" / "gpt2_head")
    embedding = np.asarray(params["embed"]["tokens"])
    if stored == "the base's":
        read = adapter.read
        adapter = dataclasses.replace(adapter, read=lambda name: embedding if name == "lm_head.weight" else read(name))
    empty = jax.tree.map(lambda array: np.broadcast_to(np.float32(0), array.shape), params)
    found = peft_attach.attach(empty, imported.config, adapter, lambda: embedding).config
    assert found == peft_attach.attach(params, imported.config, adapter).config
    assert found.model.tied_head == tied


def test_an_adapter_with_new_tokens(sources: dict[str, Path], tmp_path: Path) -> None:
    """Brings them, and its tokenizer; new ones of the run come above them."""
    path = write_adapter(tmp_path / "grown", sources["unrolled"], ("<one>", "<two>"))
    found, opened = start.open_start(str(path)), runs.load(path)
    assert found.config.model.vocab_size == BYTES + 2
    config = start.resolve(config_of(path), tmp_path)
    assert (config.model.start_rows, config.tokenizer.kind, config.tokenizer.path) == (BYTES + 2, "file", str(path))
    session, params, said = begin(config_of(path, model__layers_as="scan", train__transforms=("lora",), lora__rank=2), tmp_path)
    assert said == f"begins with {path} merged into {sources['unrolled']}" and not any(
        "rows" in name for name in tree.names(params)
    )
    equal(adapt.merged(params), tree.stack_layers(adapt.merged(opened.params)))
    assert tokenize.make(config, tuple).encode_with_specials("a<two>") == [*opened.tokenizer.encode("a"), BYTES + 1]


def test_an_adapter_whose_base_is_not_there_is_folded_first(sources: dict[str, Path], tmp_path: Path) -> None:
    """As the error says, and what the command in it writes is a model to begin with."""
    path = tmp_path / "moved away"
    shutil.copytree(sources["peft_unrolled"], path)
    values = json.loads((path / peft.CONFIG).read_text())
    for named, words in (("gone/base", "its base 'gone/base' is not a path here, nor beside it"), (None, "it names no base")):
        (path / peft.CONFIG).write_text(json.dumps(values | {"base_model_name_or_path": named}))
        with pytest.raises(
            ValueError, match=rf"moved away' is an adapter, and {words}.\n  Accepted: .*\n  Fold it into its base"
        ) as error:
            start.resolve(config_of(path), tmp_path / "new")
    flags = shlex.split(re.findall(r"\(python -m jaxllm.convert (.*)\)", str(error.value))[0])
    names = {"BASE": str(sources["unrolled"]), "MERGED": str(tmp_path / "merged")}
    done = subprocess.run(
        [sys.executable, "-m", "jaxllm.convert", *(names.get(flag, flag) for flag in flags)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    _, params, _ = begin(config_of(tmp_path / "merged"), tmp_path)
    equal(params, begin(config_of(sources["peft_unrolled"]), tmp_path)[1])
