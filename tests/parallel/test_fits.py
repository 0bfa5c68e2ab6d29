"""What does not fit a mesh is said before anything is built: what was given, what is accepted, what to change."""

from typing import Any

import pytest
from parallel import combinations

from jaxllm.parallel import fits
from jaxllm.parallel import plan as plans

PIPE = {"model__layers_as": "scan", "parallel__pipe": 2, "train__microbatches": 4}


@pytest.mark.parametrize(
    ("family", "given", "words"),
    [
        (
            "gpt",
            PIPE | {"model__layers": 5},
            r"model.layers = 5 cannot .* parallel.pipe x parallel.chunks = 2 x 1 runs of layers.\n  Accepted: multiples of 2 layers;"
            r" parallel.pipe x parallel.chunks = 1, 5\.",
        ),
        (
            "gpt",
            PIPE | {"parallel__schedule": "interleaved", "parallel__chunks": 3},
            r"= 2 x 3 runs .*\n  Accepted: multiples of 6 layers",
        ),
        (
            "t5",
            PIPE | {"parallel__schedule": "zb_h1", "model__decoder_layers": 3},
            r"model.decoder_layers = 3 cannot be shared out over",
        ),
        ("t5", PIPE, r"schedule = '1f1b' has one run of layers a stage, and model.name = 't5' two.*\n  Accepted: interleaved"),
        (
            "gpt",
            PIPE | {"parallel__chunks": 2},
            r"schedule = '1f1b' with parallel.chunks = 2.\n  Accepted: 1 for 1f1b, 2 or more for inter",
        ),
        (
            "gpt",
            PIPE | {"parallel__schedule": "interleaved", "parallel__chunks": 1},
            r"'interleaved' with parallel.chunks = 1.\n  Accepted",
        ),
        (
            "gpt",
            PIPE | {"model__layers_as": "unrolled"},
            r"pipe = 2 needs layers that lie stacked, but model.layers_as = 'unrolled'",
        ),
        (
            "gpt",
            PIPE | {"precision__compute": "float16"},
            r"'float16' in a pipeline.*\n  Accepted: float32, bfloat16.\n  Set precision.comp",
        ),
        (
            "gpt",
            PIPE | {"parallel__seq": 2},
            r"parallel.context = 'ring' in a pipeline.*\n  Accepted: ulysses.*\n  Set parallel.context=ul",
        ),
        (
            "gpt",
            {"parallel__seq": 3},
            r"rows of 32 \w+ cannot be cut into 6 equal runs for parallel.seq = 3, two for each device .*\n  Accepted: multiples of 6 tok",
        ),
        (
            "gpt",
            {"parallel__seq": 4, "parallel__tensor": 2, "parallel__context": "ulysses"},
            r"shares out 2 heads \(model.heads / parallel.tensor\) over parallel.seq = 4.\n  Accepted: parallel.seq = 1, 2; .*'ring'",
        ),
        (
            "gpt",
            PIPE | {"parallel__data": 8},
            r"16 / 4 = 4 rows cannot .*parallel.data x parallel.fsdp = 8.\n.*\n.*a multiple of 32, such as 32",
        ),
    ],
)
def test_what_does_not_fit(family: str, given: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        plans.make_abstract(combinations.config_of(family, **given))


@pytest.mark.parametrize(
    ("family", "given"),
    [
        ("gpt", PIPE | {"parallel__seq": 2, "parallel__context": "ulysses"}),
        ("t5", PIPE | {"parallel__schedule": "interleaved", "model__decoder_layers": 2}),
        ("bert", PIPE | {"parallel__schedule": "gpipe", "parallel__chunks": 2}),
    ],
)
def test_what_fits(family: str, given: dict[str, Any]) -> None:
    plans.make_abstract(combinations.config_of(family, **given))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"model__layers_as": "scan", "parallel__pipe": 4}, "4 stages of the pipeline are idle for 75% of the time"),
        ({"parallel__sequence": True}, "parallel.sequence has no effect with parallel.tensor = 1"),
        ({"parallel__chunks": 2}, "parallel.chunks has no effect with parallel.pipe = 1"),
        ({"parallel__zero_stage": 1}, "parallel.zero_stage has no effect with parallel.fsdp = 1"),
        ({"parallel__seq": 2, "model__attention": "flash"}, "'flash' has no effect with parallel.context = 'ring'"),
    ],
)
def test_what_is_wasteful_or_without_effect_is_said(given: dict[str, Any], words: str) -> None:
    config = combinations.config_of("gpt", **given)
    (note,) = fits.notes(config, plans.make_abstract(config).mesh.shape)
    assert words in note
    fitting = combinations.config_of(
        "gpt", **PIPE, parallel__tensor=2, parallel__sequence=True, parallel__fsdp=2, parallel__zero_stage=1
    )
    assert not fits.notes(fitting, plans.make_abstract(fitting).mesh.shape)
