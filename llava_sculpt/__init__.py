"""LoRASculpt (CVPR 2025) for LLaVA-1.5: fine-tuning that keeps what the model already knew."""

__version__ = "0.1.0"
