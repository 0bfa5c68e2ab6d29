"""Which factor a parameter gets, and what is refused."""

import pytest

from jaxllm.optim import groups

AXES = {
    "embed": {"tokens": ("vocab", "embed")},
    "layers": [{"mlp": {"norm": {"scale": ("embed",)}, "up": {"kernel": ("embed", "mlp"), "bias": ("mlp",)}}}] * 2,
}


def test_the_first_full_match_wins_and_no_match_is_one():
    found = groups.factors(((".*scale", 1, 0), ("layers/.*", 0.5, 2), (".*(scale|bias)", 9, 9)), AXES)
    assert found == {
        "embed/tokens": (1, 1),
        "layers/mlp/norm/scale": (1, 0),
        "layers/mlp/up/kernel": (0.5, 2),
        "layers/mlp/up/bias": (0.5, 2),
    }


def test_the_ratio_of_lora_multiplies_what_groups_say_of_b_alone():
    axes = {"layers": {"up": {"a": ("rank",), "b": ("rank",)}}, "norm": {"b": ("embed",)}}
    plain = groups.factors((("layers/.*", 0.5, 2),), axes)
    found = groups.faster(plain, ("layers/up/a", "layers/up/b"), 16)
    assert found == {"layers/up/a": (0.5, 2), "layers/up/b": (8, 2), "norm/b": (1, 1)}


@pytest.mark.parametrize(
    ("group", "message"),
    [
        (("embed", 1, 1), r"optimizer.groups\[1\]: pattern 'embed' selects no parameter(.|\n)*embed/tokens"),
        (("embed.*", 0, 1), r"optimizer.groups\[1\] = \('embed.\*', 0, 1\)(.|\n)*above 0(.|\n)*train.trainable"),
        (("embed.*", 1, -1), r"weight-decay factor of 0 or more"),
    ],
)
def test_a_group_that_cannot_be_meant_is_refused(group, message):
    with pytest.raises(ValueError, match=message):
        groups.factors(((".*scale", 1, 0), group), AXES)
