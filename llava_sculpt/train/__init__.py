"""Training: the entry point for python, torchrun and deepspeed, the two trainers, the callback, runs on disk."""
