"""The machine: card, driver, versions, clocks, and what it reaches in one product and in one reading of its memory."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Iterator
from typing import Any

import torch

from gpu_parts.world import GIB, World, matmul_flops, read_rate, spread
from llava_sculpt.records import versions

_ASKED = "driver_version clocks.sm clocks.max.sm clocks.mem power.limit temperature.gpu pcie.link.gen.current".split()


def cases(world: World) -> Iterator[dict[str, Any]]:
    def said(what: str, value: object) -> dict[str, Any]:
        return {"table": "The machine", "case": what, "value": str(value)}

    if world.device.type == "cuda":
        for number in range(torch.cuda.device_count()):
            card = torch.cuda.get_device_properties(number)
            memory = f"{card.total_memory / GIB:.1f} GiB, {card.multi_processor_count} SMs"
            yield said(f"GPU {number}", f"{card.name}, sm_{card.major}{card.minor}, {memory}")
        yield said("CUDA of PyTorch", torch.version.cuda or torch.version.hip)
        for name, value in asked().items():
            yield said(name, value)
    yield said("CPU", f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores")
    yield said("host memory", f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / GIB:.0f} GiB")
    for name, version in versions().items():
        yield said(name, version)
    for dtype in (world.dtype, torch.float32):
        name = f"product of two square matrices, {str(dtype).removeprefix('torch.')}"
        yield {"table": "Ceilings", "case": name, "TFLOP/s": spread(matmul_flops(world.device, dtype), 1e-12)}
    data = torch.zeros((1 if world.tiny else 768) * 2**20, device=world.device)
    rates = [data.nbytes / seconds for seconds in read_rate(data)]
    yield {"table": "Ceilings", "case": "reading memory", "GB/s": spread(rates, 1e-9)}


def asked() -> dict[str, str]:
    """What nvidia-smi tells of the first GPU, as far as it does."""
    query = ["nvidia-smi", f"--query-gpu={','.join(_ASKED)}", "--format=csv,noheader", "--id=0"]
    try:
        line = subprocess.run(query, capture_output=True, text=True, check=True, timeout=10).stdout.splitlines()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return {"nvidia-smi": "does not answer"}
    return dict(zip(_ASKED, line.split(", "), strict=False))
