"""Pure tensor maths of macro-action PPO: no Megatron, no process groups, no config."""
