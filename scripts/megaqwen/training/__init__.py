"""Megatron's own training loop over a converted Qwen, on GPUs or emulated on a CPU."""
