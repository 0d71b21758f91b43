"""The proof at each crossing: a Hugging Face model and a Megatron checkpoint are the same model."""
