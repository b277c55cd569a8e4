"""What a forked rank has imported already. Ranks of tests compute on the CPU, on one thread."""

import os

os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}

import torch._dynamo  # noqa: F401  by the first optimizer

import marlhf_mega.commands.evaluate
import marlhf_mega.train.ppo
import marlhf_mega.train.reward
import marlhf_mega.train.sft  # noqa: F401
