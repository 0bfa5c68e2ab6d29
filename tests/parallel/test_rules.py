"""The table from logical axes to mesh axes, and its errors."""

import pytest
from jax.sharding import PartitionSpec as P

from jaxllm.parallel import rules

MESH = {"pipe": 1, "data": 2, "fsdp": 4, "seq": 1, "tensor": 8}


@pytest.mark.parametrize(
    ("axes", "shape", "expected"),
    [
        (("embed", "heads", "head_dim"), (64, 16, 3), P("fsdp", "tensor", None)),
        (("heads", "head_dim", "embed"), (16, 3, 64), P("tensor", None, "fsdp")),
        (("layers", "mlp", "embed"), (3, 64, 64), P("pipe", "tensor", "fsdp")),
        (("batch", "length", "embed_act"), (16, 5, 7), P(("data", "fsdp"), "seq", None)),
        (("batch", None, "kv_heads", "head_dim"), (8, 5, 8, 3), P(("data", "fsdp"), None, "tensor", None)),
        ((), (), P()),
    ],
)
def test_spec(axes: tuple, shape: tuple, expected: P) -> None:
    assert rules.spec(rules.RULES, MESH, axes, shape, "x") == expected


@pytest.mark.parametrize(
    ("axes", "shape", "words"),
    [
        (
            ("embed", "kv_heads", "head_dim"),
            (64, 12, 4),
            r"parallel.tensor = 8 does not divide dimension 1 \('kv_heads'\) of 'layers/k', which is 12.\n"
            "  Accepted: 1, 2, 3, 4, 6, 12.\n  Set parallel.tensor to one of these",
        ),
        (("batch", "length"), (12, 4), "parallel.data x parallel.fsdp = 8 does not divide dimension 0 .*, which is 12"),
        (("mlp", "heads"), (8, 8), "'mlp' and 'heads' both land on the mesh axis 'tensor'"),
        (("batch", "embed"), (8, 8), "'batch' and 'embed' both land on the mesh axis 'fsdp'"),
        (("embed", "head"), (8, 8), "no rule for the logical axis 'head' of 'layers/k'. Did you mean 'heads'?"),
        (("embed",), (8, 8), r"'layers/k' has shape \(8, 8\) but logical axes \('embed',\)"),
    ],
)
def test_errors_name_the_parameter_and_what_is_accepted(axes: tuple, shape: tuple, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        rules.spec(rules.RULES, MESH, axes, shape, "layers/k")


@pytest.mark.parametrize(
    ("name", "words", "not_words"),
    [
        ("embed/tokens", "model.vocab_size = 264 has rows to spare", "train.start"),
        ("embed/tokens/base", "Set parallel.tensor to one of these: these rows are those of train.start.", "model.vocab_size"),
        ("head/kernel/base", "parallel.fsdp cuts the other dimension", "model.vocab_size"),
    ],
)
def test_what_a_vocabulary_that_does_not_divide_can_become(name: str, words: str, not_words: str) -> None:
    """A frozen table (transforms/grown.py) has the rows of the model that is begun with, whatever model.vocab_size says."""
    with pytest.raises(ValueError) as caught:
        rules.spec(rules.RULES, MESH, ("vocab", "embed_rest"), (259, 64), name)
    assert "Accepted: 1, 7, 37, 259.\n  Set " in str(caught.value)
    assert words in str(caught.value) and not_words not in str(caught.value)


def test_every_rule_lands_on_the_mesh() -> None:
    assert {mesh_axis for shared_by in rules.RULES.values() for mesh_axis in shared_by} == set(rules.MESH_AXES)
