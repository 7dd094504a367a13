"""How much memory a training step needs on one GPU, before anything is loaded."""
