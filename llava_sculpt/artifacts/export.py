"""`llava-sculpt export`: an adapter folder to a small file and back."""

from __future__ import annotations

from pathlib import Path

from llava_sculpt.artifacts.delta import export_delta
from llava_sculpt.artifacts.merge import DTYPES
from llava_sculpt.artifacts.sparse import export_sparse, import_sparse
from llava_sculpt.errors import UserError


def run_export(source: Path, kind: str, out: Path, base: str | None, dtype: str | None) -> str:
    """Export to `kind` (sparse, delta, dense) and say what came of it.

    Raises:
        UserError: an option that the kind does not have, or what the export says.
    """
    if kind == "dense":
        if base or dtype:
            raise UserError("--base, --dtype: not for --format dense, which gives back what the file holds")
        import_sparse(source, out)
        return f"{out}: the adapter folder, bit for bit what was exported"
    target = None if dtype is None else DTYPES[dtype]
    if kind == "delta":
        counts = export_delta(source, out, base, target)
        return (
            f"{out}: {out.stat().st_size:,} bytes, {counts['support'] / counts['entries']:.2%} of the adapted weights"
        )
    if base:
        raise UserError("--base: only for --format delta")
    sizes = export_sparse(source, out, target)
    told = f"{out}: LoRA {sizes['lora']:,} bytes, {sizes['dense_bf16'] / sizes['lora']:.2f}x smaller than dense bf16"
    return told + (f"; connector {sizes['connector']:,} bytes, whole" if sizes["connector"] else "")
