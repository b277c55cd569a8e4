"""What transformers says to fixed token ids: FOLDER QUESTIONS.json OUT.safetensors.

Runs in a process of its own, without Megatron. QUESTIONS is `{"rows": [[id, ...], ...],
"new_tokens": n}`. OUT holds, in float32, `logits.I` [tokens, vocab] and `generated.I` [n] for every
row I of a language model, or `score.I` [1] of a reward model.
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, GenerationConfig


def language(folder: Path, rows: list[list[int]], new_tokens: int) -> dict[str, Tensor]:
    """Return logits and greedy continuations."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model.generation_config = GenerationConfig(do_sample=False)
    answers = {}
    for number, row in enumerate(rows):
        ids = torch.tensor([row])
        answers[f"logits.{number}"] = model(ids).logits[0]
        # Without a mask transformers would take ids equal to the padding id for padding.
        made = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, pad_token_id=0
        )
        answers[f"generated.{number}"] = made[0, len(row) :]
    return answers


def reward(folder: Path, rows: list[list[int]]) -> dict[str, Tensor]:
    """Return scores."""
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    return {f"score.{n}": model(torch.tensor([row])).logits[0] for n, row in enumerate(rows)}


def main() -> None:
    """Answer all questions."""
    folder, questions, out = (
        Path(sys.argv[1]),
        json.loads(Path(sys.argv[2]).read_text()),
        sys.argv[3],
    )
    architecture = json.loads((folder / "config.json").read_text())["architectures"][0]
    with torch.no_grad():
        if architecture.endswith("ForSequenceClassification"):
            answers = reward(folder, questions["rows"])
        else:
            answers = language(folder, questions["rows"], questions["new_tokens"])
    save_file({name: tensor.contiguous() for name, tensor in answers.items()}, out)


if __name__ == "__main__":
    main()
