"""The regularizers as terms of the loss: what they add, when it is computed, and what a step keeps of it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import distributed as dist
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from llava_sculpt.config import SculptConfig
from llava_sculpt.memory import parts
from llava_sculpt.model.checkpoint import find_base_checkpoint
from llava_sculpt.model.load import load_base
from llava_sculpt.model.lora import CONNECTOR_TARGETS, LoraPair, inject_lora, lora_pairs
from llava_sculpt.sculpt import cmr as cmr_module
from llava_sculpt.sculpt import conflict_penalty
from llava_sculpt.train import regularizer as regularizer_module
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


@pytest.fixture
def in_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU with 16-bit weights."""
    monkeypatch.setattr(regularizer_module, "runs_in_groups", lambda weight: True)


def nodes_of(term: torch.Tensor) -> list[Any]:
    """The term's nodes of autograd that compute gradients of matrices."""
    found, following = [], [term.grad_fn]
    while following:
        node = following.pop()
        if node is not None and node.name() == "_InBackwardBackward":
            found.append(node)
        elif node is not None:
            following += [edge for edge, _ in node.next_functions]
    return found


WITH_CONNECTOR = SculptConfig(alpha=0.5, beta=0.1, connector=CONNECTOR_TARGETS)


def test_groups_give_the_same_gradients(model: nn.Module, in_groups: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the bit, with one node of autograd for the matrices of one shape."""
    grouped = ConflictRegularizer(lora_pairs(model), WITH_CONNECTOR)
    term = grouped()
    assert term is not None
    shapes = [{(*p.lora_A.shape, *p.lora_B.shape) for p in pairs} for pairs in (grouped.llm, grouped.connector)]
    assert len(nodes_of(term)) == sum(len(found) for found in shapes) < len(grouped.llm)
    found = gradients(model, term)
    monkeypatch.setattr(regularizer_module, "runs_in_groups", lambda weight: False)
    one_by_one = ConflictRegularizer(lora_pairs(model), WITH_CONNECTOR)
    term = one_by_one()
    assert term is not None and len(nodes_of(term)) == len(grouped.llm) + len(grouped.connector)
    assert all(torch.equal(mine, other) for mine, other in zip(found, gradients(model, term), strict=True))
    torch.testing.assert_close(grouped.value(), one_by_one.value())


@pytest.mark.parametrize("processes", [2, 4])
def test_groups_are_shared_out(
    model: nn.Module, in_groups: None, processes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every process has the same nodes in the same order, and about as many matrices; the mean is the whole."""
    whole = ConflictRegularizer(lora_pairs(model), WITH_CONNECTOR)
    factors = [factor for pair in whole.llm + whole.connector for factor in (pair.lora_A, pair.lora_B)]

    def of(term: torch.Tensor | None) -> list[torch.Tensor | None]:
        model.zero_grad()
        assert term is not None
        term.backward()
        return [factor.grad for factor in factors]

    expected, value = of(whole()), float(whole.value())
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: processes)
    monkeypatch.setattr(dist, "all_reduce", lambda total: total)
    monkeypatch.setattr(cmr_module, "GROUP_BYTES", 1)  # one matrix at once for each process
    found: list[list[Any]] = []
    order, values = [], []
    for rank in range(processes):
        monkeypatch.setattr(dist, "get_rank", lambda rank=rank: rank)
        regularizer = ConflictRegularizer(lora_pairs(model), WITH_CONNECTOR)
        term = regularizer()
        assert term is not None
        order.append([[id(edge.variable) for edge, _ in node.next_functions] for node in nodes_of(term)])
        found.append(of(term))
        values.append(float(regularizer.value()))
    assert all(same == order[0] for same in order)
    assert {len(node) for node in order[0]} <= {2 * count for count in range(1, processes + 1)}
    assert sum(values) == pytest.approx(value, rel=1e-6)
    for place, right in enumerate(expected):
        (mine,) = (gradients[place] for gradients in found if gradients[place] is not None)
        torch.testing.assert_close(mine / processes, right)
    shares = [sum(gradient is not None for gradient in gradients) // 2 for gradients in found]
    assert max(shares) - min(shares) <= 3  # one for each shape


class Launches(TorchDispatchMode):
    """Counts PyTorch's operations on values."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not (func.is_view or "empty" in str(func))
        return func(*args, **kwargs or {})


@pytest.mark.parametrize(("rank", "processes"), [(16, 1), (64, 1), (64, 4), (128, 1)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_launches_and_memory_of_a_7b(
    rank: int, processes: int, dtype: torch.dtype, in_groups: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """96 matrices of 4096 x 4096 by their shapes alone: at most 150 launches a step (the kernels' four a group, and
    PyTorch's), 0.2 GiB for a group, which `plan` counts."""
    groups: list[int] = []

    def kernels(A: list[torch.Tensor], B: list[torch.Tensor], *_: Any) -> tuple[torch.Tensor, ...]:
        groups.append(len(A))
        return torch.empty(len(A), device="meta"), torch.empty_like(torch.stack(A)), torch.empty_like(torch.stack(B))

    monkeypatch.setattr(cmr_module, "runs_in_groups", lambda weight: True)
    monkeypatch.setattr(cmr_module, "fused_gradients_on", lambda *_: kernels)
    monkeypatch.setattr(regularizer_module, "Retention", SimpleNamespace(of=lambda *_: None))
    monkeypatch.setattr(dist, "is_initialized", lambda: processes > 1)
    monkeypatch.setattr(dist, "get_world_size", lambda: processes)
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    monkeypatch.setattr(dist, "all_reduce", lambda total: total)
    side = 4096
    weight = torch.empty(side, side, dtype=torch.bfloat16, device="meta")
    layer: Any = SimpleNamespace(get_base_layer=lambda: SimpleNamespace(weight=weight))

    def factor(*shape: int) -> nn.Parameter:
        return nn.Parameter(torch.empty(shape, dtype=dtype, device="meta"))

    pairs = [LoraPair(f"{n}.q_proj", factor(rank, side), factor(side, rank), None, layer) for n in range(96)]
    regularizer = ConflictRegularizer(pairs, SculptConfig(regularize=".*"))
    with Launches() as launches:
        term = regularizer()
        assert term is not None
        term.backward()
        regularizer.value()
    assert sum(groups) == 96 // processes
    assert launches.count + 2 * len(groups) <= 150  # two are the stack in `kernels`, in place of two of theirs
    taken = cmr_module.group_bytes(side, side, rank, dtype.itemsize, max(groups))
    assert taken <= 0.2 * 2**30
    setup: Any = SimpleNamespace(lora_r=rank, gpus=processes, autocast=dtype == torch.float32, width=2)
    assert parts._cmr_group(setup, (side, side), 96) == taken
    alone = cmr_module.group_bytes(side, 1024, rank, dtype.itemsize, 1)
    assert parts._cmr_group(setup, (side, 1024), 1) == alone <= 0.2 * 2**30


def test_twice_differentiated_is_refused(model: nn.Module) -> None:
    term = ConflictRegularizer(lora_pairs(model), SculptConfig())()
    assert term is not None
    with pytest.raises(RuntimeError, match="only once"):
        term.backward(create_graph=True)
