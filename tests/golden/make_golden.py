"""Writes the golden files beside it: what transformers computes for tiny models of every family and switch (cases.py).

    python tests/golden/make_golden.py [CASE ...]

needs torch and transformers, which the tests that read the files do not. A directory holds

    config.json, generation_config.json, model.safetensors   as transformers writes them; weights are random
    config_*.json          the same model as other versions write it
    expected.safetensors   input/*: the arguments of the model; logits, or hidden and pooled where there is no head;
                           loss and gradient/NAME for every tensor NAME of model.safetensors
    generation.json        prompts, and what greedy and beam search continue them with

and versions.json what they were made with. `transformer/` is made of torch.nn layers and has the parameter names of jaxllm.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch_layers
import transformers
from cases import CASES, VOCAB, Case
from safetensors import safe_open
from safetensors.torch import save_file

HERE = Path(__file__).resolve().parent
PAD, IGNORED = 0, -100
BEAMS = [{"num_beams": 4, "length_penalty": penalty, "early_stopping": early} for penalty in (1.0, 0.6) for early in (True, False)]
NEW_TOKENS = 12
SIZES = {"vocab": VOCAB, "width": 12, "heads": 3, "mlp": 20, "layers": 2}  # of transformer/


def fill(model: torch.nn.Module, generator: torch.Generator) -> None:
    """Weights that all matter: scales around 1, biases around 0, activations that neither vanish nor saturate."""
    for name, weight in model.named_parameters():
        noise = torch.randn(weight.shape, generator=generator)
        if weight.ndim == 1:
            scale = "bias" not in name and ("norm" in name.lower() or "ln_" in name)
            value = 1 + 0.3 * noise if scale else 0.3 * noise
        elif any(part in name for part in ("embed", "wte", "wpe", "shared", "relative")):
            value = noise
        else:
            inputs = weight.shape[0] if "c_" in name else weight.shape[1]  # GPT-2 stores [in, out]
            value = 1.3 * noise / inputs**0.5
            if ".q.weight" in name:  # T5 does not divide scores by the root of the head width
                value = value / model.config.d_kv**0.5
        weight.data = value


def make_model(case: Case, noise: float = 0.0) -> Any:
    """The model of a case in eval mode; `noise` is added to its weights, in parts of themselves."""
    model = getattr(transformers, case.model)(case.make_config()).eval()
    if case.config.get("tie_word_embeddings") is False:
        # transformers 5 ties whatever the config says, but loads a file with two tensors untied.
        model.lm_head.weight = torch.nn.Parameter(torch.empty_like(model.lm_head.weight))
    generator = torch.Generator().manual_seed(case.seed)
    fill(model, generator)
    for weight in model.parameters():
        weight.data *= 1 + noise * torch.randn(weight.shape, generator=generator)
    return model


def draw(lengths: tuple[int, ...], generator: torch.Generator, vocab: int = VOCAB) -> tuple[torch.Tensor, torch.Tensor]:
    """(tokens, mask) of rows with these lengths, padded on the right."""
    tokens = torch.randint(3, vocab, (len(lengths), max(lengths)), generator=generator)
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    return torch.where(mask == 1, tokens, PAD), mask


def make_inputs(case: Case) -> dict[str, torch.Tensor]:
    """The arguments of the model, with labels where it takes any."""
    generator = torch.Generator().manual_seed(case.seed + 1000)
    vocab = case.fields["vocab_size"]
    tokens, mask = draw(case.tokens, generator, vocab)
    inputs = {"input_ids": tokens, "attention_mask": mask}
    if case.model.endswith("ForConditionalGeneration"):
        labels, valid = draw(case.target_tokens, generator, vocab)
        return inputs | {"labels": torch.where(valid == 1, labels, IGNORED)}
    if case.model.startswith("Bert"):
        types = (torch.arange(tokens.shape[1]) >= mask.sum(1, keepdim=True) // 2).long() * mask
        inputs["token_type_ids"] = types
    if case.model.endswith("ForSequenceClassification"):
        inputs["labels"] = torch.randint(0, case.fields["num_labels"], (len(tokens),), generator=generator)
    elif case.model.endswith("ForTokenClassification"):
        inputs["labels"] = torch.randint(0, case.fields["num_labels"], tokens.shape, generator=generator)
    elif case.model == "BertForMaskedLM":
        inputs["labels"] = torch.randint(3, vocab, tokens.shape, generator=generator)
    elif case.model != "BertModel":
        inputs["labels"] = tokens.clone()
    if inputs.get("labels", tokens[0, 0]).ndim == 2:
        # Besides padding, some targets do not count.
        left_out = torch.rand(tokens.shape, generator=generator) < 0.3
        inputs["labels"] = torch.where((mask == 1) & ~left_out, inputs["labels"], IGNORED)
    return inputs


def expect(model: Any, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What the model makes of its inputs, and the gradients of its loss."""
    out = model(**inputs)
    if "labels" not in inputs:
        return {"hidden": out.last_hidden_state.detach(), "pooled": out.pooler_output.detach()}
    out.loss.backward()
    gradients = {f"gradient/{name}": weight.grad for name, weight in model.named_parameters()}
    return {"logits": out.logits.detach(), "loss": out.loss.detach(), **gradients}


def generate(case: Case, model: Any, prompts: list[torch.Tensor]) -> list[dict[str, Any]]:
    """Each search's continuation of each prompt: new tokens up to and with the end-of-sequence one, and its score."""
    results = []
    for setting in [{"num_beams": 1}, *BEAMS]:
        found: dict[str, list[Any]] = {"tokens": [], "scores": []}
        for prompt in prompts:
            out = model.generate(
                prompt[None],
                attention_mask=torch.ones_like(prompt)[None],
                **setting,
                max_new_tokens=NEW_TOKENS,
                do_sample=False,
                pad_token_id=PAD,
                return_dict_in_generate=True,
                output_scores=True,
            )
            # A decoder repeats the prompt, an encoder-decoder its start token.
            row = out.sequences[0, 1 if model.config.is_encoder_decoder else len(prompt) :].tolist()
            end = row.index(model.config.eos_token_id) + 1 if model.config.eos_token_id in row else len(row)
            found["tokens"].append(row[:end])
            if setting["num_beams"] > 1:
                found["scores"].append(round(out.sequences_scores[0].item(), 6))
        results.append({**setting, **found})
    return results


def write_generation(case: Case, model: Any, directory: Path) -> None:
    """generation.json; RuntimeError if small changes of the weights change a token, since then rounding would, too."""
    generator = torch.Generator().manual_seed(case.seed + 2000)
    prompts = [draw((length,), generator)[0][0] for length in case.prompt_tokens]
    results = generate(case, model, prompts)
    for _ in range(2):
        again = generate(case, make_model(case, noise=1e-4), prompts)
        if [result["tokens"] for result in again] != [result["tokens"] for result in results]:
            raise RuntimeError(f"{directory.name}: a search is not decided clearly; change the case's seed.")
    content = {"prompts": [prompt.tolist() for prompt in prompts], "new_tokens": NEW_TOKENS, "searches": results}
    (directory / "generation.json").write_text(json.dumps(content, indent=1) + "\n")


def write_config(case: Case, directory: Path) -> None:
    """config.json as the case wants it, and as transformers 4 wrote rotary positions and the dtype."""
    path = directory / "config.json"
    config = json.loads(path.read_text())
    if case.config:
        (directory / "config_v5.json").write_text(json.dumps(config, indent=2) + "\n")
        config.pop("scale_decoder_outputs")
        path.write_text(json.dumps(config | case.config, indent=2) + "\n")
    elif "rope_parameters" in config and directory.name != "qwen2":
        scaling = dict(config.pop("rope_parameters"))
        theta, kind = scaling.pop("rope_theta"), scaling.pop("rope_type")
        # The oldest files call it "type".
        scaling[{"linear": "type", "dynamic": "type"}.get(kind, "rope_type")] = kind
        config["torch_dtype"] = config.pop("dtype")
        config |= {"rope_theta": theta, "rope_scaling": None if kind == "default" else scaling, "transformers_version": "4.46.0"}
        (directory / "config_v4.json").write_text(json.dumps(config, indent=2) + "\n")


def check(case: Case, directory: Path, expected: dict[str, torch.Tensor], inputs: dict[str, torch.Tensor]) -> None:
    """RuntimeError unless transformers reads from the directory what was written, under each of its configs."""
    cls = getattr(transformers, case.model)
    for path in sorted(directory.glob("config*.json")):
        config = cls.config_class.from_pretrained(directory, _configuration_file=path.name, attn_implementation="eager")
        model, info = cls.from_pretrained(directory, config=config, output_loading_info=True)
        output = model.eval()(**inputs)
        main = output.logits if "logits" in expected else output.last_hidden_state
        gap = (main - expected.get("logits", expected.get("hidden"))).abs().max()
        if gap > 0 or info["missing_keys"] or info["unexpected_keys"]:
            raise RuntimeError(f"{path}: read back with a difference of {gap}, {info}.")


def write(name: str, case: Case) -> None:
    """The directory of one case."""
    directory = HERE / name
    model = make_model(case)
    model.save_pretrained(directory)
    write_config(case, directory)
    inputs = make_inputs(case)
    expected = expect(model, inputs)
    check(case, directory, expected, inputs)
    with safe_open(directory / "model.safetensors", "pt") as file:
        if "loss" in expected and {f"gradient/{key}" for key in file.keys()} - expected.keys():  # noqa: SIM118
            raise RuntimeError(f"{name}: a stored tensor has no gradient.")
    save(directory, inputs, expected)
    if case.prompt_tokens:
        write_generation(case, model, directory)


def save(directory: Path, inputs: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    given = {f"input/{name}": value.to(torch.int32) for name, value in inputs.items()}
    save_file({name: value.contiguous() for name, value in {**given, **expected}.items()}, directory / "expected.safetensors")


def write_transformer() -> None:
    """`transformer/`: the layers of torch.nn; the loss has the label smoothing of the paper."""
    directory = HERE / "transformer"
    directory.mkdir(exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    model = torch_layers.Transformer(**SIZES)
    fill(model, generator)
    inputs, mask = draw((10, 7), generator)
    labels, valid = draw((9, 6), generator)
    tokens = torch.cat([torch.ones(2, 1, dtype=torch.long), labels[:, :-1]], 1) * valid
    labels = torch.where(valid == 1, labels, IGNORED)
    logits, loss = model(inputs, mask, tokens, labels)
    loss.backward()
    weights = torch_layers.rename({name: weight.detach() for name, weight in model.named_parameters()}, SIZES["heads"])
    gradients = torch_layers.rename({name: weight.grad for name, weight in model.named_parameters()}, SIZES["heads"])
    save_file({name: value.contiguous() for name, value in weights.items()}, directory / "model.safetensors")
    given = {"input_ids": inputs, "attention_mask": mask, "decoder_input_ids": tokens, "labels": labels}
    renamed = {f"gradient/{name}": value for name, value in gradients.items()}
    save(directory, given, {"logits": logits.detach(), "loss": loss.detach(), **renamed})


def main(names: list[str]) -> None:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    unknown = set(names) - {*CASES, "transformer"}
    if unknown:
        raise SystemExit(f"no case {sorted(unknown)}; there are {', '.join(CASES)}, transformer")
    for name in names or [*CASES, "transformer"]:
        write_transformer() if name == "transformer" else write(name, CASES[name])
        size = sum(file.stat().st_size for file in (HERE / name).iterdir())
        print(f"{name}: {size:,} bytes")
    versions = {"python": sys.version.split()[0], "torch": torch.__version__, "transformers": transformers.__version__}
    (HERE / "versions.json").write_text(json.dumps(versions, indent=2) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
