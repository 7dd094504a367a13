"""The laptop world: a generated picture world, its questions, and the tiny LLaVA pretrained on it."""
