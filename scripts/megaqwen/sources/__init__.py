"""Where a model comes from: made on the spot, the Hugging Face Hub, or a directory on disk."""
