"""The few shapes that everything else is made of.

A model is a pair of pure functions over a parameter tree. An objective is `loss(params, batch, rng)`.
A source yields batches as a function of the step. There is one train step, and it knows no more than this file.

Letters used in array names all over the package:
B batch, T query length, S key length, D width, H heads, G key/value heads, K head width, F mlp width, V vocabulary, L layers.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

# A nested dict of arrays (later also of leaf types such as quantized kernels). `params["layers"]` is either a list with one
# tree a layer (unrolled) or one tree whose arrays have a leading layer axis (scan); see transforms/tree.py.
Params = dict[str, Any]

# tokens, targets, segments, positions: int32 [B, T]; weights: float32 [B, T].
#   tokens     what the model reads; of an encoder-decoder, what its decoder reads.
#   segments   which document a token belongs to, counted from 1 in each row; 0 is padding. Attention stays inside a segment.
#   positions  index inside the document, from 0 at its first token in the row.
#   weights    how much the prediction of `targets` counts in the loss; 0 for padding and across document borders.
# Some objectives add:
#   inputs, input_segments, input_positions: int32 [B, S], what the encoder of an encoder-decoder reads. Decoder tokens of a
#              segment see the inputs of the same segment.
#   token_types: int32 [B, T], first (0) or second (1) text of a pair (bert).
#   prefix: bool [B, T], tokens that all tokens of their segment see, also those before them (prefix_lm).
#   branches: int32 [B, T], 0 for the trunk of a segment (a prompt without its last token), 1, 2, ... for what goes on from it: answers,
#              each beginning with the last token of the prompt. A token sees its trunk and its own branch. Positions of a branch go on
#              from the trunk's, so those of a segment do not ascend.
#   margins: float32 [B, T], by how much the chosen answer of the token's segment is better (reward).
#   pairs: int32 [B, T], where each answer of a pair is a segment of its own (reward, bert), counted as segments are.
#   reference: float32 [B, T], log-probabilities of the targets by the model that training began with (engine/references.py).
#   teacher_ids: int32 [B, T K], for each target the K tokens that a teacher finds likeliest there; teacher: float32 [B, T (K + 1)], its
#              log-probabilities of these and of all others together.
# None of these is ever derived from another one inside a model or an objective.
Batch = Mapping[str, jax.Array]

# Logical axis names of one parameter, one a dimension, e.g. ("embed", "heads", "head_dim"); see parallel/rules.py.
Axes = tuple[str, ...]
# The same of any array; None is a dimension that is not shared.
PartAxes = tuple[str | None, ...]


class Mean(NamedTuple):
    """A mean that has not been divided yet: micro-batches and devices add both parts, and only the end divides."""

    total: jax.Array
    weight: jax.Array


Metrics = dict[str, Mean]


class Objective(Protocol):
    """What is minimized. The first Mean counts: gradients of its `total` are summed and divided by the summed `weight`."""

    def __call__(self, params: Params, batch: Batch, rng: jax.Array | None, /) -> tuple[Mean, Metrics]:
        """The loss of a batch and what else is measured. The key, or None, is for dropout."""
        ...

    def of_hidden(self, hidden_BTD: jax.Array, head: "Head", batch: Batch, /) -> tuple[Mean, Metrics]:
        """The same from the hidden states as they enter the head; the last stage of a pipeline needs no more."""
        ...


class Context(NamedTuple):
    """How the rows of attention are cut, where they are: by `method` ("ring" or "ulysses") over the mesh axis `axis` in so many parts.

    zigzag: they lie in the order of data/places.py.
    """

    method: str
    axis: str
    parts: int
    zigzag: bool


class Constrain(Protocol):
    """How the arrays of a model lie on the mesh, by their logical axes. Models call it and do not know any mesh."""

    def __call__(self, array: jax.Array, axes: PartAxes, /) -> jax.Array:
        """`array`; the compiler is told how it lies."""
        ...

    def parts(self, axis: str) -> int:
        """In how many parts the mesh cuts a logical axis."""
        ...

    def gather(self, params: Any, axes: Any) -> Any:
        """Parameters with these axes as a layer takes them: whole, where a device holds a share of each."""
        ...

    def places(self, tokens: int) -> jax.Array:
        """int32 [tokens]: where in their row those of this device stand, so many as it has."""
        ...

    @property
    def context(self) -> Context | None:
        """How rows are cut here, or None."""
        ...

    def refuse(self) -> str | None:
        """Why a kernel that needs whole rows cannot be shared out here, or None."""
        ...

    def share(
        self, function: Callable[..., tuple], parts: Sequence[tuple[Any, PartAxes]], out_axes: Sequence[PartAxes], /
    ) -> tuple:
        """function(a, b, ...), a tuple of arrays with these axes, from `parts` (a, axes of a), (b, axes of b), ...

        Each device calls it on what it holds of them: for what the compiler cannot share out. A part may be a tree, or None; the axes are
        those of each array in it. A result may be None.
        """
        ...


@dataclass(frozen=True)
class Unconstrained:
    """The `Constrain` of a single device; with `reason`, of several on which the compiler alone decides how arrays lie."""

    reason: str | None = None

    def __call__(self, array: jax.Array, axes: PartAxes, /) -> jax.Array:
        del axes
        return array

    def parts(self, axis: str) -> int:
        del axis
        return 1

    def gather(self, params: Any, axes: Any) -> Any:
        del axes
        return params

    def places(self, tokens: int) -> jax.Array:
        return jnp.arange(tokens)

    @property
    def context(self) -> Context | None:
        return None

    def refuse(self) -> str | None:
        return self.reason

    def share(
        self, function: Callable[..., tuple], parts: Sequence[tuple[Any, PartAxes]], out_axes: Sequence[PartAxes], /
    ) -> tuple:
        del out_axes
        return function(*(arrays for arrays, _ in parts))


unconstrained = Unconstrained()


class Head(NamedTuple):
    """The output projection: logits = hidden kernel^T + bias. kernel [V, D] (or [classes, D]), bias [V] or None.

    value: beside it, a head of one output that says what is still to be earned behind a token (ppo); else None.
    """

    kernel: Any
    bias: Any | None
    value: "Head | None" = None


class Stack(NamedTuple):
    """One stack of equal layers and what stands around it, as pure functions: the pieces that a pipeline spreads over its stages.

    part: the name of what passes through its layers, "x", or "memory" for an encoder that a decoder reads.
    path: where the parameters of its layers are.
    enter(params, batch, rng) -> what enters the first layer, [B, T, D].
    block(params, parts, batch, rng) -> the function that runs one layer (models/stack.py); `parts` holds what earlier stacks gave.
    leave(params, x) -> what the stack gives, of what leaves its last layer.
    Each needs of `params` only what it reads; `params` need not hold layers.
    """

    part: str
    path: tuple[str, ...]
    layers: int
    enter: Callable[..., jax.Array]
    block: Callable[..., Callable]
    leave: Callable[..., jax.Array]


@dataclass(frozen=True)
class Model:
    """A language model as pure functions. `params` is the first argument of each.

    init(rng) -> params in float32, plain nested dict.
    axes: tree like params whose leaves are `Axes`.
    apply(params, tokens_BT, *, segments=None, positions=None, rng=None, ...) -> logits_BTV in float32. Without `segments` a row
        is one document; without `positions` they count from 0. `rng` switches dropout on. Further arrays of `Batch` by their
        names, for the models that read them; an encoder-decoder needs `inputs`.
    hidden: same arguments as apply -> hidden_BTD as it enters the head, in the compute dtype.
    stacks: what `hidden` runs, one stack after the other; the last one's result is the hidden state.
    head(params) -> Head (its kernel is the embedding itself when tied).
    init_cache(batch_seqs, length_tokens) -> an empty key/value cache, a tree of arrays that `decode` fills.
    encode(params, inputs_BS, lengths_B, cache) -> cache, which then also holds the keys and values of the encoder's output for
        cross-attention; None unless the model is an encoder-decoder. Row b has `lengths_B[b]` inputs, the rest is right padding.
    decode(params, tokens_BT, lengths_B, cache) -> (logits_BV of each row's last valid token in float32, cache). Appends
        the first `lengths_B` tokens of each row (the rest is right padding) behind what the row's cache holds.
    init_cache and decode are None for an encoder.
    """

    name: str
    config: Any
    axes: Any
    init: Callable[[jax.Array], Params]
    apply: Callable[..., jax.Array]
    hidden: Callable[..., jax.Array]
    stacks: tuple[Stack, ...]
    head: Callable[[Params], Head]
    init_cache: Callable[[int, int], Any] | None
    encode: Callable[..., Any] | None
    decode: Callable[..., tuple[jax.Array, Any]] | None


@dataclass(frozen=True)
class Transform:
    """What kernels whose whole path name matches `targets` become: a leaf type (transforms/leaf.py) in the place of the array.

    A kernel [layers?, inputs..., outputs...] is a matrix: its first `inputs` axes (within a layer) are summed over, the others are new. A
    table of tokens is [inputs, outputs], too, but looked up: `inputs` is 0. An output head is [outputs, inputs]: `inputs` is -1.
    apply(kernel, inputs, rng) -> the leaf for the kernel of one layer, an array or what an earlier transform made of it. Pure and
        traceable; stacked layers are mapped over.
    axes(axes, inputs) -> the same leaf type, with the logical axes of each of its arrays in the array's place; also of one layer.
    adapts: the leaf is an adapter, whose arrays are trained, but for its field `base`, what it adapts. Else it is a frozen form.
    tables: it takes whole tables of tokens and heads apart; `inputs` says nothing then.
    """

    targets: str
    apply: Callable[[Any, int, jax.Array], Any]
    axes: Callable[[Any, int], Any]
    adapts: bool = False
    tables: bool = False


class Source(Protocol):
    """Yields batches as a function of the step: no iterator, so there is no position to lose."""

    def batch(self, step: int) -> Mapping[str, Any]:
        """The global batch of this step as jax.Arrays on the mesh; each host has read only the rows of its own devices."""
        ...

    def rows(self, step: int) -> Any:
        """Indices, in the data set, of the rows that make up the global batch of this step (for error messages)."""
        ...


class Tokenizer(Protocol):
    """Text to ids and back. `decode(encode(text)) == text` for every text the tokenizer can represent."""

    vocab_size: int
    bos_id: int | None
    eos_id: int | None
    pad_id: int
    mask_id: int | None  # stands for a hidden token (masked_lm)
    sentinel_ids: tuple[int, ...]  # stand for hidden spans, the first span's first (span_corruption); may be empty

    def encode(self, text: str) -> list[int]:
        """Ids of the text alone: no bos, no eos (these are added in one place, data/pack.py)."""
        ...

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """`encode` of every text, faster."""
        ...

    def decode(self, ids: list[int]) -> str:
        """The text of any valid ids: special tokens are left out, bytes that are no whole character become U+FFFD."""
        ...

    def contents(self) -> Mapping[str, bytes]:
        """Name -> bytes of the files that `save` writes: everything that decides the ids of a text."""
        ...

    def save(self, directory: str) -> None:
        """Writes files from which `data.tokenize.load(directory)` makes an equal tokenizer."""
        ...
