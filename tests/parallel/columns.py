"""The columns of the matrix of docs/matrix.md: ways to spread a model over pretend devices, each beside one device.

Both forms of the layer stack occur, everywhere but in pipelines, which need it stacked. Learned, rotary and other positions, tied and
untied heads, and key/value heads that are fewer than `tensor` come with the families.
"""

from functools import cache
from typing import Any

from parallel import combinations

FAMILIES = ("gpt", "llama", "bert", "t5", "transformer")
ENCODER_DECODERS = ("t5", "transformer")
SCAN = {"model__layers_as": "scan"}


def _parallel(**sizes: Any) -> dict[str, Any]:
    return {f"parallel__{name}": value for name, value in sizes.items()}


def _pipeline(schedule: str, microbatches: int = 4, **sizes: Any) -> dict[str, Any]:
    return SCAN | _parallel(schedule=schedule, **sizes) | {"train__microbatches": microbatches}


# Title -> what differs from one device.
COLUMNS: dict[str, dict[str, Any]] = {
    "DP: data 8": _parallel(data=8),
    "ZeRO-1: data 2, fsdp 4": SCAN | _parallel(data=2, fsdp=4, zero_stage=1),
    "ZeRO-2: data 2, fsdp 4": _parallel(data=2, fsdp=4, zero_stage=2) | {"train__microbatches": 2},
    "ZeRO-3: data 2, fsdp 4": SCAN | _parallel(data=2, fsdp=4, zero_stage=3) | {"train__microbatches": 2},
    "TP: tensor 4": _parallel(tensor=4),
    "SP: tensor 4": SCAN | _parallel(tensor=4, sequence=True),
    "CP ring: seq 4": _parallel(seq=4, context="ring"),
    "CP Ulysses: data 2, seq 4": SCAN | _parallel(data=2, seq=4, context="ulysses"),
    "PP 1F1B: pipe 4, data 2": _pipeline("1f1b", pipe=4, data=2),
    "PP ZB-H1: pipe 4": _pipeline("zb_h1", pipe=4, chunks=1),
    "PP 1F1B x ZeRO-3 x TP: pipe 2, fsdp 2, tensor 2": _pipeline("1f1b", pipe=2, fsdp=2, tensor=2),
    "PP ZB-H1 x DP x CP Ulysses: pipe 2, data 2, seq 2": _pipeline("zb_h1", 2, pipe=2, data=2, seq=2, context="ulysses"),
    "ZeRO-2 x CP ring x SP: fsdp 2, seq 2, tensor 2": _parallel(fsdp=2, seq=2, tensor=2, sequence=True, zero_stage=2)
    | {"train__microbatches": 2},
}


def overrides(family: str, column: str) -> dict[str, Any]:
    """What a cell's config differs in from one device. An encoder-decoder has two runs of layers a stage: 1F1B is `interleaved` there."""
    given = dict(COLUMNS[column])
    if family in ENCODER_DECODERS and given.get("parallel__schedule") == "1f1b":
        given["parallel__schedule"] = "interleaved"
    return given


# Adapters of a size that moves what the kernels do by about as much as they are. nf4 needs 64 inputs or more.
ADAPTERS: dict[str, dict[str, Any]] = {
    kind: {"train__transforms": tuple(kind.split()), "lora__rank": 4, "lora__alpha": 4.0} for kind in ("lora", "dora", "nf4 lora")
}
ADAPTERS["nf4 lora"] |= {"model__width": 64, "model__mlp_width": 128}
# Those of the matrix, with the families that have them there.
ADAPTED = [
    *(("lora", family) for family in FAMILIES),
    *((kind, family) for kind in ("dora", "nf4 lora") for family in ("llama", "t5")),
]

# Adapters beside kernels on grids of equal steps. Of tensor 4, `down` has 32 inputs a device and `o` a head of 16.
_GRID = {"train__transforms": ("int4", "lora"), "model__width": 64, "model__mlp_width": 128}
_ZEROS = {"quant__symmetric": False, "quant__scale_dtype": "float16"}
GRIDS: dict[str, dict[str, Any]] = {
    "int4, a group a device": _GRID | {"quant__group": 32},
    "int4, a group over devices": _GRID | _ZEROS | {"quant__group": 64},
    "int4, by an index": _GRID | _ZEROS | {"quant__group": 16, "quant__ordered": True},
    "int3, a group over devices": _GRID | {"quant__group": 64, "train__transforms": ("int3", "lora")},
    "int8, groups": _GRID | _ZEROS | {"quant__group": 16, "train__transforms": ("int8", "lora")},
}
ADAPTERS |= {grid: ADAPTERS["lora"] | fields for grid, fields in GRIDS.items()}
# (of GRIDS, of COLUMNS): where groups meet cut inputs, each cut of the layers, and each kind of grid.
GRID_CELLS = (
    ("int4, a group a device", "TP: tensor 4"),
    ("int4, a group over devices", "TP: tensor 4"),
    ("int4, by an index", "SP: tensor 4"),
    ("int4, by an index", "PP 1F1B x ZeRO-3 x TP: pipe 2, fsdp 2, tensor 2"),
    ("int3, a group over devices", "TP: tensor 4"),
    ("int3, a group over devices", "ZeRO-3: data 2, fsdp 4"),
    ("int8, groups", "ZeRO-2 x CP ring x SP: fsdp 2, seq 2, tensor 2"),
)


def named(adapter: str, family: str) -> str:
    """Of a column of the page."""
    return f"{family}, {adapter}"


MODELS = [*FAMILIES, *(named(*adapted) for adapted in ADAPTED)]


@cache
def _one_device(family: str, adapter: str) -> Any:
    return combinations.run(combinations.config_of(family, **ADAPTERS.get(adapter, {})), combinations.batch_of(family))


def deviations(family: str, column: str, adapter: str = "") -> dict[str, float]:
    """Of a cell: `combinations.deviations` of the loss and of each array of gradients. adapter: of ADAPTERS, or none."""
    given = overrides(family, column) | ADAPTERS.get(adapter, {})
    found = combinations.run(combinations.config_of(family, **given), combinations.batch_of(family))
    return combinations.deviations(found, _one_device(family, adapter))
