"""Adapters by peft, in processes without Megatron: `make FOLDER` and then `check FOLDER OUT`."""

import json
import sys
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from tests.distributed.hf_reference import PROMPTS, RESPONSES
from tests.unit.checkpoint.hf import make_hf

MODELS = {
    "llama31": {"target_modules": "all-linear", "lora_alpha": 5},
    "llama32": {"target_modules": ["o_proj", "gate_proj"], "lora_alpha": 6},
    "qwen2": {"target_modules": ["q_proj", "v_proj"], "lora_alpha": 16},
    "qwen3_tied": {"target_modules": ["k_proj", "up_proj", "down_proj"], "lora_alpha": 4},
    # One group of keys and values: fewer than tensor-parallel ranks.
    "gemma": {"target_modules": "all-linear", "lora_alpha": 6},
    "gemma2": {"target_modules": "all-linear", "lora_alpha": 3, "use_rslora": True},
    "gemma2_reward": {"target_modules": "all-linear", "lora_alpha": 6},
}
RANK = 3


def is_reward(name):
    return name.endswith("_reward")


def base_of(folder, name):
    kind = AutoModelForSequenceClassification if is_reward(name) else AutoModelForCausalLM
    return kind.from_pretrained(folder / name / "base", dtype=torch.float32)


def outputs(model, name):
    """Log-probs of the responses, or scores."""
    found = []
    for prompt, response in zip(PROMPTS, RESPONSES, strict=True):
        logits = model(torch.tensor([prompt + response])).logits
        if is_reward(name):
            found.append(logits[0])
            continue
        places = torch.arange(len(prompt) - 1, len(prompt) + len(response) - 1)
        table = logits[0].log_softmax(-1)
        found.append(table[places, torch.tensor(response)])
    return found


def make(folder):
    for name, options in MODELS.items():
        prefix, shape = make_hf.MODELS[name.removesuffix("_reward")]
        scalar = is_reward(name)
        make_hf.make(folder / name / "base", prefix, shape, scalar=scalar)
        torch.manual_seed(7)
        task = "SEQ_CLS" if scalar else "CAUSAL_LM"
        model = get_peft_model(
            base_of(folder, name),
            LoraConfig(r=RANK, lora_dropout=0.0, task_type=task, **options),
        ).eval()
        for key, parameter in model.named_parameters():
            if "lora_B" in key:  # peft's are zero
                torch.nn.init.normal_(parameter, std=0.1)
        model.save_pretrained(folder / name / "adapter")
        rows = outputs(model, name)
        flat = torch.cat(rows)
        loss = -flat.mean()
        loss.backward()
        gradients = {
            key.replace(".default", "").replace(".modules_to_save", ""): p.grad
            for key, p in model.named_parameters()
            if p.grad is not None and "original_module" not in key
        }
        save_file(gradients, folder / name / "gradients.safetensors")
        expected = {"outputs": [row.tolist() for row in rows], "loss": loss.item()}
        (folder / name / "expected.json").write_text(json.dumps(expected))


def check(folder, out):
    """Load what one rank exported."""
    found = {}
    for name in MODELS:
        export = folder / name / "exports" / "TP1"
        base = base_of(folder, name)
        with torch.no_grad():
            merged = type(base).from_pretrained(export / "hf", dtype=torch.float32).eval()
            adapted = PeftModel.from_pretrained(base, export / "hf_peft").eval()
            found[name] = {
                "merged": [row.tolist() for row in outputs(merged, name)],
                "adapter": [row.tolist() for row in outputs(adapted, name)],
            }
    out.write_text(json.dumps(found))


if __name__ == "__main__":
    if sys.argv[1] == "make":
        make(Path(sys.argv[2]))
    else:
        check(Path(sys.argv[2]), Path(sys.argv[3]))
