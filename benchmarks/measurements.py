"""What the benchmarks write with --json: the machine, and one entry per case."""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import Any

import torch


def write_results(file: Path, cases: list[dict[str, Any]], device: torch.device, repeats: int) -> None:
    machine = {
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu",
        "threads": torch.get_num_threads(),
        "repeats": repeats,
    }
    file.write_text(json.dumps({"machine": machine, "cases": cases}, indent=2) + "\n")
