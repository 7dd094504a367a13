"""LoRASculpt (CVPR 2025) for LLaVA-1.5: fine-tuning that keeps what the model already knew."""

from typing import Any

__version__ = "0.2.0"
__all__ = ["SculptCallback", "SculptConfig", "SculptMixin", "load"]

_HOMES = {
    "SculptCallback": "train.callback",
    "SculptConfig": "config",
    "SculptMixin": "train.mixin",
    "load": "evaluation.ask",
}


def __getattr__(name: str) -> Any:
    """What other programs use, imported at first use: the command line should not wait for torch."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
