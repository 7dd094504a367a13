"""Conflict mitigation (Eq. 8-11) over a model's LoRA pairs, once per optimizer step, shared out over the processes."""

from __future__ import annotations

from typing import Any

import torch
from torch import distributed as dist

from llava_sculpt.config import SculptArguments
from llava_sculpt.model.lora import LoraPair
from llava_sculpt.sculpt import (
    Norm,
    Retention,
    WeightPiece,
    conflict_penalty_total,
    partitioned_penalties,
    partitioned_retentions,
)
from llava_sculpt.train.zero import gathered, is_partitioned, local_piece


class ConflictRegularizer:
    """alpha * CMR of the LLM's Q, K, V plus beta * CMR of the connector's LoRA.

    With N processes that hold W whole (DDP, ZeRO-2), process k computes every N-th matrix from the k-th on, weighted
    by N. With W in pieces (ZeRO-3) each computes all matrices on its own pieces. Either way the mean over the
    processes, which training takes of losses and gradients, is the whole term, and the work is divided by N.

    Args:
        pairs: every LoRA pair of the model.
        arguments: weights, omega and reduction.
        with_connector: whether Eq. 10 applies (connector mode `sculpt`).

    Attributes:
        cmr_llm, cmr_connector: the last values over all matrices, unweighted, the same on every process.
    """

    def __init__(self, pairs: list[LoraPair], arguments: SculptArguments, *, with_connector: bool) -> None:
        self.arguments = arguments
        regularized = [pair for pair in pairs if pair.is_regularized]
        self.llm = [p for p in regularized if not p.in_connector] if arguments.sculpt_alpha > 0 else []
        connector = [p for p in regularized if p.in_connector] if with_connector else []
        self.connector = connector if arguments.sculpt_beta > 0 else []
        self.cmr_llm = self.cmr_connector = torch.zeros(())
        self._retentions: dict[str, Retention] = {}

    def __call__(self) -> torch.Tensor | None:
        """This process's share of the weighted sum, differentiable in A and B; None when no term applies.

        Collective when there are several processes.
        """
        loss = None
        if self.llm:
            share, self.cmr_llm = self._share(self.llm, "fro")
            loss = self.arguments.sculpt_alpha * share
        if self.connector:
            share, self.cmr_connector = self._share(self.connector, "l1")
            term = self.arguments.sculpt_beta * share
            loss = term if loss is None else loss + term
        return loss

    def _share(self, pairs: list[LoraPair], norm: Norm) -> tuple[torch.Tensor, torch.Tensor]:
        """(share of this process, value over all)."""
        count = len(pairs) if self.arguments.sculpt_reduction == "mean" else 1
        if is_partitioned(_frozen(pairs[0])):
            total = self._in_pieces(pairs, norm).sum() / count
            return total, total.detach()
        processes = dist.get_world_size() if dist.is_initialized() else 1
        own = pairs[dist.get_rank() :: processes] if processes > 1 else pairs
        share = torch.zeros((), device=pairs[0].lora_A.device)
        if own:
            layers = ((pair.lora_A, pair.lora_B, *self._whole(pair)) for pair in own)
            share = conflict_penalty_total(layers, norm=norm, reduction="sum") / count
        total = share.detach().clone()
        if processes > 1:
            dist.all_reduce(total)
        return share * processes, total

    def _whole(self, pair: LoraPair) -> tuple[torch.Tensor, Retention]:
        """W, and what of its retention mask outlives a step (made at the first use: W is frozen)."""
        weight = pair.weight()
        if pair.name not in self._retentions:
            self._retentions[pair.name] = Retention.of(weight, self.arguments.sculpt_omega)
        return weight, self._retentions[pair.name]

    def _in_pieces(self, pairs: list[LoraPair], norm: Norm) -> torch.Tensor:
        lora_A, lora_B = [pair.lora_A for pair in pairs], [pair.lora_B for pair in pairs]
        pieces = [WeightPiece(*local_piece(_frozen(pair)), shape=_frozen(pair).ds_shape) for pair in pairs]
        if pairs[0].name not in self._retentions:
            made = partitioned_retentions(pieces, self.arguments.sculpt_omega, lora_A[0].device)
            self._retentions.update(zip([pair.name for pair in pairs], made, strict=True))
        retentions = [self._retentions[pair.name] for pair in pairs]
        # The one gather of a step: A and B, thin, in one go.
        with gathered([*lora_A, *lora_B]):
            return partitioned_penalties(lora_A, lora_B, pieces, retentions, norm)


def _frozen(pair: LoraPair) -> Any:
    base: Any = pair.layer.get_base_layer()
    return base.weight
