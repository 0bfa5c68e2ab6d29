"""What of a layer the backward pass reads from memory, and what it computes again (Chen et al. 2016, arXiv:1604.06174).

Kept for each token and layer of a gated decoder, with D the width, F the mlp width, and C = 2 D G / H the size of keys and values:

    none       everything that a derivative needs
    attention  the same without scores and probabilities, S numbers a head (Korthikanti et al. 2022, arXiv:2205.05198, section 5)
    dots       the layer's input and the products with a parameter that a derivative needs: 3 D + C + 2 F numbers
    named      the layer's input and the chosen names: by default 4 D + C
    full       the layer's input: D

docs/memory.md has the measured sizes and costs.

"attention" acts inside a layer, the others on it as a whole. `flash` and `splash` keep no scores; their results bear the name "attended",
so that "attention" and "named" with that name do not run their forward pass twice.
"""

import difflib
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax

# What models/layers.py names, in the order in which a layer makes it.
NAMES = {
    "layer_in": "the residual stream as it enters the layer",
    "q": "queries, rotated",
    "k": "keys, rotated",
    "v": "values",
    "attended": "what the heads read, before the output projection",
    "attention_out": "what attention adds to the residual stream",
    "mlp_gate": "the gate of a gated MLP, before its activation",
    "mlp_up": "the wide part of the MLP, before its activation or gate",
    "mlp_out": "what the MLP adds to the residual stream",
}
HOST = "pinned_host"


class Remat(NamedTuple):
    """`policy` is a key of POLICIES. `save` and `offload`, of "named" alone: kept on the device, and kept in the host's memory."""

    policy: str = "none"
    save: tuple[str, ...] = ()
    offload: tuple[str, ...] = ()


class Policy(NamedTuple):
    """`part`: what becomes a `jax.checkpoint`, "layer" or "attention" or nothing; `saves(remat)`: what that keeps besides its inputs."""

    part: str | None
    saves: Callable[[Remat], Any]


def _nothing(remat: Remat) -> Any:
    del remat
    return jax.checkpoint_policies.nothing_saveable


def _products(remat: Remat) -> Any:
    # Scores are products too, but have batch dimensions.
    del remat
    return jax.checkpoint_policies.dots_with_no_batch_dims_saveable


def _attended(remat: Remat) -> Any:
    del remat
    return jax.checkpoint_policies.save_only_these_names("attended")


def _named(remat: Remat) -> Any:
    return jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=list(remat.save),
        names_which_can_be_offloaded=list(remat.offload),
        offload_src="device",
        offload_dst=HOST,
    )


POLICIES = {
    "none": Policy(None, _nothing),
    "attention": Policy("attention", _attended),
    "dots": Policy("layer", _products),
    "named": Policy("layer", _named),
    "full": Policy("layer", _nothing),
}


def make(model: Any) -> Remat:
    """The policy of `config.model`; ValueError for a name that layers do not have, or that is both saved and offloaded."""
    if model.remat != "named":
        if model.remat_offload:
            raise ValueError(
                f"model.remat_offload = {model.remat_offload} with model.remat = '{model.remat}', which names nothing.\n"
                "  Accepted: model.remat = 'named', or no model.remat_offload.\n  Change one of them."
            )
        return Remat(model.remat)
    remat = Remat("named", tuple(model.remat_save), tuple(model.remat_offload))
    for field, names in (("remat_save", remat.save), ("remat_offload", remat.offload)):
        for name in names:
            _check_name(field, name)
    # An input of a layer is kept anyhow, and the default need not be cut by hand to offload some of it.
    return remat._replace(save=tuple(name for name in remat.save if name not in remat.offload))


def _check_name(field: str, name: str) -> None:
    if name in NAMES:
        return
    near = difflib.get_close_matches(name, NAMES, n=1)
    hint = f" Did you mean '{near[0]}'?" if near else ""
    raise ValueError(
        f"model.{field}: no array of a layer has the name '{name}'.{hint}\n  Accepted: {', '.join(NAMES)}.\n  Correct model.{field}."
    )


def over(part: str, remat: Remat, function: Callable[..., Any], layers_as: str, gathers: bool = False) -> Callable[..., Any]:
    """`function`, which is this part ("layer", "attention") of the model, as the policy wants it.

    gathers: it makes whole the parameters of which a device holds a share (ZeRO-3). The backward pass makes them whole anew under every
    policy: kept from the forward pass, the whole model would be on each device.
    """
    policy = POLICIES[remat.policy]
    if policy.part != part and not gathers:
        return function
    saves = policy.saves(remat) if policy.part == part else _all_but_gathered
    # The barrier against merging the two computations is not needed inside a scan.
    return jax.checkpoint(function, policy=saves, prevent_cse=layers_as == "unrolled")


# What only lays out or casts a value: kept, it would keep what was gathered under another shape.
_LAYOUTS = ("reshape", "transpose", "squeeze", "broadcast_in_dim", "convert_element_type")


def _all_but_gathered(primitive: Any, *_: Any, **params: Any) -> bool:
    """A policy of `jax.checkpoint`. Names cannot say it: what is not named yet would be kept."""
    return primitive.name not in _LAYOUTS and not _gathers(primitive, params)


def _gathers(primitive: Any, params: Any) -> bool:
    """Whether an operation is an all-gather or has one inside."""
    inside = (eqn for value in params.values() for eqn in getattr(value, "eqns", ()))
    return primitive is jax.lax.all_gather_p or any(_gathers(eqn.primitive, eqn.params) for eqn in inside)


def check_offload(remat: Remat, devices: Iterable[jax.Device]) -> None:
    """ValueError if something is to be offloaded and one of the devices cannot: it would stay on the device without a word."""
    for device in devices if remat.offload else ():
        reason = _refuse(device)
        if reason is not None:
            raise ValueError(
                f"model.remat_offload = {remat.offload} on {device.device_kind}: {reason}.\n"
                f"  Accepted: devices with a memory '{HOST}' beside their own, such as GPUs and TPUs.\n"
                "  Set model.remat_offload=(), or model.remat=full."
            )


def _refuse(device: jax.Device) -> str | None:
    if device.platform == "cpu":
        # It lists all kinds of memory, and its compiler drops the request to move anything between them.
        return "its memory is the host's"
    kinds = [memory.kind for memory in device.addressable_memories()]
    return None if HOST in kinds else f"its memories are {', '.join(kinds)}"
