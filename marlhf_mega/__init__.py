"""Macro-action RLHF on Megatron-Core: SFT, reward model and PPO, from one CPU to many GPU nodes."""
