"""CMR of all 96 matrices of a 7B, once: forward and backward by the clock, as a training step waits for it.

Ours as training computes it (`ConflictRegularizer`) and matrix by matrix (`prepared_penalty`), beside the formulation
of the paper's release, which computes all of it at every micro-step and on every GPU, and the floor: reading every W
once. Launches: kernels on a GPU, PyTorch operators on a CPU. Aim: at most twice the floor, 150 launches and 0.2 GiB.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
from cmr import PeakMemory, exact, released_penalty
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from gpu_parts.world import GIB, World, forget, in_turn, read_rate, spread
from llava_sculpt.config import SculptConfig
from llava_sculpt.model.lora import LoraPair
from llava_sculpt.sculpt import Retention, prepared_penalty
from llava_sculpt.train.regularizer import ConflictRegularizer

RELEASED = "release's formulation"


def cases(world: World) -> Iterator[dict[str, Any]]:
    count, side = (6, 128) if world.tiny else (96, 4096)
    table = f"CMR of {count} matrices {side} x {side}, bf16"
    weights = torch.empty(count, side, side, device=world.device, dtype=torch.bfloat16)
    for weight in weights:
        weight.normal_(std=0.02)
    floor = spread(read_rate(weights), 1e3)
    assert floor is not None
    yield {"table": table, "case": "reading W once", "ms": floor, "x floor": 1.0}
    retentions = [Retention.of(weight) for weight in weights]
    for rank, dtype in [(r, torch.float32) for r in (16, 32, 64)] + [(32, torch.bfloat16)]:
        pairs = make_pairs(weights, rank, dtype)
        reference = exact(pairs[0].lora_A, pairs[0].lora_B, weights[0])
        ways = ways_of(pairs, retentions)
        seconds = in_turn({name: call(pairs, way) for name, way in ways.items()}, 5, world.device)
        for name, way in ways.items():
            case = f"r {rank}, A and B {str(dtype).removeprefix('torch.')}: {name}"
            if not seconds[name]:
                yield {"table": table, "case": case, "error": "out of memory"}
                continue
            run = call(pairs, way)
            forget(world.device)
            with PeakMemory(world.device) as peak:
                run()
                if world.device.type == "cuda":
                    torch.cuda.synchronize()
            ms = spread(seconds[name], 1e3)
            assert ms is not None and pairs[0].lora_A.grad is not None
            gradient = pairs[0].lora_A.grad.double() * count  # the term is a mean
            yield {
                "table": table,
                "case": case,
                "ms": ms,
                "x floor": ms["median"] / floor["median"],
                "launches": launches(run, world.device),
                "transient GiB": peak.bytes / GIB,
                "error of a gradient": float((gradient - reference[1]).norm() / reference[1].norm()),
            }


def make_pairs(weights: Tensor, rank: int, dtype: torch.dtype) -> list[LoraPair]:
    """A LoRA pair for each W (n, p, q), named as a 7B's."""
    generator = torch.Generator(weights.device).manual_seed(rank)

    def factor(*shape: int) -> torch.nn.Parameter:
        values = torch.randn(*shape, device=weights.device, generator=generator) * 0.01
        return torch.nn.Parameter(values.to(dtype))

    pairs = []
    for number, weight in enumerate(weights):
        layer: Any = SimpleNamespace(get_base_layer=lambda weight=weight: SimpleNamespace(weight=weight))
        name = f"layers.{number // 3}.{'qkv'[number % 3]}_proj"
        pairs.append(LoraPair(name, factor(rank, weight.shape[1]), factor(weight.shape[0], rank), None, layer))
    return pairs


def ways_of(pairs: list[LoraPair], retentions: list[Retention]) -> dict[str, Callable[[], Tensor]]:
    """The term by each way, as training adds it to the loss."""
    regularizer = ConflictRegularizer(pairs, SculptConfig())

    def ours() -> Tensor:
        term = regularizer()
        assert term is not None
        return term / SculptConfig().alpha

    def by_matrix() -> Tensor:
        values = [
            prepared_penalty(pair.lora_A, pair.lora_B, pair.weight(), retention)
            for pair, retention in zip(pairs, retentions, strict=True)
        ]
        return torch.stack(values).mean()

    def released() -> Tensor:
        return torch.stack([released_penalty(pair.lora_A, pair.lora_B, pair.weight()) for pair in pairs]).mean()

    return {"ours, in training": ours, "ours, matrix by matrix": by_matrix, RELEASED: released}


def call(pairs: list[LoraPair], way: Callable[[], Tensor]) -> Callable[[], None]:
    def run() -> None:
        for pair in pairs:
            pair.lora_A.grad = pair.lora_B.grad = None
        way().backward()

    return run


def launches(run: Callable[[], None], device: torch.device) -> int | None:
    """Kernels that one call starts on a GPU; operators that it dispatches on a CPU."""
    if device.type == "cuda":
        from torch.autograd import DeviceType
        from torch.profiler import ProfilerActivity, profile

        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
            run()
            torch.cuda.synchronize()
        return sum(event.device_type == DeviceType.CUDA for event in found.events()) or None  # none: nothing was seen

    class Count(TorchDispatchMode):
        seen = 0

        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.seen += 1
            return function(*args, **(kwargs or {}))

    with Count() as count:
        run()
    return count.seen
