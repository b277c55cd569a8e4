"""transformers' answers for every model folder, in a process without Megatron: FOLDER OUT."""

import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

PROMPTS = [[5, 9, 20, 33], [8, 44, 3], [60, 2, 17, 29, 50, 11]]
RESPONSES = [[7, 30, 12, 55, 41, 6, 9, 10, 3], [61, 4], [22, 35, 48, 19, 2]]
NEW_TOKENS = 8


def language(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    logprobs, greedy = [], []
    for prompt, response in zip(PROMPTS, RESPONSES, strict=True):
        ids = torch.tensor([prompt + response])
        with torch.no_grad():
            table = model(ids).logits[0].double().log_softmax(-1)
        places = range(len(prompt) - 1, len(prompt) + len(response) - 1)
        logprobs.append([table[p, t].item() for p, t in zip(places, response, strict=True)])
        ids = list(prompt)
        for _ in range(NEW_TOKENS):  # without a cache: the plainest oracle there is
            with torch.no_grad():
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        greedy.append(ids[len(prompt) :])
    return {"logprobs": logprobs, "greedy": greedy}


def scalar(folder):
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    pairs = zip(PROMPTS, RESPONSES, strict=True)
    with torch.no_grad():
        return {"scores": [model(torch.tensor([p + r])).logits[0, 0].item() for p, r in pairs]}


def main():
    answers = {
        path.name: scalar(path) if path.name.endswith("_reward") else language(path)
        for path in sorted(Path(sys.argv[1]).iterdir())
    }
    Path(sys.argv[2]).write_text(json.dumps(answers))


if __name__ == "__main__":
    main()
