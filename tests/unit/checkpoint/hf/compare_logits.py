"""Largest difference of outputs between two folders, per name: `compare_logits.py A B` as JSON."""

import json
import sys
from pathlib import Path

import torch
import transformers


def outputs(folder):
    config = transformers.AutoConfig.from_pretrained(folder)
    model = getattr(transformers, config.architectures[0])
    loaded, info = model.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(info.values()), (folder, info)
    tokens = torch.arange(1, 49).view(2, 24) * 7 % 66 + 1
    with torch.no_grad():
        return loaded.eval()(tokens).logits


def main():
    transformers.utils.logging.set_verbosity_error()
    left, right = map(Path, sys.argv[1:])
    differences = {
        folder.name: (outputs(left / folder.name) - outputs(folder)).abs().max().item()
        for folder in sorted(right.iterdir())
    }
    print(json.dumps(differences))


if __name__ == "__main__":
    main()
