"""Answers of transformers to fixed token ids; `convert_hf.py verify` compares ours with them.

    python tools/hf_reference.py HF_DIR QUESTIONS.json OUT.safetensors

Runs in a process without Megatron. QUESTIONS is `{"sequences": [[id, ...], ...], "new_tokens": n}`.
For each sequence I, OUT holds `logits.I` float32 [tokens, vocab] and `generated.I` [n] of a
language model, or `score.I` float32 [1] of a reward model.
"""

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, GenerationConfig


def language(folder: Path, sequences: list[list[int]], new_tokens: int) -> dict[str, Tensor]:
    """Return logits and greedy continuations."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model.generation_config = GenerationConfig(do_sample=False)
    answers = {}
    for number, sequence in enumerate(sequences):
        ids = torch.tensor([sequence])
        answers[f"logits.{number}"] = model(ids).logits[0]
        # Without a mask, transformers takes every padding id for padding.
        made = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, pad_token_id=0
        )
        answers[f"generated.{number}"] = made[0, len(sequence) :]
    return answers


def reward(folder: Path, sequences: list[list[int]]) -> dict[str, Tensor]:
    """Return scores."""
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    return {f"score.{n}": model(torch.tensor([ids])).logits[0] for n, ids in enumerate(sequences)}


def main() -> None:
    """Answer all questions."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="Hugging Face folder")
    parser.add_argument("questions", type=Path, help="JSON file")
    parser.add_argument("out", type=Path, help="safetensors file to write")
    options = parser.parse_args()
    folder, questions = options.folder, json.loads(options.questions.read_text())
    architecture = json.loads((folder / "config.json").read_text())["architectures"][0]
    with torch.no_grad():
        if architecture.endswith("ForSequenceClassification"):
            answers = reward(folder, questions["sequences"])
        else:
            answers = language(folder, questions["sequences"], questions["new_tokens"])
    save_file({name: tensor.contiguous() for name, tensor in answers.items()}, options.out)


if __name__ == "__main__":
    main()
