"""Every file in configs/ builds on its mesh, without a device or an array."""

from pathlib import Path

import jax
import pytest

from jaxllm import config as schema
from jaxllm import models, registry
from jaxllm.objectives import tokens as tokens_objective
from jaxllm.parallel import forms, plan

FILES = sorted((Path(__file__).resolve().parent.parent / "configs").glob("*.py"))

# Parameters of the published models of these shapes.
COUNTS = {
    "bert_base": 109_514_298,
    "gpt2_124m": 124_439_808,
    "llama_1b": 1_235_814_400,
    "llama_8b": 8_030_261_248,
    "llama_70b": 70_553_706_496,
    "sft_llama_8b_qlora": 8_030_261_248 + 167_772_160,
    "t5_base": 222_903_552,
}
DEVICES = {"bert_base": 8, "t5_base": 8, "gpt2_124m": 8, "llama_1b": 8, "llama_8b": 64, "llama_70b": 256}


def test_all_shipped_configs_are_here() -> None:
    laptop = {"quickstart", "sft_quickstart", "shakespeare_char", "bert_quickstart", "t5_quickstart", "transformer_reverse"}
    assert {path.stem for path in FILES} >= {*COUNTS, *laptop}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_config_builds(path: Path) -> None:
    config = schema.load(path)
    schema.check_fields(config)
    assert schema.from_json(schema.to_json(config)) == config
    if config.train.start:
        pytest.skip("its sizes are those of the model that it begins with")
    schema.check(config)
    config.model.vocab_size = config.model.vocab_size or config.tokenizer.vocab_size
    made = plan.make_abstract(config)
    model = models.build(config, made.constrain)
    params = jax.eval_shape(model.init, jax.random.key(config.seed))
    shardings = made.shardings(model.axes, params)
    whole = forms.weights(params)
    assert made.mesh.size == DEVICES.get(path.stem, 1)
    assert whole == COUNTS.get(path.stem, whole)
    if not config.train.transforms:
        # ZeRO-3 and tensor parallelism leave nearly nothing whole; copies over `data` share nothing.
        share = 4 * whole * config.parallel["data"] / made.mesh.size if path.stem in DEVICES else 4 * whole
        assert share <= plan.shard_bytes(shardings, params) < 1.003 * share
    rows = config.train.batch_seqs // config.train.microbatches
    arrays = registry.resolve("examples", config.train.objective)(config).arrays
    batch = {name: jax.ShapeDtypeStruct((rows, array.width), array.dtype) for name, array in arrays.items()}
    tokens, read = batch["tokens"], {name: array for name, array in batch.items() if name not in tokens_objective.LOSS_ARRAYS}
    hidden = jax.eval_shape(model.hidden, params, tokens, **read)
    assert hidden.shape == (*tokens.shape, config.model.width) and hidden.dtype == config.precision.compute
