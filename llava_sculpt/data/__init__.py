"""Data: LLaVA training JSON to token ids, labels, pixels and batches."""
