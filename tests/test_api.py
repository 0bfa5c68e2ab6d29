"""The three lines of a notebook, on a run that was never trained."""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_run import STEPS, write_run

import jaxllm
from jaxllm import models, runs
from jaxllm.engine.checkpoint import Checkpoints
from jaxllm.interop import peft, peft_params
from jaxllm.transforms import adapt


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "plain")


def test_three_lines(run: Path) -> None:
    model, params, tokenizer = jaxllm.load(run)
    logits = model.apply(params, jnp.array([[tokenizer.bos_id, *tokenizer.encode("The")]]))
    assert logits.shape == (1, 4, tokenizer.vocab_size)
    text = jaxllm.generate(model, params, tokenizer, "The", max_new_tokens=1, temperature=0)
    assert text == tokenizer.decode([int(logits[0, -1].argmax())])
    pair = jaxllm.generate(model, params, tokenizer, ["The", "a"], max_new_tokens=8, seed=3)
    assert pair[0] == jaxllm.generate(model, params, tokenizer, "The", max_new_tokens=8, seed=3)
    assert pair[0] != jaxllm.generate(model, params, tokenizer, "The", max_new_tokens=8, seed=4)


def test_generate_is_a_function_also_after_the_command_was_imported() -> None:
    import jaxllm.generate  # noqa: PLC0415

    assert sys.modules["jaxllm.generate"] is jaxllm.generate
    assert jaxllm.generate.__call__ is __import__("jaxllm.api").api.generate


def test_load_takes_the_step_asked_for(run: Path) -> None:
    for step, chosen in ((10, 10), (20, 20), (None, 20)):
        model, params, _ = jaxllm.load(run, step)
        expected = model.init(jax.random.key(chosen))
        np.testing.assert_array_equal(params["embed"]["tokens"], 4 * expected["embed"]["tokens"])
        assert all(leaf.devices() == {jax.devices()[0]} for leaf in jax.tree.leaves(params))


def test_load_suits_the_cpu_and_takes_averaged_weights(tmp_path: Path) -> None:
    """A scanned bfloat16 run with averaged weights gives the logits of those weights, unrolled, in float32."""
    fields = {"model__layers_as": "scan", "precision__compute": "bfloat16", "train__ema_decay": 0.9}
    directory = write_run(tmp_path / "run", **fields)
    model, params, _ = jaxllm.load(directory)
    assert isinstance(params["layers"], list)
    config = jaxllm.config.load(directory / "config.json")
    config.model.vocab_size = model.config.vocab_size
    config.precision.compute = "float32"
    scanned = models.build(config)
    tokens = jnp.arange(12)[None]
    halved = jax.tree.map(lambda x: 2 * x, scanned.init(jax.random.key(STEPS[-1])))
    np.testing.assert_allclose(model.apply(params, tokens), jax.jit(scanned.apply)(halved, tokens), rtol=1e-4, atol=1e-4)


def test_an_adapter_beside_a_base(run: Path, tmp_path: Path) -> None:
    """Beside any one that fits: a run with the same sizes and half the weights, whatever the adapter names. As the command opens it."""
    base, adapter = write_run(tmp_path / "base", model__layers_as="scan", train__ema_decay=0.9), tmp_path / "adapter"
    opened = runs.load(base)
    config = opened.config.copy_and_resolve_references()
    config.train.transforms, config.lora.rank = ("lora",), 2
    adapted = models.build(config)
    drawn = adapt.Adaptation(opened.model.axes, adapted.config.transforms).params(opened.params, jax.random.key(0))
    peft.write(adapter, peft_params.export(jax.tree.map(lambda leaf: leaf + 0.1, drawn), adapted.config, base=str(run)))
    tokens = jnp.arange(12)[None]
    logits = {}
    for path in (run, base):
        model, params, _ = jaxllm.load(adapter, base=path)
        expected = runs.load(adapter, base=path)
        logits[path] = model.apply(params, tokens)
        np.testing.assert_allclose(logits[path], expected.model.apply(expected.params, tokens), rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(logits[run], jaxllm.load(adapter)[0].apply(jaxllm.load(adapter)[1], tokens))
    assert np.abs(logits[run] - logits[base]).max() > 0.1
    with pytest.raises(ValueError, match=r"--base x with '.*', which is no adapter.\n  Accepted: "):
        jaxllm.load(run, base="x")


def test_what_is_no_run_is_named(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"it does not exist. Did you mean '.*plain'\?\n  Accepted: the --workdir"):
        jaxllm.load(run.parent / "plane")
    with pytest.raises(ValueError, match=r"it has no config.json"):
        jaxllm.load(tmp_path)
    with pytest.raises(ValueError, match=r"no run is given.\n  Accepted: the --workdir"):
        jaxllm.load("")
    with pytest.raises(ValueError, match=r"no checkpoint of step 15 [\s\S]*Accepted: 10, 20"):
        jaxllm.load(run, 15)
    (tmp_path / "config.json").write_text((run / "config.json").read_text())
    with pytest.raises(ValueError, match=r"has no checkpoint yet.\n  Accepted"):
        jaxllm.load(tmp_path)


def test_checkpoints_of_another_model_are_refused(run: Path, tmp_path: Path) -> None:
    """The config of the run was edited by hand."""
    for path in (run / "tokenizer", Checkpoints(run / "checkpoints").directory):
        (tmp_path / path.name).symlink_to(path)
    text = (run / "config.json").read_text()
    (tmp_path / "config.json").write_text(text.replace('"width": 32', '"width": 64'))
    with pytest.raises(ValueError, match=r"model.width"):
        jaxllm.load(tmp_path)
