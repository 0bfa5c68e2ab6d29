"""What transformers (and torch.nn) computed, frozen in tests/golden: logits, losses and gradients of every family and switch.

Both sides compute in float32, in another order of operations: they differ by its rounding.
"""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import hf_batch
import jax
import numpy as np
import pytest
from ml_collections import ConfigDict
from safetensors.numpy import load_file

from jaxllm import config as configs
from jaxllm import models
from jaxllm.interop import directory, weights
from jaxllm.objectives import tokens as objective
from jaxllm.types import Params

GOLDEN = Path(__file__).resolve().parent.parent / "golden"
READ = sorted(path.parent.name for path in GOLDEN.glob("*/config.json"))
TRANSFORMER = "transformer"  # has no class in transformers, so no config.json; its tensors have our names
CASES = [*READ, TRANSFORMER]
FLOAT32 = 2.0**-23
BFLOAT16 = 2.0**-8
# As measured, logits are 2 to 13 roundings of the largest one apart, losses up to 1.5, and gradients 5e-6 of their norm. Another
# processor adds in another order, so that twice as much is let pass.
ROUNDINGS, GRADIENT = 32 * FLOAT32, 3e-5


class Golden(NamedTuple):
    """A case. batch: ours, of the arguments that the other model had. logits: or hidden states. gradients: by the files' names."""

    architecture: str
    config: ConfigDict
    params: Params
    batch: dict[str, np.ndarray]
    logits: np.ndarray
    loss: np.ndarray | None
    gradients: dict[str, np.ndarray]

    def tensors(self, params: Params) -> dict[str, np.ndarray]:
        """Parameters, or their gradients, as the tensors of the file."""
        if self.architecture == TRANSFORMER:
            return {name: np.asarray(leaf) for name, leaf in indexed(params).items()}
        exported = weights.export(params, self.architecture, models.build(self.config).config)
        return {name: exported.make(name) for name in exported.shapes}

    def error(self, logits: np.ndarray) -> float:
        """The largest difference, over all tokens that are no padding, in parts of the largest logit."""
        return hf_batch.error(self.batch, logits, self.logits)


def indexed(params: Params) -> dict[str, Any]:
    """Leaves by their path, with the index of the layer."""
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in jax.tree.leaves_with_path(params)}


def read(name: str, **model: Any) -> Golden:
    """The case, with `model` changed in its config before the parameters are read."""
    stored = load_file(GOLDEN / name / "expected.safetensors")
    arguments = {key.removeprefix("input/"): array for key, array in stored.items() if key.startswith("input/")}
    gradients = {key.removeprefix("gradient/"): array for key, array in stored.items() if key.startswith("gradient/")}
    if name == TRANSFORMER:
        architecture, (config, params) = name, read_transformer()
        batch = hf_batch.from_arguments("T5ForConditionalGeneration", arguments)
    else:
        found = directory.read(GOLDEN / name)
        found.config.model.update(model)
        architecture, config, params = found.architecture, found.config, weights.load(found).params
        batch = hf_batch.from_arguments(architecture, arguments)
    logits = stored["logits" if "logits" in stored else "hidden"]
    return Golden(architecture, config, params, batch, logits, stored.get("loss"), gradients)


def read_transformer() -> tuple[ConfigDict, Params]:
    config, tensors = configs.base(), load_file(GOLDEN / TRANSFORMER / "model.safetensors")
    config.model.update({"name": TRANSFORMER, "layers": 2, "width": 12, "heads": 3, "mlp_width": 20, "vocab_size": 32})
    config.train.label_smoothing = 0.1
    template = jax.eval_shape(models.build(config).init, jax.random.key(0))
    assert {name: leaf.shape for name, leaf in indexed(template).items()} == {name: array.shape for name, array in tensors.items()}
    return config, jax.tree.unflatten(jax.tree.structure(template), [tensors[name] for name in indexed(template)])


def compile_quickly(function: Callable[..., Any]) -> Callable[..., Any]:
    """jit without the compiler's costly passes, which make up nine tenths of the time of these tests."""
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})


def apply(golden: Golden) -> np.ndarray:
    """Logits of the case's batch."""
    model = models.build(golden.config)
    rest = {name: array for name, array in golden.batch.items() if name not in objective.LOSS_ARRAYS}
    return np.asarray(compile_quickly(lambda params: model.apply(params, golden.batch["tokens"], **rest))(golden.params))


@pytest.mark.parametrize("name", CASES)
def test_logits(name: str) -> None:
    """At most 1e-5 apart where logits are of size 6."""
    golden = read(name)
    assert golden.error(apply(golden)) < ROUNDINGS


# Without those that add nothing to the backward pass of another case. Of the scaled frequencies, yarn's come with a factor.
WITHOUT_GRADIENTS = ("bert_base", "llama_attention_bias", "rope_linear", "rope_llama3", "rope_dynamic", "t5_inner")


@pytest.mark.parametrize("name", [name for name in CASES if name not in WITHOUT_GRADIENTS])
def test_loss_and_gradients(name: str) -> None:
    """Of the rows packed into one: documents side by side have the loss and the gradients that rows with padding have."""
    golden = read(name)
    ours, batch = objective.make(models.build(golden.config), golden.config), hf_batch.packed(golden.batch)

    def loss(params: Params) -> jax.Array:
        mean, _ = ours(params, batch, None)
        return mean.total / mean.weight

    value, gradients = compile_quickly(jax.value_and_grad(loss))(golden.params)
    assert abs(value - golden.loss) <= 4 * FLOAT32 * golden.loss
    hf_batch.check_gradients(golden.tensors(gradients), golden.gradients, GRADIENT)


@pytest.mark.parametrize("name", ["gpt2", "llama", "mistral", "bert_mlm", "t5_v1_1"])
def test_bfloat16(name: str) -> None:
    """Within some roundings of bfloat16, of which the residual stream alone has four. With the layers in the scan form."""
    golden = read(name, layers_as="scan")
    golden.config.precision.compute = "bfloat16"
    assert 0.1 * BFLOAT16 < golden.error(apply(golden)) < 16 * BFLOAT16


# rope_dynamic is left out: a key in the cache keeps the frequencies of the length at which it came, here as in transformers.
@pytest.mark.parametrize("name", ["gpt2", "llama", "mistral", "rope_yarn", "t5", "t5_v1_1", TRANSFORMER])
def test_cached_decode(name: str) -> None:
    """Four tokens at a time, with a cache: the logits of the whole."""
    golden, chunk = read(name), 4
    model, batch = models.build(golden.config), golden.batch
    tokens, lengths = batch["tokens"], batch["segments"].sum(1)
    state = model.init_cache(*tokens.shape)
    if model.encode is not None:
        state = compile_quickly(model.encode)(golden.params, batch["inputs"], batch["input_segments"].sum(1), state)
    step = compile_quickly(model.decode)
    compared = 0
    for start in range(0, tokens.shape[1], chunk):
        part = tokens[:, start : start + chunk]
        counts = np.clip(lengths - start, 0, part.shape[1]).astype(np.int32)
        part = np.pad(part, ((0, 0), (0, chunk - part.shape[1])))
        logits, state = step(golden.params, part, counts, state)
        for row in np.flatnonzero(counts):
            expected = golden.logits[row, start + counts[row] - 1]
            assert np.abs(logits[row] - expected).max() < ROUNDINGS * np.abs(golden.logits).max()
            compared += 1
    assert compared == sum(-(-lengths // chunk))


VARIANTS = sorted(path.relative_to(GOLDEN) for path in GOLDEN.glob("*/config_*.json"))


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_other_versions_of_config(variant: Path, tmp_path: Path) -> None:
    """What transformers 4 wrote and what transformers 5 writes for the same model are the same model."""
    for file in (GOLDEN / variant).parent.glob("*.safetensors"):
        shutil.copy(file, tmp_path)
    shutil.copy(GOLDEN / variant, tmp_path / "config.json")
    one, other = directory.read((GOLDEN / variant).parent), directory.read(tmp_path)
    assert (other.architecture, other.config.to_dict()) == (one.architecture, one.config.to_dict())
