"""A random Llama by transformers, and what it says: `python hf_llama.py FOLDER`, on the CPU.

Saved in bfloat16, so that both formats start from the same weights. Prints the log-probs of the
response tokens in float32 and in bfloat16.
"""

import json
import sys
from pathlib import Path

import torch
import transformers


def logprobs(folder, dtype, prompts, responses):
    # Loaded afresh: casting a model would round its rotary frequencies too.
    model = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    rows = []
    for prompt, response in zip(prompts, responses, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + response])).logits[0].float()
        scores = logits.log_softmax(-1)[len(prompt) - 1 : -1]
        rows.append(scores.gather(1, torch.tensor(response)[:, None])[:, 0].tolist())
    return rows


def main():
    folder = Path(sys.argv[1])
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=128,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
        initializer_range=0.1,
    )
    transformers.LlamaForCausalLM(config).bfloat16().save_pretrained(folder)
    generator = torch.Generator().manual_seed(1)
    prompts, responses = (
        [torch.randint(128, (n,), generator=generator).tolist() for n in lengths]
        for lengths in ((20, 7, 33), (40, 21, 5))
    )
    (folder / "sequences.json").write_text(json.dumps([prompts, responses]))
    answers = {
        name: logprobs(folder, getattr(torch, name), prompts, responses)
        for name in ("float32", "bfloat16")
    }
    print(json.dumps(answers))


if __name__ == "__main__":
    main()
