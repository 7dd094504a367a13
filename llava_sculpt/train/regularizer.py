"""What a method adds to the loss once per optimizer step, over a model's LoRA pairs, shared out over the processes.

Two terms exist: conflict mitigation (Eq. 8-11) for LoRASculpt, and one penalty per matrix for L2-Reg and Orth-Reg. The
mean of the processes' gradients, which training takes, is that of the whole term.

A step needs the gradients of a term alone, and its value is a by-product of them. So the term in the loss is a zero
made before the model's forward: its part of backward then comes after the model's, when the activations are gone, one
batch of matrices after the other, and nothing is kept. A batch is one matrix, or for CMR on a GPU as many of one shape
as its kernels take at once. The value is read afterwards. Not so where A and B lie in pieces (ZeRO-3): they are whole
only while backward is at their layer, so the gradients are computed before it and kept.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import distributed as dist

from llava_sculpt.config import SculptConfig
from llava_sculpt.model.lora import LoraPair, matching_pairs
from llava_sculpt.names import METHODS
from llava_sculpt.sculpt import (
    Norm,
    Retention,
    WeightPiece,
    matrices_at_once,
    partitioned_penalties,
    partitioned_retentions,
    penalties_and_gradients,
    runs_in_groups,
)
from llava_sculpt.train.zero import gathered, is_partitioned, local_piece

Terms = tuple[torch.Tensor, Sequence[torch.Tensor], Sequence[torch.Tensor]]


class Regularizer:
    """A term of the loss that depends on the weights alone: a weighted sum of sums over matrices.

    Args:
        sums: weight and sum, by the name that the log has the unweighted sum under.
    """

    def __init__(self, sums: dict[str, tuple[float, _Sum]]) -> None:
        self._sums = sums

    @property
    def before_forward(self) -> bool:
        """Whether the term is to be made before the model's forward pass, or after it."""
        return not any(term.in_pieces for _, term in self._sums.values())

    def __call__(self) -> torch.Tensor | None:
        """A zero with the gradient of this process's share, weighted; None when nothing is added.

        Collective under ZeRO-3.
        """
        return _total([weight * term() for weight, term in self._sums.values()]) if self._sums else None

    def value(self) -> torch.Tensor:
        """The weighted value that the last backward pass went through, the same on every process. Collective."""
        return _total([weight * term.value() for weight, term in self._sums.values()])

    def values(self) -> dict[str, float]:
        """The last unweighted values over all matrices, for the log; the same on every process."""
        return {name: float(term.last) for name, (_, term) in self._sums.items()}


class SumRegularizer(Regularizer):
    """strength * sum of a penalty over all LoRA pairs, the connector's included: L2-Reg, Orth-Reg.

    Args:
        method: a penalty of `names.METHODS`; the log has its value as `NAME_penalty`.
        pairs: every LoRA pair of the model.
        strength: lambda.
    """

    def __init__(self, method: str, pairs: list[LoraPair], strength: float) -> None:
        super().__init__({f"{method}_penalty": (strength, _PenaltySum(method, pairs))})


class ConflictRegularizer(Regularizer):
    """alpha * CMR of the regularized layers (Eq. 8: the LLM's Q, K, V) plus beta * CMR of the connector's (Eq. 10).

    N processes that hold W whole (DDP, ZeRO-2) compute every N-th matrix each. With W in pieces (ZeRO-3) each computes
    all matrices on its own pieces. Either way the work is divided by N.

    Args:
        pairs: every LoRA pair of the model.
        config: weights, omega, reduction, and the layers of each term.

    Attributes:
        llm, connector: the regularized pairs; empty where the weight is 0.

    Raises:
        UserError: a pattern of `config` whose weight is above 0 matches no layer.
    """

    def __init__(self, pairs: list[LoraPair], config: SculptConfig) -> None:
        self.llm = matching_pairs(pairs, config.regularize, "regularize") if config.alpha > 0 else []
        with_connector = config.connector is not None and config.beta > 0
        self.connector = matching_pairs(pairs, config.connector or "", "connector") if with_connector else []
        sums: dict[str, tuple[float, _Sum]] = {}
        if self.llm:
            sums["cmr_llm"] = config.alpha, _ConflictSum(self.llm, "fro", config)
        if self.connector:
            sums["cmr_connector"] = config.beta, _ConflictSum(self.connector, "l1", config)
        super().__init__(sums)


class _Sum(ABC):
    """A sum (or mean) of one term per matrix, computed in backward, one node of autograd for each of its batches:
    process k of N takes every N-th matrix from the k-th on, weighted by N.

    Args:
        pairs: the matrices.
        divisor: of the sum.

    Attributes:
        last: the last value.
    """

    def __init__(self, pairs: list[LoraPair], divisor: int = 1) -> None:
        self.pairs, self.last = pairs, torch.zeros(())
        self._divisor = divisor
        self._values: dict[str, torch.Tensor] = {}

    @property
    def in_pieces(self) -> bool:
        """Whether each process holds only pieces of A, B and W (ZeRO-3)."""
        return is_partitioned(self.pairs[0].lora_A)

    def batches(self, processes: int) -> list[list[LoraPair]]:
        """The matrices in portions that processes compute together; the same on every process."""
        return [[pair] for pair in self.pairs]

    @abstractmethod
    def of_batch(self, pairs: list[LoraPair], scale: torch.Tensor) -> Terms:
        """The terms of this process's matrices of a batch: values (n,), n gradients in A (r, q) and n in B (p, r); the
        gradients times `scale`, in their factors' dtypes."""

    @abstractmethod
    def of_pieces(self) -> torch.Tensor:
        """The undivided sum, differentiable in every A and B, where they lie in pieces. Collective."""

    def __call__(self) -> torch.Tensor:
        if self.in_pieces:
            total = self.of_pieces() / self._divisor
            self.last = total.detach()
            return total - self.last
        processes, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
        zeros, first = [], 0
        for batch in self.batches(processes):
            # Every process has a node for every batch: ZeRO-2 needs gradients in the same order everywhere.
            own = [place for place in range(len(batch)) if (first + place) % processes == rank]
            compute = partial(self._gradients, batch, own) if own else None
            zeros.append(_InBackward.apply(compute, *(f for pair in batch for f in (pair.lora_A, pair.lora_B))))
            first += len(batch)
        return processes * _total(zeros) / self._divisor

    def value(self) -> torch.Tensor:
        """What the last backward pass computed, over all matrices. Collective."""
        if not self.in_pieces:
            own = self._values.values() or [torch.zeros(1)]  # fewer matrices than processes
            total = torch.cat([values.to(self.pairs[0].lora_A.device) for values in own]).sum()
            if dist.is_initialized():
                dist.all_reduce(total)
            self.last = total / self._divisor
        return self.last

    def _gradients(self, batch: list[LoraPair], own: list[int], scale: torch.Tensor) -> list[torch.Tensor | None]:
        """Of A and B of every matrix of the batch; None for those of other processes."""
        gradients: list[torch.Tensor | None] = [None] * (2 * len(batch))
        values, grads_A, grads_B = self.of_batch([batch[place] for place in own], scale)
        self._values[batch[own[0]].name] = values
        for place, grad_A, grad_B in zip(own, grads_A, grads_B, strict=True):
            gradients[2 * place : 2 * place + 2] = grad_A, grad_B
        return gradients


class _PenaltySum(_Sum):
    """The penalty of one pair is `methods/NAME.py`'s `NAME_penalty` of A, B and, where the method asks for it, the
    whole W; the latter does not run with W in pieces (ZeRO-3), which is refused before training. The others then gather
    A and B, and every process computes all of it."""

    def __init__(self, method: str, pairs: list[LoraPair]) -> None:
        super().__init__(pairs)
        self._whole_weight = METHODS[method].whole_weight
        self._of_layer = getattr(import_module(f"llava_sculpt.methods.{method}"), f"{method}_penalty")

    def _penalty(self, lora_A: torch.Tensor, lora_B: torch.Tensor, pair: LoraPair) -> torch.Tensor:
        weight = [pair.weight()] if self._whole_weight else []
        return self._of_layer(lora_A, lora_B, *weight)

    def of_batch(self, pairs: list[LoraPair], scale: torch.Tensor) -> Terms:
        (pair,) = pairs
        with torch.enable_grad():
            lora_A, lora_B = (factor.detach().requires_grad_() for factor in (pair.lora_A, pair.lora_B))
            penalty = self._penalty(lora_A, lora_B, pair)
            grad_A, grad_B = torch.autograd.grad(penalty, (lora_A, lora_B))
        return penalty.detach().view(1), [grad_A.mul_(scale)], [grad_B.mul_(scale)]

    def of_pieces(self) -> torch.Tensor:
        with gathered([factor for pair in self.pairs for factor in (pair.lora_A, pair.lora_B)]):
            # What autograd keeps must outlive the gather.
            return torch.stack([self._penalty(p.lora_A.clone(), p.lora_B.clone(), p) for p in self.pairs]).sum()


class _ConflictSum(_Sum):
    """CMR in one norm."""

    def __init__(self, pairs: list[LoraPair], norm: Norm, config: SculptConfig) -> None:
        super().__init__(pairs, len(pairs) if config.reduction == "mean" else 1)
        self.norm, self.omega = norm, config.omega
        self._retentions: dict[str, Retention] = {}

    def batches(self, processes: int) -> list[list[LoraPair]]:
        groups: dict[Any, list[LoraPair]] = {}
        for pair in self.pairs:
            base: Any = pair.layer.get_base_layer()
            A, B, frozen = pair.lora_A, pair.lora_B, base.weight
            # A quantised W is not 16-bit, and is dequantised for itself.
            alike = (A.shape, B.shape, A.dtype, B.dtype, frozen.device) if runs_in_groups(frozen) else pair.name
            groups.setdefault(alike, []).append(pair)
        return [batch for group in groups.values() for batch in _portions(group, processes)]

    def of_batch(self, pairs: list[LoraPair], scale: torch.Tensor) -> Terms:
        weights = [pair.weight() for pair in pairs]
        for pair, weight in zip(pairs, weights, strict=True):
            if pair.name not in self._retentions:  # W is frozen: made at the first use
                self._retentions[pair.name] = Retention.of(weight, self.omega)
        retentions = [self._retentions[pair.name] for pair in pairs]
        lora_A, lora_B = [pair.lora_A for pair in pairs], [pair.lora_B for pair in pairs]
        return penalties_and_gradients(lora_A, lora_B, weights, retentions, self.norm, scale)

    def of_pieces(self) -> torch.Tensor:
        lora_A, lora_B = [pair.lora_A for pair in self.pairs], [pair.lora_B for pair in self.pairs]
        frozen: list[Any] = [pair.layer.get_base_layer() for pair in self.pairs]
        pieces = [WeightPiece(*local_piece(layer.weight), shape=layer.weight.ds_shape) for layer in frozen]
        if not self._retentions:
            made = partitioned_retentions(pieces, self.omega, lora_A[0].device)
            self._retentions.update(zip([pair.name for pair in self.pairs], made, strict=True))
        retentions = [self._retentions[pair.name] for pair in self.pairs]
        # The one gather of a step: A and B, thin, in one go.
        with gathered([*lora_A, *lora_B]):
            return partitioned_penalties(lora_A, lora_B, pieces, retentions, self.norm).sum()


def _portions(group: list[LoraPair], processes: int) -> list[list[LoraPair]]:
    """Equal portions of matrices of one shape, of which the processes' shares fit the memory of a group."""
    (rank, q), p = group[0].lora_A.shape, len(group[0].lora_B)
    most = processes * matrices_at_once(p, q, rank, group[0].lora_A.element_size())
    size = math.ceil(len(group) / math.ceil(len(group) / most))
    return [group[start : start + size] for start in range(0, len(group), size)]


def _total(values: Sequence[torch.Tensor]) -> torch.Tensor:
    """Sum of scalars that may be on several devices, on the first's."""
    return torch.stack([value.to(values[0].device) for value in values]).sum()


class _InBackward(torch.autograd.Function):
    """Zero; its gradients in the factors are computed when backward asks for them, not at all where there are none."""

    @staticmethod
    def forward(
        ctx: Any, gradients: Callable[[torch.Tensor], list[torch.Tensor | None]] | None, *factors: torch.Tensor
    ) -> torch.Tensor:
        ctx.gradients, ctx.factors = gradients, len(factors)
        return torch.zeros((), device=factors[0].device)

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> Any:
        if torch.is_grad_enabled():  # create_graph=True: the gradients below would pass for constants in silence
            raise RuntimeError("a regularizer can be differentiated only once: call backward without create_graph=True")
        return None, *([None] * ctx.factors if ctx.gradients is None else ctx.gradients(grad_output))
