"""What a method adds to the loss once per optimizer step, over a model's LoRA pairs, shared out over the processes.

Two terms exist: conflict mitigation (Eq. 8-11) for LoRASculpt, and one penalty per matrix for L2-Reg and Orth-Reg. A
process returns its share; the mean of the shares over the processes, which training takes of losses and gradients, is
the whole term.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, Protocol

import torch
from torch import distributed as dist

from llava_sculpt.config import Config, SculptConfig
from llava_sculpt.methods import l2_penalty, orth_penalty
from llava_sculpt.model.lora import CONNECTOR_TARGETS, LLM_TARGETS, REGULARIZED_LLM, LoraPair, matching_pairs
from llava_sculpt.sculpt import (
    Norm,
    Retention,
    WeightPiece,
    conflict_penalty_total,
    partitioned_penalties,
    partitioned_retentions,
)
from llava_sculpt.train.zero import gathered, is_partitioned, local_piece


class Regularizer(Protocol):
    """A term of the loss that depends on the weights alone."""

    def __call__(self) -> torch.Tensor | None:
        """This process's share, weighted and differentiable; None when nothing is added. Collective."""

    def values(self) -> dict[str, float]:
        """The last unweighted values over all matrices, for the log; the same on every process."""


def sculpt_config(config: Config) -> SculptConfig:
    """The method's settings with the layers of LLaVA-1.5 in Hugging Face's names."""
    connector = CONNECTOR_TARGETS if config.model.connector == "sculpt" else None
    return config.sculpt.to_config(prune=LLM_TARGETS, regularize=REGULARIZED_LLM, connector=connector)


def make_regularizer(pairs: list[LoraPair], config: Config) -> Regularizer | None:
    """The term of the configured method; None for those that change no loss."""
    sculpt = config.sculpt
    if sculpt.method == "sculpt":
        return ConflictRegularizer(pairs, sculpt_config(config))
    if sculpt.method in _PENALTIES and sculpt.reg_lambda > 0:
        return SumRegularizer(sculpt.method, pairs, sculpt.reg_lambda)
    return None


# Of one layer, given its A, B, and the pair they belong to.
_PENALTIES: dict[str, Callable[[torch.Tensor, torch.Tensor, LoraPair], torch.Tensor]] = {
    "l2": lambda lora_A, lora_B, pair: l2_penalty(lora_A, lora_B),
    "orth": lambda lora_A, lora_B, pair: orth_penalty(lora_A, lora_B, pair.weight()),
}


class SumRegularizer:
    """strength * sum of a penalty over all LoRA pairs, the connector's included: L2-Reg and Orth-Reg.

    With N processes, process k computes every N-th matrix from the k-th on, weighted by N. Orth-Reg needs whole W: it
    does not run with W in pieces (ZeRO-3), which is refused before training. L2-Reg then gathers A and B.

    Args:
        method: l2 or orth; the log has its value as `l2_penalty` or `orth_penalty`.
        pairs: every LoRA pair of the model.
        strength: lambda.
    """

    def __init__(self, method: str, pairs: list[LoraPair], strength: float) -> None:
        self.pairs, self.strength = pairs, strength
        self._name, self._penalty = f"{method}_penalty", _PENALTIES[method]
        self._value = torch.zeros(())

    def __call__(self) -> torch.Tensor:
        factors = [factor for pair in self.pairs for factor in (pair.lora_A, pair.lora_B)]
        partitioned = is_partitioned(factors[0])
        with gathered(factors) if partitioned else nullcontext():
            # What autograd keeps must outlive the gather.
            copied = torch.clone if partitioned else torch.nn.Identity()
            share, self._value = _shared_out(self.pairs, lambda own: self._sum(own, copied))
        return self.strength * share

    def values(self) -> dict[str, float]:
        return {self._name: float(self._value)}

    def _sum(self, pairs: list[LoraPair], copied: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        return torch.stack([self._penalty(copied(p.lora_A), copied(p.lora_B), p) for p in pairs]).sum()


class ConflictRegularizer:
    """alpha * CMR of the regularized layers (Eq. 8: the LLM's Q, K, V) plus beta * CMR of the connector's (Eq. 10).

    With N processes that hold W whole (DDP, ZeRO-2), process k computes every N-th matrix from the k-th on, weighted
    by N. With W in pieces (ZeRO-3) each computes all matrices on its own pieces. Either way the work is divided by N.

    Args:
        pairs: every LoRA pair of the model.
        config: weights, omega, reduction, and the layers of each term.

    Attributes:
        cmr_llm, cmr_connector: the last values over all matrices, unweighted, the same on every process.

    Raises:
        UserError: a pattern of `config` whose weight is above 0 matches no layer.
    """

    def __init__(self, pairs: list[LoraPair], config: SculptConfig) -> None:
        self.config = config
        self.llm = matching_pairs(pairs, config.regularize, "regularize") if config.alpha > 0 else []
        with_connector = config.connector is not None and config.beta > 0
        self.connector = matching_pairs(pairs, config.connector or "", "connector") if with_connector else []
        self.cmr_llm = self.cmr_connector = torch.zeros(())
        self._retentions: dict[str, Retention] = {}

    def __call__(self) -> torch.Tensor | None:
        """This process's share of the weighted sum, differentiable in A and B; None when no term applies.

        Collective when there are several processes.
        """
        loss = None
        if self.llm:
            share, self.cmr_llm = self._share(self.llm, "fro")
            loss = self.config.alpha * share
        if self.connector:
            share, self.cmr_connector = self._share(self.connector, "l1")
            term = self.config.beta * share
            loss = term if loss is None else loss + term
        return loss

    def values(self) -> dict[str, float]:
        values = {}
        if self.llm:
            values["cmr_llm"] = float(self.cmr_llm)
        if self.connector:
            values["cmr_connector"] = float(self.cmr_connector)
        return values

    def _share(self, pairs: list[LoraPair], norm: Norm) -> tuple[torch.Tensor, torch.Tensor]:
        """(share of this process, value over all)."""
        count = len(pairs) if self.config.reduction == "mean" else 1
        if is_partitioned(_frozen(pairs[0])):
            total = self._in_pieces(pairs, norm).sum() / count
            return total, total.detach()

        def sum_over(own: list[LoraPair]) -> torch.Tensor:
            layers = ((pair.lora_A, pair.lora_B, *self._whole(pair)) for pair in own)
            return conflict_penalty_total(layers, norm=norm, reduction="sum") / count

        return _shared_out(pairs, sum_over)

    def _whole(self, pair: LoraPair) -> tuple[torch.Tensor, Retention]:
        """W, and what of its retention mask outlives a step (made at the first use: W is frozen)."""
        weight = pair.weight()
        if pair.name not in self._retentions:
            self._retentions[pair.name] = Retention.of(weight, self.config.omega)
        return weight, self._retentions[pair.name]

    def _in_pieces(self, pairs: list[LoraPair], norm: Norm) -> torch.Tensor:
        lora_A, lora_B = [pair.lora_A for pair in pairs], [pair.lora_B for pair in pairs]
        pieces = [WeightPiece(*local_piece(_frozen(pair)), shape=_frozen(pair).ds_shape) for pair in pairs]
        if pairs[0].name not in self._retentions:
            made = partitioned_retentions(pieces, self.config.omega, lora_A[0].device)
            self._retentions.update(zip([pair.name for pair in pairs], made, strict=True))
        retentions = [self._retentions[pair.name] for pair in pairs]
        # The one gather of a step: A and B, thin, in one go.
        with gathered([*lora_A, *lora_B]):
            return partitioned_penalties(lora_A, lora_B, pieces, retentions, norm)


def _shared_out(
    pairs: list[LoraPair], sum_over: Callable[[list[LoraPair]], torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """(share of this process: its every N-th matrix, times N; value over all matrices, the same on every process)."""
    processes = dist.get_world_size() if dist.is_initialized() else 1
    own = pairs[dist.get_rank() :: processes] if processes > 1 else pairs
    share = sum_over(own) if own else torch.zeros((), device=pairs[0].lora_A.device)
    total = share.detach().clone()
    if processes > 1:
        dist.all_reduce(total)
    return share * processes, total


def _frozen(pair: LoraPair) -> Any:
    base: Any = pair.layer.get_base_layer()
    return base.weight
