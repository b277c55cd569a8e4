"""What a forked rank has imported already. Ranks of tests compute on the CPU, on one thread."""

import gc
import os

os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}

import torch._dynamo  # noqa: F401  by an optimizer of torch's own

# By the tokenizers of jobs, and by the check of an export, which AutoTokenizer reads.
import transformers.tokenization_python
import transformers.utils.type_validators  # noqa: F401
from transformers import AutoTokenizer, PreTrainedTokenizerFast  # noqa: F401

import marlhf_mega.commands.evaluate
import marlhf_mega.train.offline
import marlhf_mega.train.ppo
import marlhf_mega.train.preference
import marlhf_mega.train.reward
import marlhf_mega.train.sft  # noqa: F401

# A collection would write to the pages of all these modules, and so copy them in every rank.
gc.collect()
gc.freeze()
