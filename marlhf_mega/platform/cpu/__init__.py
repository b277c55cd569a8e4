"""What Megatron-Core needs on a machine without CUDA, and kernels that are faster on CPUs."""
