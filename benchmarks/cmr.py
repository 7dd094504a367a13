"""Speed, memory and error of CMR (forward and backward of one matrix) beside the formulation of the paper's release.

    python benchmarks/cmr.py            # 4096 x 4096 and 11008 x 4096, r 16/32/64, bf16 and fp32 W: minutes on 2 cores
    python benchmarks/cmr.py --quick    # 1024 x 1024 only: seconds
    python benchmarks/cmr.py --shapes 4096x4096 --ranks 32 --json out.json

Four ways to compute the same number take turns in one process, so that the ratios survive a noisy machine. On a
machine that is busy with other work use --threads 1: otherwise what is measured is threads waiting for each other.
  ours             prepared_penalty, with the constants of the frozen W made once before (what training does)
  ours, unprepared conflict_penalty, which also takes ||W|| and the table anew
  released         the release's lines, in W's dtype: M recomputed from W, M and B A kept by autograd
  released, fp32   the same with everything in fp32 (only where W is 16-bit)
The floor is the time of the three thin fp32 products that any exact method needs: B A, Q A^T and B^T Q.

Then comes the peak extra memory of a step over all of a 7B's Q, K and V (96 matrices of 4096 x 4096) in one process,
with the regularizer as training adds it. The release is measured on a few matrices and counted up.

On a GPU last of all: these 96 in groups, as training takes them, beside the release's lines matrix by matrix and, as
the floor, reading their W once. --tile ROWSxCOLUMNSxWARPS tries another part of W per step of the main kernel.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import statistics
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from measurements import write_results
from torch import Tensor

from llava_sculpt.config import SculptConfig
from llava_sculpt.model.lora import LoraPair
from llava_sculpt.sculpt import (
    Retention,
    conflict_penalty,
    matrices_at_once,
    penalties_and_gradients,
    prepared_penalty,
)
from llava_sculpt.train.regularizer import ConflictRegularizer

Penalty = Callable[[Tensor, Tensor], Tensor]
MIB = 2**20
MATRICES = 96  # W_Q, W_K, W_V of 32 layers


def released_penalty(lora_A: Tensor, lora_B: Tensor, weight: Tensor) -> Tensor:
    """Eq. 6-8 written out with autograd, every intermediate a full p x q matrix in the dtype of ``weight``."""
    importance = torch.abs(1 / torch.log(torch.abs(weight) / torch.norm(weight, p=2) + 1e-15))
    return torch.norm(torch.tanh(importance) * (lora_B.to(weight.dtype) @ lora_A.to(weight.dtype)))


def thin_products(lora_A: Tensor, lora_B: Tensor, tile_rows: int) -> None:
    with torch.no_grad():
        grad_A = torch.zeros_like(lora_A)
        for rows in lora_B.split(tile_rows):
            tile = rows @ lora_A
            tile @ lora_A.T
            grad_A.addmm_(rows.T, tile)


def exact(lora_A: Tensor, lora_B: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Value and gradients in float64, in row blocks so that the reference fits a laptop."""
    A, B = lora_A.detach().double(), lora_B.detach().double()
    norm = torch.stack([rows.double().square().sum() for rows in weight.split(256)]).sum().sqrt()
    squares, grad_A, grad_B = A.new_zeros(()), torch.zeros_like(A), torch.zeros_like(B)
    for start in range(0, len(B), 256):
        block = slice(start, start + 256)
        M = torch.tanh((1 / torch.log(weight[block].double().abs() / norm + 1e-15)).abs())
        P = B[block] @ A
        squares += (M * P).square().sum()
        Q = M.square() * P
        grad_A += B[block].T @ Q
        grad_B[block] = Q @ A.T
    value = squares.sqrt()
    return value, grad_A / value, grad_B / value


class PeakMemory:
    """Most extra memory in use at any moment inside the ``with`` block, in bytes.

    On a GPU the allocator's own count; on CPU the resident size, sampled about every millisecond.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.bytes = device, 0

    def __enter__(self) -> PeakMemory:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self.before = torch.cuda.memory_allocated(self.device)
            return self
        return_free_memory()
        self.before, self.done = resident_bytes(), threading.Event()
        self.sampler = threading.Thread(target=self.sample)
        self.sampler.start()
        return self

    def sample(self) -> None:
        while not self.done.is_set():
            self.bytes = max(self.bytes, resident_bytes() - self.before)
            time.sleep(0.001)

    def __exit__(self, *_: object) -> None:
        if self.device.type == "cuda":
            self.bytes = torch.cuda.max_memory_allocated(self.device) - self.before
            return
        self.done.set()
        self.sampler.join()


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def keep_no_free_memory() -> None:
    """Let every tensor come from the system and go back to it when freed (glibc only; slower from then on).

    Otherwise the resident size also counts free gaps in the heap: over 96 matrices more than is in use.
    """
    m_mmap_threshold = -3
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(m_mmap_threshold, 2**16)


def return_free_memory() -> None:
    """Give freed heap back to the system, so that reusing it counts as memory again (glibc only)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(
    shape: tuple[int, int], rank: int, dtype: torch.dtype, repeats: int, device: torch.device
) -> dict[str, Any]:
    p, q = shape
    generator = torch.Generator(device=device).manual_seed(0)
    weight = (torch.randn(p, q, device=device, generator=generator) * 0.02).to(dtype)
    lora_A = ((torch.rand(rank, q, device=device, generator=generator) - 0.5) * 0.03).requires_grad_()
    lora_B = (torch.randn(p, rank, device=device, generator=generator) * 1e-3).requires_grad_()
    retention = Retention.of(weight)
    ways: dict[str, Penalty] = {
        "ours": lambda A, B: prepared_penalty(A, B, weight, retention),
        "ours, unprepared": lambda A, B: conflict_penalty(A, B, weight),
        "released": lambda A, B: released_penalty(A, B, weight),
    }
    if dtype != torch.float32:
        ways["released, fp32"] = lambda A, B: released_penalty(A, B, weight.float())

    reference = exact(lora_A, lora_B, weight)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    floor: list[float] = []
    results: dict[str, Any] = {}
    for name, penalty in ways.items():  # once each for memory and error
        penalty(lora_A, lora_B).backward()  # libraries load on first use
        lora_A.grad = lora_B.grad = None
        with PeakMemory(device) as peak:
            value = penalty(lora_A, lora_B)
            value.backward()
            wait(device)
        assert lora_A.grad is not None and lora_B.grad is not None
        results[name] = {"peak_extra_mib": peak.bytes / MIB}
        got = (value.detach(), lora_A.grad, lora_B.grad)
        for part, a, e in zip(("value", "grad_A", "grad_B"), got, reference, strict=True):
            results[name][f"error_{part}"] = float((a.double() - e).norm() / e.norm())
    for _ in range(repeats):
        for name, penalty in ways.items():
            lora_A.grad = lora_B.grad = None
            wait(device)
            start = time.perf_counter()
            penalty(lora_A, lora_B).backward()
            wait(device)
            seconds[name].append(time.perf_counter() - start)
        start = time.perf_counter()
        thin_products(lora_A, lora_B, 128 if device.type == "cpu" else 1024)
        wait(device)
        floor.append(time.perf_counter() - start)
    for name in ways:
        results[name]["ms"] = 1e3 * statistics.median(seconds[name])
        results[name]["times_ours"] = results[name]["ms"] / results["ours"]["ms"]
    return {
        "shape": [p, q],
        "rank": rank,
        "weight": str(dtype).removeprefix("torch."),
        "floor_ms": 1e3 * statistics.median(floor),
        "ways": results,
    }


def measure_model(rank: int, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Peak extra memory over all matrices of a model: the peak of a step with the term, less that of one without.

    A loss that gives every A and B a gradient stands for the model. W does not count, so that all may share one.
    """
    keep_no_free_memory()
    side = 4096
    weight = (torch.randn(side, side, device=device) * 0.02).to(dtype)
    layer: Any = SimpleNamespace(get_base_layer=lambda: SimpleNamespace(weight=weight))

    def factor(*shape: int) -> torch.nn.Parameter:
        return torch.nn.Parameter(torch.randn(*shape, device=device) * 0.01)

    def extra(count: int, make_term: Callable[[list[LoraPair]], Callable[[], Tensor | None]]) -> float:
        pairs = [
            LoraPair(f"layers.{n}.q_proj", factor(rank, side), factor(side, rank), None, layer) for n in range(count)
        ]
        factors = [parameter for pair in pairs for parameter in (pair.lora_A, pair.lora_B)]
        term = make_term(pairs)

        def peak_of(with_term: bool) -> int:
            for parameter in factors:
                parameter.grad = None
            with PeakMemory(device) as peak:
                added = term() if with_term else None
                loss = torch.stack([torch.dot(f.flatten(), f.detach().flatten()) for f in factors]).sum()
                (loss if added is None else loss + added).backward()
                wait(device)
            return peak.bytes

        peak_of(True)  # libraries load on first use, constants of W are made
        return (peak_of(True) - peak_of(False)) / MIB

    def ours(pairs: list[LoraPair]) -> Callable[[], Tensor | None]:
        return ConflictRegularizer(pairs, SculptConfig())

    def released(pairs: list[LoraPair]) -> Callable[[], Tensor | None]:
        return lambda: torch.stack([released_penalty(pair.lora_A, pair.lora_B, weight) for pair in pairs]).mean()

    two, six = extra(2, released), extra(6, released)
    per_matrix = (six - two) / 4
    return {
        "matrices": MATRICES,
        "shape": [side, side],
        "rank": rank,
        "weight": str(dtype).removeprefix("torch."),
        "ours_mib": extra(MATRICES, ours),
        "released_mib_per_matrix": per_matrix,
        "released_mib": six + (MATRICES - 6) * per_matrix,
    }


def measure_group(
    rank: int,
    factors: torch.dtype,
    count: int,
    repeats: int,
    device: torch.device,
    shape: tuple[int, int] = (4096, 4096),
) -> dict[str, Any]:
    """All matrices of a model, with bf16 W: in groups, by the release's lines one after the other, and W read once.

    Returns `launches` (of kernels and copies, by the profiler; None on a CPU) and `error`, the largest of value and
    gradients of the first matrix against float64, beside medians in ms.
    """
    p, q = shape
    generator = torch.Generator(device=device).manual_seed(0)
    weights = torch.randn(count, p, q, device=device, generator=generator, dtype=torch.bfloat16) * 0.02
    lora_A, lora_B = (
        (torch.randn(count, *size, device=device, generator=generator) * 0.01).to(factors)
        for size in ((rank, q), (p, rank))
    )
    retentions = [Retention.of(weight) for weight in weights]
    size = matrices_at_once(p, q, rank, factors.itemsize)
    scale = torch.ones((), device=device)

    def ours() -> None:
        for start in range(0, count, size):
            some = slice(start, start + size)
            penalties_and_gradients([*lora_A[some]], [*lora_B[some]], [*weights[some]], retentions[some], scale=scale)

    def released() -> None:
        for A, B, weight in zip(lora_A, lora_B, weights, strict=True):
            released_penalty(A.requires_grad_(), B.requires_grad_(), weight).backward()
            A.grad = B.grad = None

    def read() -> None:
        weights.view(torch.int32).amax()

    found = penalties_and_gradients([lora_A[0]], [lora_B[0]], [weights[0]], retentions[:1])
    reference = exact(lora_A[0], lora_B[0], weights[0])
    errors = [float((part[0].double() - e).norm() / e.norm()) for part, e in zip(found, reference, strict=True)]
    ways: dict[str, Callable[[], None]] = {"ms": ours, "released_ms": released, "floor_ms": read}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for repeat in range(repeats + 1):
        for name, way in ways.items():
            wait(device)
            start = time.perf_counter()
            way()
            wait(device)
            if repeat:  # libraries load on first use
                seconds[name].append(time.perf_counter() - start)
    with PeakMemory(device) as peak:
        ours()
        wait(device)
    return {
        "matrices": count,
        "shape": [p, q],
        "rank": rank,
        "factors": str(factors).removeprefix("torch."),
        **{name: 1e3 * statistics.median(times) for name, times in seconds.items()},
        "spread_ms": [1e3 * min(seconds["ms"]), 1e3 * max(seconds["ms"])],
        "launches": launches_of(ours) if device.type == "cuda" else None,
        "error": max(errors),
        "peak_extra_mib": peak.bytes / MIB,
    }


def launches_of(work: Callable[[], None]) -> int:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        work()
        torch.cuda.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profile.events() or [])


def print_group(case: dict[str, Any]) -> None:
    print(
        f"{case['matrices']} matrices in groups, r = {case['rank']}, {case['factors']} factors: {case['ms']:.2f} ms "
        f"({case['spread_ms'][0]:.2f} to {case['spread_ms'][1]:.2f}), {case['launches']} launches, peak "
        f"{case['peak_extra_mib']:.0f} MiB, error {case['error']:.1e}; released {case['released_ms']:.1f} ms; "
        f"W read once {case['floor_ms']:.2f} ms",
        flush=True,
    )


def print_model(case: dict[str, Any]) -> None:
    print(
        f"{case['matrices']} matrices, {case['weight']}, r = {case['rank']}: peak MiB ours {case['ours_mib']:.0f}; "
        f"released {case['released_mib']:.0f} ({case['released_mib_per_matrix']:.0f} a matrix)",
        flush=True,
    )


def print_case(case: dict[str, Any]) -> None:
    p, q = case["shape"]
    print(f"\nW {p} x {q} {case['weight']}, r = {case['rank']}; three thin products: {case['floor_ms']:.1f} ms")
    print(f"  {'':18}{'ms':>8}{'x ours':>8}{'peak MiB':>10}{'err value':>11}{'err dA':>10}{'err dB':>10}")
    for name, way in case["ways"].items():
        errors = "".join(f"{way[f'error_{part}']:10.1e}" for part in ("value", "grad_A", "grad_B"))
        print(f"  {name:18}{way['ms']:8.1f}{way['times_ours']:8.2f}{way['peak_extra_mib']:10.1f} {errors}", flush=True)


def shape_of(text: str) -> tuple[int, int]:
    p, q = text.lower().split("x")
    return int(p), int(q)


def tile_of(text: str) -> dict[str, int]:
    return dict(zip(("ROWS", "COLUMNS", "num_warps"), map(int, text.lower().split("x")), strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one 1024 x 1024 matrix, r = 32")
    parser.add_argument("--shapes", nargs="+", type=shape_of, default=[(4096, 4096), (11008, 4096)], metavar="PxQ")
    parser.add_argument("--ranks", nargs="+", type=int, default=[16, 32, 64])
    parser.add_argument(
        "--dtypes", nargs="+", choices=["bfloat16", "float16", "float32"], default=["bfloat16", "float32"]
    )
    parser.add_argument("--tile", type=tile_of, metavar="ROWSxCOLUMNSxWARPS")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, help="CPU threads (default: PyTorch's choice)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results there")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.shapes, arguments.ranks = [(1024, 1024)], [32]
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    cases = []
    for shape in arguments.shapes:
        for rank in arguments.ranks:
            for dtype in arguments.dtypes:
                cases.append(measure(shape, rank, getattr(torch, dtype), arguments.repeats, device))
                print_case(cases[-1])
    if not arguments.quick:
        print()
    for rank in [] if arguments.quick else arguments.ranks:
        for dtype in arguments.dtypes:
            cases.append(measure_model(rank, getattr(torch, dtype), device))
            print_model(cases[-1])
    if device.type == "cuda":
        if arguments.tile:
            from llava_sculpt.sculpt import fused

            chosen = fused._tile
            fused._tile = lambda rank: chosen(rank) | arguments.tile
        for rank in arguments.ranks:
            for factors in (torch.bfloat16, torch.float32):
                cases.append(measure_group(rank, factors, MATRICES, arguments.repeats, device))
                print_group(cases[-1])
    if arguments.json:
        write_results(arguments.json, cases, device, arguments.repeats)


if __name__ == "__main__":
    main()
