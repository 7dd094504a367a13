"""LLaVA-1.5 as a Hugging Face model: loading, LoRA injection, connector modes, adapters on disk."""
