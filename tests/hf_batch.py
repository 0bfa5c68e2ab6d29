"""A batch of ours out of the arguments of a model of transformers, so that one objective gives the losses of all of them; and how
far apart the results are."""

import numpy as np

IGNORED = -100
START = 0  # what a T5 decoder reads first


def from_arguments(architecture: str, given: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """types.Batch of `given`: input_ids, attention_mask, token_type_ids, labels, decoder_input_ids as that class takes them."""
    mask = given["attention_mask"].astype(np.int32)
    labels = given.get("labels", np.full_like(mask, IGNORED))
    places = np.broadcast_to(np.arange(mask.shape[1], dtype=np.int32), mask.shape)
    batch = {"tokens": given["input_ids"], "segments": mask, "positions": places}
    if "token_type_ids" in given:
        batch["token_types"] = given["token_type_ids"]
    if architecture.endswith("ForConditionalGeneration"):
        return _with_decoder(batch, given, labels)
    if architecture.endswith("ForCausalLM") or architecture == "GPT2LMHeadModel":
        # A causal model of transformers shifts the labels itself.
        labels = np.concatenate([labels[:, 1:], np.full_like(labels[:, :1], IGNORED)], axis=1)
    elif architecture.endswith("ForSequenceClassification"):
        # The first token of an encoder's row stands for it, and the last one of a decoder's.
        place = 0 if architecture.startswith("Bert") else mask.sum(1) - 1
        row, labels = labels, np.full_like(mask, IGNORED)
        labels[np.arange(len(row)), place] = row
    return batch | _counted(labels)


def _with_decoder(batch: dict[str, np.ndarray], given: dict[str, np.ndarray], labels: np.ndarray) -> dict[str, np.ndarray]:
    valid = (labels != IGNORED).astype(np.int32)
    shifted = np.concatenate([np.full_like(labels[:, :1], START), np.maximum(labels[:, :-1], 0)], axis=1)
    decoder = {
        "tokens": given.get("decoder_input_ids", shifted),
        "segments": valid,
        "positions": np.broadcast_to(np.arange(labels.shape[1], dtype=np.int32), labels.shape),
    }
    encoder = {"inputs": batch["tokens"], "input_segments": batch["segments"], "input_positions": batch["positions"]}
    return decoder | encoder | _counted(labels)


def _counted(labels: np.ndarray) -> dict[str, np.ndarray]:
    return {"targets": np.maximum(labels, 0), "weights": (labels != IGNORED).astype(np.float32)}


def packed(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The same rows behind each other in a single one, without their padding, each a document of its own."""
    masks = {name: batch["input_segments" if name.startswith("input") else "segments"] > 0 for name in batch}
    whole = {
        name: np.concatenate([row[mask] for row, mask in zip(array, masks[name], strict=True)]) for name, array in batch.items()
    }
    for name in ("segments", "input_segments"):
        if name in whole:
            whole[name] = np.repeat(np.arange(1, len(batch[name]) + 1), masks[name].sum(1)).astype(np.int32)
    return {name: array[None] for name, array in whole.items()}


def error(batch: dict[str, np.ndarray], logits: np.ndarray, expected: np.ndarray) -> float:
    """The largest difference, over all tokens that are no padding, in parts of the largest logit."""
    if expected.ndim == 2:
        logits = logits[batch["weights"] > 0]
    else:
        logits, expected = logits[batch["segments"] > 0], expected[batch["segments"] > 0]
    return float(np.abs(logits.astype(np.float64) - expected).max() / np.abs(expected).max())


def check_gradients(found: dict[str, np.ndarray], expected: dict[str, np.ndarray], most: float) -> None:
    """Asserts that they have the same names, and that none is further from the other than `most` of its norm."""
    assert found.keys() == expected.keys()
    whole = np.sqrt(sum(np.sum(np.square(gradient)) for gradient in expected.values()))
    for name, gradient in expected.items():
        # Softmax does not see a bias of the keys, so that its gradient is 0 up to rounding.
        size = max(np.linalg.norm(gradient), 2.0**-23 * whole / most)
        assert np.linalg.norm(found[name] - gradient) <= most * size, name
