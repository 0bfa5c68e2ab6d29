"""Writes the adapters under peft/: what PEFT writes for the models beside this file (make_golden.py), and the logits that it then gives.

    python tests/golden/make_peft.py [CASE ...]

needs torch, transformers and peft, from the root of the repository. A directory holds

    adapter_config.json, adapter_model.safetensors   as PEFT writes them; the numbers are random, also those of B
    expected.safetensors                             logits, for the input/* of the base's own expected.safetensors

and versions.json what they were made with.
"""

import json
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from safetensors.torch import load_file, save_file

GOLDEN = Path("tests/golden")
TIED = ["transformer.wte", "lm_head"]


@dataclass(frozen=True)
class Case:
    """An adapter of the golden model `base`; options of LoraConfig. converted: begun as PiSSA, and converted to plain LoRA."""

    base: str
    options: dict[str, Any] = field(default_factory=dict)
    converted: bool = False
    tied: bool = False  # copies of an embedding stay equal


CASES = {
    "gpt2_lora": Case("gpt2", {"target_modules": ["c_attn"], "task_type": "CAUSAL_LM"}),
    "gpt2_dora": Case("gpt2", {"target_modules": ["c_attn", "mlp.c_proj"], "use_dora": True}),
    "gpt2_whole": Case("gpt2", {"target_modules": ["c_fc"], "modules_to_save": [*TIED, "ln_f"]}, tied=True),
    "gpt2_apart": Case("gpt2", {"target_modules": ["c_attn"], "modules_to_save": TIED}),
    "gpt2_head": Case("gpt2", {"target_modules": ["c_attn"], "modules_to_save": ["lm_head"]}),
    "gpt2_pissa": Case("gpt2", {"target_modules": ["c_attn"]}, converted=True),
    "gpt2_tied": Case("gpt2", {"target_modules": ["c_fc"], "modules_to_save": ["lm_head"], "ensure_weight_tying": True}),
    # PEFT ties what is named as in LLaMA.
    "gpt2_ensured": Case("gpt2", {"target_modules": ["c_fc"], "modules_to_save": ["wte"], "ensure_weight_tying": True}),
    "qwen2_tied": Case("qwen2", {"target_modules": ["up_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}),
    "llama_lora": Case("llama", {"target_modules": ["q_proj", "v_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}),
    "llama_rslora": Case(
        "llama", {"target_modules": "all-linear", "use_rslora": True, "rank_pattern": {"mlp.up_proj": 3, "[kv]_proj": 1}}
    ),
    "llama_dora": Case(
        "llama", {"target_modules": r".*\.(o|down)_proj", "use_dora": True, "alpha_pattern": {"o_proj": 3}, "lora_dropout": 0.1}
    ),
    "llama_pissa": Case("llama", {"target_modules": ["gate_proj", "k_proj"]}, converted=True),
    "bert_mlm_lora": Case("bert_mlm", {"target_modules": ["query", "value", "transform.dense"]}),
    "bert_sequence_dora": Case("bert_sequence", {"target_modules": ["dense"], "use_dora": True, "task_type": "SEQ_CLS"}),
    "bert_token_rslora": Case("bert_token", {"target_modules": ["key"], "use_rslora": True, "task_type": "TOKEN_CLS"}),
    "bert_base_lora": Case("bert_base", {"target_modules": ["output.dense"], "exclude_modules": ["attention.output.dense"]}),
    "t5_lora": Case("t5", {"target_modules": ["q", "v"], "task_type": "SEQ_2_SEQ_LM"}),
    "t5_dora": Case("t5", {"target_modules": r"decoder\..*EncDecAttention\.[ko]", "use_dora": True}),
    "t5_v1_1_rslora": Case("t5_v1_1", {"target_modules": ["wi_1", "wo"], "use_rslora": True, "modules_to_save": ["lm_head"]}),
    # Tables and heads; the names of the first three make PEFT store the base's own tables as well.
    "llama_tables": Case("llama", {"target_modules": ["embed_tokens", "lm_head", "q_proj"]}),
    "llama_tables_dora": Case("llama", {"target_modules": ["embed_tokens", "lm_head"], "use_dora": True, "lora_dropout": 0.1}),
    "qwen2_follows": Case("qwen2", {"target_modules": ["embed_tokens", "up_proj"], "ensure_weight_tying": True}),
    "gpt2_look_up": Case("gpt2", {"target_modules": ["wte", "c_fc"]}),
    "bert_base_look_up": Case("bert_base", {"target_modules": ["word_embeddings"], "use_dora": True}),
    # Rows of single tokens.
    "qwen2_tokens": Case("qwen2", {"target_modules": ["q_proj"], "trainable_token_indices": [7, 2]}),
    "llama_tokens": Case(
        "llama", {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [1, 5], "lm_head": [3]}}
    ),
}


def draw(model: Any, generator: torch.Generator, case: Case) -> None:
    """Numbers for what is trained; with PiSSA in addition to what it began with."""
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            # Small: with large factors attention is so sharp that rounding is seen.
            noise = 0.15 * torch.randn(weight.shape, generator=generator)
            kept = case.converted or not (".lora_A." in name or ".lora_B." in name or ".lora_embedding_" in name)
            # In place: what is tied to it stays so.
            weight.data.copy_((weight.data if kept else torch.zeros_like(weight)) + noise)
    if case.tied:
        first = model.get_input_embeddings().modules_to_save.default.weight
        for module in model.modules():
            for copy in getattr(module, "modules_to_save", {}).values() if "ModulesToSave" in type(module).__name__ else ():
                if copy.weight.shape == first.shape:
                    copy.weight.data = first.data.clone()


def write(case: Case, base: Path, directory: Path, seed: int) -> None:
    """The adapter of a model in the directory `base`."""
    architecture = json.loads((base / "config.json").read_text())["architectures"][0]
    model = getattr(transformers, architecture).from_pretrained(base, attn_implementation="eager").eval()
    options = {"r": 2, "lora_alpha": 5, **case.options}
    options |= {"init_lora_weights": "pissa"} if case.converted else {}
    torch.manual_seed(seed)
    adapted = peft.get_peft_model(model, peft.LoraConfig(**options))
    generator = torch.Generator().manual_seed(seed)
    if not case.converted:
        draw(adapted, generator, case)
        adapted.save_pretrained(directory)
        return
    with tempfile.TemporaryDirectory() as begun:
        adapted.peft_config["default"].init_lora_weights = True
        adapted.save_pretrained(begun)
        draw(adapted, generator, case)
        adapted.peft_config["default"].init_lora_weights = "pissa"
        adapted.save_pretrained(directory, path_initial_model_for_weight_conversion=begun)


def expect(base: Path, directory: Path, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """What the base with the adapter makes of its inputs, both read from their files."""
    architecture = json.loads((base / "config.json").read_text())["architectures"][0]
    model = getattr(transformers, architecture).from_pretrained(base, attn_implementation="eager")
    with torch.no_grad():
        out = peft.PeftModel.from_pretrained(model, directory).eval()(**inputs)
    return out.logits if "logits" in out else out.last_hidden_state


def main(names: list[str]) -> None:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    for seed, name in enumerate(CASES):
        if names and name not in names:
            continue
        base, directory = GOLDEN / CASES[name].base, GOLDEN / "peft" / name
        write(CASES[name], base, directory, seed)
        (directory / "README.md").unlink(missing_ok=True)
        given = load_file(base / "expected.safetensors")
        inputs = {key.removeprefix("input/"): value.long() for key, value in given.items() if key.startswith("input/")}
        save_file({"logits": expect(base, directory, inputs).contiguous()}, directory / "expected.safetensors")
        print(f"{name}: {sum(file.stat().st_size for file in directory.iterdir()):,} bytes")
    versions = {package.__name__: package.__version__ for package in (torch, transformers, peft)}
    (GOLDEN / "peft" / "versions.json").write_text(json.dumps(versions, indent=2) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
