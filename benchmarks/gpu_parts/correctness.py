"""Whether the results are right on this card, before anything is timed.

CMR as training computes it, against float64 and twice over, on matrices of ragged shapes, several in one model.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
from cmr import exact
from torch import Tensor

from gpu_parts.world import World
from llava_sculpt.config import SculptConfig
from llava_sculpt.model.lora import LoraPair
from llava_sculpt.train.regularizer import ConflictRegularizer

SHAPES = [(1024, 256), (1000, 1304), (1000, 1304), (200, 136)]
# Gradients in bf16 are rounded to 8 bits; everything else has to be float32's.
BOUNDS = {torch.float32: 1e-6, torch.bfloat16: 4e-3}


def cases(world: World) -> Iterator[dict[str, Any]]:
    wrong = []
    for rank in (32,) if world.tiny else (32, 16, 64, 8, 128):
        for of_weight in (torch.bfloat16, torch.float16, torch.float32):
            for of_factors in BOUNDS:
                row = compared(world.device, rank, of_weight, of_factors)
                wrong += [] if row["right"] == "yes" else [row["case"]]
                yield row
    yield (row := special(world.device))
    wrong += [] if row["right"] == "yes" else [row["case"]]
    if wrong:
        raise AssertionError(f"wrong: {'; '.join(wrong)}")


def compared(device: torch.device, rank: int, of_weight: torch.dtype, of_factors: torch.dtype) -> dict[str, Any]:
    """Value and gradients of CMR over matrices of several shapes beside float64, and twice."""
    generator = torch.Generator(device).manual_seed(rank)
    pairs = [pair_of(shape, rank, of_weight, of_factors, generator) for shape in SHAPES]
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        value, gradients = run(pairs)
    again, gradients_again = run(pairs)
    references = [exact(pair.lora_A, pair.lora_B, pair.weight()) for pair in pairs]
    errors = [abs(value - float(sum(reference[0] for reference in references)) / len(pairs)) / value]
    for found, (_, grad_A, grad_B) in zip(gradients, references, strict=True):
        for mine, right in zip(found, (grad_A, grad_B), strict=True):
            errors.append(float((mine.double() * len(pairs) - right).norm() / right.norm()))
    same = value == again and all(
        torch.equal(a, b)
        for mine, other in zip(gradients, gradients_again, strict=True)
        for a, b in zip(mine, other, strict=True)
    )
    names = [str(dtype).removeprefix("torch.") for dtype in (of_weight, of_factors)]
    return {
        "table": "CMR against float64",
        "case": f"r {rank}, W {names[0]}, A and B {names[1]}",
        "right": "yes" if max(errors) <= BOUNDS[of_factors] and same else "NO",
        "largest error": max(errors),
        "same bits twice": "yes" if same else "NO",
        "said": "; ".join(str(warning.message) for warning in said if "CMR" in str(warning.message)),
    }


def special(device: torch.device) -> dict[str, Any]:
    """B = 0 has gradients of exactly 0; NaN in A comes out."""
    generator = torch.Generator(device).manual_seed(0)
    zero, broken = (pair_of((256, 384), 16, torch.bfloat16, torch.float32, generator) for _ in range(2))
    zero.lora_B.data.zero_()
    value, gradients = run([zero])
    good = value == 0 and not any(gradient.any() for gradient in gradients[0])
    broken.lora_A.data[3, 5] = float("nan")
    value, _ = run([broken])
    right = "yes" if good and value != value else "NO"
    return {"table": "CMR against float64", "case": "B = 0, and NaN in A", "right": right}


def pair_of(
    shape: tuple[int, int], rank: int, of_weight: torch.dtype, of_factors: torch.dtype, generator: torch.Generator
) -> LoraPair:
    device, (p, q) = generator.device, shape
    weight = (torch.randn(p, q, device=device, generator=generator) * 0.02).to(of_weight)
    layer: Any = SimpleNamespace(get_base_layer=lambda: SimpleNamespace(weight=weight))

    def factor(*sides: int) -> torch.nn.Parameter:
        return torch.nn.Parameter((torch.randn(*sides, device=device, generator=generator) * 0.01).to(of_factors))

    return LoraPair(f"layers.{id(weight)}.q_proj", factor(rank, q), factor(p, rank), None, layer)


def run(pairs: list[LoraPair]) -> tuple[float, list[tuple[Tensor, Tensor]]]:
    """Mean of CMR over the matrices, and the gradients of A and B."""
    for pair in pairs:
        pair.lora_A.grad = pair.lora_B.grad = None
    regularizer = ConflictRegularizer(pairs, SculptConfig(alpha=1.0))
    term = regularizer()
    assert term is not None
    term.backward()
    gradients = []
    for pair in pairs:
        assert pair.lora_A.grad is not None and pair.lora_B.grad is not None
        gradients.append((pair.lora_A.grad, pair.lora_B.grad))
    return float(regularizer.value()), gradients
