"""The PPO update: the only place where weights change during ppo."""
