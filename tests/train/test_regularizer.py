"""The regularizers as terms of the loss: what they add, when it is computed, and what a step keeps of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from llava_sculpt.config import SculptConfig
from llava_sculpt.model.checkpoint import find_base_checkpoint
from llava_sculpt.model.load import load_base
from llava_sculpt.model.lora import CONNECTOR_TARGETS, LoraPair, inject_lora, lora_pairs
from llava_sculpt.sculpt import conflict_penalty
from llava_sculpt.train.regularizer import ConflictRegularizer, Regularizer, SumRegularizer


@pytest.fixture
def model(checkpoint: Path) -> nn.Module:
    """LoRA on the LLM and the connector, with B no longer zero."""
    torch.manual_seed(0)
    base = load_base(find_base_checkpoint(str(checkpoint)), torch.float32)
    model = inject_lora(base, r=4, lora_alpha=8, dropout=0, connector="sculpt")
    for pair in lora_pairs(model):
        nn.init.normal_(pair.lora_B, std=0.01)
    return model.train()


def gradients(model: nn.Module, loss: torch.Tensor) -> list[torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def check_against(model: nn.Module, regularizer: Regularizer, expected: torch.Tensor) -> None:
    """Gradients beside the model's own, also scaled as under gradient accumulation, and the value afterwards."""
    ids = torch.tensor([[1, 5, 6, 7, 8, 9]])
    wanted = gradients(model, (model(input_ids=ids, labels=ids).loss + expected) * 0.25)
    term = regularizer()
    assert term is not None and term.item() == 0
    found = gradients(model, (model(input_ids=ids, labels=ids).loss + term) * 0.25)
    for mine, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(regularizer.value(), expected.detach(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_conflict_mitigation(model: nn.Module, reduction: str) -> None:
    config = SculptConfig(alpha=0.5, beta=0.1, omega=2.0, reduction=reduction, connector=CONNECTOR_TARGETS)
    regularizer = ConflictRegularizer(lora_pairs(model), config)
    sums = []
    for pairs, norm in ((regularizer.llm, "fro"), (regularizer.connector, "l1")):
        penalties = [conflict_penalty(p.lora_A, p.lora_B, p.weight(), 2.0, norm) for p in pairs]  # type: ignore[arg-type]
        sums.append(torch.stack(penalties).mean() if reduction == "mean" else torch.stack(penalties).sum())
    check_against(model, regularizer, 0.5 * sums[0] + 0.1 * sums[1])
    values = regularizer.values()
    assert values["cmr_llm"] == pytest.approx(float(sums[0]), rel=1e-6)
    assert values["cmr_connector"] == pytest.approx(float(sums[1]), rel=1e-6)


def test_sums_of_penalties(model: nn.Module) -> None:
    pairs = lora_pairs(model)
    squares = torch.stack([p.lora_A.square().sum() + p.lora_B.square().sum() for p in pairs]).sum()
    check_against(model, SumRegularizer("l2", pairs, 0.3), 0.3 * squares)
    norms = torch.stack([(p.weight().T @ p.lora_B @ p.lora_A).norm() for p in pairs]).sum()
    check_against(model, SumRegularizer("orth", pairs, 0.3), 0.3 * norms)


@pytest.mark.parametrize("method", ["sculpt", "orth"])
def test_backward_reaches_the_term_after_the_model(
    model: nn.Module, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By then the activations are gone, so that the term's scratch never adds to a step's peak."""
    events: list[str] = []
    weight = LoraPair.weight
    monkeypatch.setattr(LoraPair, "weight", lambda pair: (events.append("term"), weight(pair))[1])
    pairs = lora_pairs(model)
    regularizer = ConflictRegularizer(pairs, SculptConfig()) if method == "sculpt" else SumRegularizer("orth", pairs, 1)
    term = regularizer()
    assert term is not None and not events
    ids = torch.tensor([[1, 5, 6, 7, 8, 9]])
    embedded = model.get_input_embeddings()(ids).requires_grad_()
    embedded.register_hook(lambda gradient: events.append("model"))
    loss = model(inputs_embeds=embedded, labels=ids).loss
    (loss + term).backward()
    assert events == ["model"] + ["term"] * (6 if method == "sculpt" else len(pairs))


def test_twice_differentiated_is_refused(model: nn.Module) -> None:
    term = ConflictRegularizer(lora_pairs(model), SculptConfig())()
    assert term is not None
    with pytest.raises(RuntimeError, match="only once"):
        term.backward(create_graph=True)
