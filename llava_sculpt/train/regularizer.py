"""Conflict mitigation (Eq. 8-11) over a model's LoRA pairs, evaluated once per optimizer step."""

from __future__ import annotations

import torch

from llava_sculpt.config import SculptArguments
from llava_sculpt.model.lora import LoraPair
from llava_sculpt.sculpt import Norm, Retention, conflict_penalty_total


class ConflictRegularizer:
    """alpha * CMR of the LLM's Q, K, V plus beta * CMR of the connector's LoRA.

    Args:
        pairs: every LoRA pair of the model.
        arguments: weights, omega and reduction.
        with_connector: whether Eq. 10 applies (connector mode `sculpt`).
    """

    def __init__(self, pairs: list[LoraPair], arguments: SculptArguments, *, with_connector: bool) -> None:
        self.arguments = arguments
        regularized = [pair for pair in pairs if pair.is_regularized]
        self.llm = [p for p in regularized if not p.in_connector] if arguments.sculpt_alpha > 0 else []
        connector = [p for p in regularized if p.in_connector] if with_connector else []
        self.connector = connector if arguments.sculpt_beta > 0 else []
        self._retentions: dict[str, Retention] = {}
        # The last values, unweighted, for the logs.
        self.cmr_llm = 0.0
        self.cmr_connector = 0.0

    def __call__(self) -> torch.Tensor | None:
        """The weighted sum of both terms, differentiable in A and B; None when neither applies."""
        loss = None
        if self.llm:
            cmr = self._total(self.llm, "fro")
            self.cmr_llm = float(cmr.detach())
            loss = self.arguments.sculpt_alpha * cmr
        if self.connector:
            cmr = self._total(self.connector, "l1")
            self.cmr_connector = float(cmr.detach())
            term = self.arguments.sculpt_beta * cmr
            loss = term if loss is None else loss + term
        return loss

    def _total(self, pairs: list[LoraPair], norm: Norm) -> torch.Tensor:
        return conflict_penalty_total(
            ((pair.lora_A, pair.lora_B, *self._frozen(pair)) for pair in pairs),
            norm=norm,
            reduction="mean" if self.arguments.sculpt_reduction == "mean" else "sum",
        )

    def _frozen(self, pair: LoraPair) -> tuple[torch.Tensor, Retention]:
        """W, and what of its retention mask outlives a step (made at the first use: W is frozen)."""
        weight = pair.weight()
        if pair.name not in self._retentions:
            self._retentions[pair.name] = Retention.of(weight, self.arguments.sculpt_omega)
        return weight, self._retentions[pair.name]
