"""Which key a query sees: one rule for every implementation of attention.

With T queries and S keys, the query of index t stands at slot t + (S - T): fewer queries than keys are the last ones.
"""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp

# Score of a hidden key. Finite, so that a row that sees nothing is uniform and not NaN; so low that any score vanishes beside
# it in float32 and exp() gives exactly 0: hidden keys cannot change one bit of the result.
HIDDEN = -1e30


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["segments_BT", "key_segments_BS", "prefix_BS", "branches_BT", "key_branches_BS"],
    meta_fields=["causal", "window_tokens"],
)
@dataclass(frozen=True)
class Mask:
    """The query at slot t sees the key at slot s iff both are of one segment, s is of the trunk or of t's branch, and s is in the
    prefix or all of this holds:

    not `causal`, or s <= t; no `window_tokens` (0), or t - s < window_tokens (Beltagy et al. 2020, arXiv:2004.05150, looking
    back only).

    segments_BT: int, None for a single segment. key_segments_BS: those of the keys, None where the keys are the queries' own
    tokens. prefix_BS: bool, keys that all of their segment see (Raffel et al. 2020, arXiv:1910.10683, section 3.2.1).
    branches_BT: int, 0 for the trunk of a segment, 1, 2, ... for what goes on from it without seeing each other; None where nothing
    forks. key_branches_BS: those of the keys, None where the keys are the queries' own tokens. A window counts slots, not what lies
    before a token in its branch, so the two are refused together.
    A row that sees nothing gives exactly 0 and has no gradient. A pytree in which `causal` and `window_tokens` are static.
    """

    causal: bool = False
    window_tokens: int = 0
    segments_BT: jax.Array | None = None
    key_segments_BS: jax.Array | None = None
    prefix_BS: jax.Array | None = None
    branches_BT: jax.Array | None = None
    key_branches_BS: jax.Array | None = None

    @property
    def may_be_blind(self) -> bool:
        """Whether a row may see nothing. A query sees at least itself where keys and queries are the same tokens."""
        return self.key_segments_BS is not None

    def cut(self, queries: slice, keys: slice) -> "Mask":
        """The mask of a block of queries and keys."""

        def part(array: jax.Array | None, places: slice) -> jax.Array | None:
            return None if array is None else array[:, places]

        return Mask(
            self.causal,
            self.window_tokens,
            part(self.segments_BT, queries),
            part(self.segments_of_keys, keys),
            part(self.prefix_BS, keys),
            part(self.branches_BT, queries),
            part(self.branches_of_keys, keys),
        )

    @property
    def segments_of_keys(self) -> jax.Array | None:
        """Those of the keys, wherever they stand."""
        return self.segments_BT if self.key_segments_BS is None else self.key_segments_BS

    @property
    def branches_of_keys(self) -> jax.Array | None:
        """Those of the keys, wherever they stand."""
        return self.branches_BT if self.key_branches_BS is None else self.key_branches_BS

    def visible(self, slots_T: jax.Array, slots_S: jax.Array) -> jax.Array | None:
        """bool [B, T, S] or [1, T, S]; None if everything is visible. The slots are those of the queries and of the keys."""
        seen_BTS = None
        if self.causal:
            seen_BTS = (slots_S <= slots_T[:, None])[None]
        if self.window_tokens:
            near_BTS = (slots_T[:, None] - slots_S < self.window_tokens)[None]
            seen_BTS = near_BTS if seen_BTS is None else seen_BTS & near_BTS
        if self.prefix_BS is not None and seen_BTS is not None:
            seen_BTS = seen_BTS | self.prefix_BS[:, None, :]
        if self.segments_BT is not None and self.segments_of_keys is not None:
            same_BTS = self.segments_BT[:, :, None] == self.segments_of_keys[:, None, :]
            seen_BTS = same_BTS if seen_BTS is None else seen_BTS & same_BTS
        if self.branches_BT is not None and self.branches_of_keys is not None:
            keys_B1S = self.branches_of_keys[:, None, :]
            reached_BTS = (keys_B1S == 0) | (self.branches_BT[:, :, None] == keys_B1S)
            seen_BTS = reached_BTS if seen_BTS is None else seen_BTS & reached_BTS
        return seen_BTS

    def visible_whole(self, query_tokens: int, key_tokens: int) -> jax.Array | None:
        """`visible` of all queries and keys."""
        return self.visible(jnp.arange(query_tokens) + key_tokens - query_tokens, jnp.arange(key_tokens))

    def reach(self, queries: slice, query_tokens: int, key_tokens: int) -> tuple[int, int]:
        """(start, stop) of the keys outside of which no query of the slice sees any, whatever the arrays hold."""
        offset = key_tokens - query_tokens
        if self.prefix_BS is not None:
            return 0, key_tokens
        start = max(0, queries.start + offset - self.window_tokens + 1) if self.window_tokens else 0
        return start, min(queries.stop + offset, key_tokens) if self.causal else key_tokens


def check(q_BTHK: jax.Array, k_BSGK: jax.Array, v_BSGK: jax.Array, mask: Mask, bias_XHTS: jax.Array | None) -> int:
    """Query heads a key/value head; ValueError for shapes that do not fit."""
    (batch, query_tokens, heads, width), (key_tokens, kv_heads) = q_BTHK.shape, k_BSGK.shape[1:3]
    if heads % kv_heads:
        raise ValueError(
            f"{kv_heads} key/value heads do not divide {heads} query heads.\n"
            f"  Accepted: {', '.join(str(n) for n in range(1, heads + 1) if heads % n == 0)}.\n  Change model.kv_heads."
        )
    if mask.causal and query_tokens > key_tokens:
        raise ValueError(
            f"{query_tokens} queries but {key_tokens} keys in causal attention.\n  Accepted: at least as many keys as queries."
            "\n  Pass the keys of all queries."
        )
    if mask.window_tokens < 0:
        raise ValueError(f"window_tokens = {mask.window_tokens}.\n  Accepted: 1 or more, or 0 for no window.\n  Change it.")
    if mask.key_segments_BS is not None and mask.segments_BT is None:
        raise ValueError(
            "key_segments_BS without segments_BT.\n  Accepted: both, or segments_BT alone.\n"
            "  Pass segments_BT = ones if all queries are of segment 1."
        )
    _check_branches(mask)
    keys_shape = (batch, key_tokens)
    expected = (
        ("k", k_BSGK, [(batch, key_tokens, kv_heads, width)]),
        ("v", v_BSGK, [k_BSGK.shape]),
        ("segments_BT", mask.segments_BT, [(batch, query_tokens)]),
        ("key_segments_BS", mask.segments_of_keys, [keys_shape]),
        ("prefix_BS", mask.prefix_BS, [keys_shape]),
        ("branches_BT", mask.branches_BT, [(batch, query_tokens)]),
        ("key_branches_BS", mask.branches_of_keys, [keys_shape]),
        ("bias_XHTS", bias_XHTS, [(1, heads, query_tokens, key_tokens), (batch, heads, query_tokens, key_tokens)]),
    )
    for name, array, shapes in expected:
        if array is not None and array.shape not in shapes:
            accepted = " or ".join(str(list(shape)) for shape in dict.fromkeys(shapes))
            raise ValueError(
                f"{name} has shape {list(array.shape)}; q has {list(q_BTHK.shape)} and k has {list(k_BSGK.shape)}.\n"
                f"  Accepted: {accepted}.\n  Letters: B batch, T queries, S keys, H heads, X 1 or B."
            )
    return heads // kv_heads


def _check_branches(mask: Mask) -> None:
    """ValueError for branches of which it could not be said what they see."""
    if mask.branches_BT is None and mask.key_branches_BS is None:
        return
    given = "branches_BT" if mask.key_branches_BS is None else "key_branches_BS"
    if mask.branches_BT is None or (mask.key_segments_BS is not None) > (mask.key_branches_BS is not None):
        raise ValueError(
            f"{given} without {'branches_BT' if mask.branches_BT is None else 'key_branches_BS, but with key_segments_BS'}.\n"
            "  Accepted: branches of queries and keys, or branches_BT alone where the keys are the queries' own tokens.\n"
            "  Pass zeros for keys of the trunk."
        )
    if not mask.causal or mask.window_tokens:
        what = f"window_tokens = {mask.window_tokens}" if mask.window_tokens else "attention that is not causal"
        raise ValueError(
            f"{given} with {what}.\n  Accepted: causal attention without a window, which would count what stands between a branch and its"
            " trunk.\n  Set model.window_tokens=0, or train without branches."
        )
