"""What is inside an adapter: density of A, B and BA of every module beside Theorem 3.1, and the zeros off the mask."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llava_sculpt.model.adapter import read_adapter
from llava_sculpt.sculpt import density, expected_density, product_density


def inspect_adapter(folder: Path) -> dict[str, Any]:
    """Measure an adapter folder on the CPU, one module at a time.

    Returns:
        `modules`: per adapted module `name`, `shape` (p, q), `rank`, `density_A`, `density_B`, `density_BA`,
        `expected_BA` (Theorem 3.1 at the measured densities); `total`: the same over all modules, weighted by size;
        `off_mask_nonzero`: entries that should be 0 and are not (None without a mask file).

    Raises:
        UserError: as `read_adapter`.
    """
    saved = read_adapter(folder)
    modules = []
    for name in sorted(saved.layers, key=_natural):
        lora_A, lora_B = saved.layers[name].lora_A, saved.layers[name].lora_B
        rank, columns = lora_A.shape
        modules.append(
            {
                "name": name,
                "shape": [lora_B.shape[0], columns],
                "rank": rank,
                "density_A": density(lora_A),
                "density_B": density(lora_B),
                "density_BA": product_density(lora_B, lora_A),
                "expected_BA": expected_density(density(lora_B), density(lora_A), rank),
            }
        )
    off_mask = None
    if saved.masks:
        off_mask = sum(int(saved.tensors[k].masked_select(~m).count_nonzero()) for k, m in saved.masks.items())
    return {"adapter": str(folder), "modules": modules, "total": _total(modules), "off_mask_nonzero": off_mask}


def _total(modules: list[dict[str, Any]]) -> dict[str, float]:
    def mean(key: str, sizes: list[int]) -> float:
        return sum(m[key] * size for m, size in zip(modules, sizes, strict=True)) / sum(sizes)

    size_A = [m["rank"] * m["shape"][1] for m in modules]
    size_B = [m["rank"] * m["shape"][0] for m in modules]
    size_W = [m["shape"][0] * m["shape"][1] for m in modules]
    return {
        "density_A": mean("density_A", size_A),
        "density_B": mean("density_B", size_B),
        "density_BA": mean("density_BA", size_W),
        "expected_BA": mean("expected_BA", size_W),
    }


def _natural(key: str) -> list[tuple[int, str]]:
    """Layer 2 before layer 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in key.split(".")]


def format_inspection(found: dict[str, Any]) -> str:
    """The measurements as a table, densities in percent."""
    rows: list[tuple[str, ...]] = [("module", "shape", "r", "A %", "B %", "BA %", "Thm 3.1 %")]
    rows += [(m["name"], f"{m['shape'][0]}x{m['shape'][1]}", str(m["rank"]), *_percent(m)) for m in found["modules"]]
    rows.append((f"total ({len(found['modules'])} modules)", "", "", *_percent(found["total"])))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    ]
    rule = "-" * len(lines[0])
    off_mask = found["off_mask_nonzero"]
    verdict = (
        "no masks (a dense adapter, or RKH only)"
        if off_mask is None
        else "every entry off its mask is exactly 0"
        if off_mask == 0
        else f"{off_mask} ENTRIES OFF THE MASK ARE NOT 0"
    )
    return "\n".join([lines[0], rule, *lines[1:-1], rule, lines[-1], verdict])


def _percent(measured: dict[str, Any]) -> tuple[str, ...]:
    return tuple(f"{100 * measured[key]:.2f}" for key in ("density_A", "density_B", "density_BA", "expected_BA"))
