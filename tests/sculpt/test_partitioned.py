"""CMR over pieces of W equals CMR of the whole W, on any number of processes and however ragged the pieces."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import distributed as dist

from llava_sculpt.sculpt import WeightPiece, conflict_penalty, partitioned_penalties, partitioned_retentions

SHAPES = [(7, 5), (16, 3), (1, 11), (9, 8)]


def matrices(dtype: torch.dtype) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    made = []
    for p, q in SHAPES:
        A, B = torch.randn(2, q, generator=generator), torch.randn(p, 2, generator=generator)
        made.append((A, B, (torch.randn(p, q, generator=generator) * 0.02).to(dtype)))
    return made


def piece_of(weight: torch.Tensor, rank: int, processes: int) -> WeightPiece:
    """As ZeRO-3 cuts: equal pieces, the last ones short or empty."""
    size = -(-weight.numel() // processes)
    return WeightPiece(weight.flatten()[rank * size : (rank + 1) * size], rank * size, tuple(weight.shape))


@given(p=st.integers(1, 9), q=st.integers(1, 9), cuts=st.tuples(st.integers(0, 81), st.integers(0, 81)))
def test_blocks_are_the_piece(p: int, q: int, cuts: tuple[int, int]) -> None:
    weight = torch.arange(p * q).view(p, q)
    start, end = sorted(min(cut, p * q) for cut in cuts)
    rebuilt, blocks = torch.full((p, q), -1), 0
    for rows, columns, block in WeightPiece(weight.flatten()[start:end], start, (p, q)).blocks():
        assert (rebuilt[rows, columns] == -1).all()
        rebuilt[rows, columns] = block
        blocks += 1
    assert blocks <= 3
    assert torch.equal(rebuilt.flatten()[start:end], weight.flatten()[start:end])
    assert int((rebuilt == -1).sum()) == p * q - (end - start)


def run_rank(rank: int, processes: int, folder: str, norm: str, dtype: torch.dtype) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=processes)
    lora_A, lora_B, weights = zip(*matrices(dtype), strict=True)
    for factor in (*lora_A, *lora_B):
        factor.requires_grad_()
    pieces = [piece_of(weight, rank, processes) for weight in weights]
    retentions = partitioned_retentions(pieces, 1.0, torch.device("cpu"))
    penalties = partitioned_penalties(lora_A, lora_B, pieces, retentions, norm)
    penalties.sum().backward()
    torch.save([penalties.detach(), *(f.grad for f in (*lora_A, *lora_B))], f"{folder}/rank{rank}.pt")

    broken = [WeightPiece(torch.full((1,), float("inf") if rank == 0 else 1.0), rank, (1, processes))]
    try:
        partitioned_retentions(broken, 1.0, torch.device("cpu"))
    except ValueError as error:
        Path(f"{folder}/error{rank}").write_text(str(error))
    dist.destroy_process_group()


@pytest.mark.parametrize(("processes", "norm", "dtype"), [(2, "l1", torch.float32), (3, "fro", torch.bfloat16)])
def test_equals_the_whole(tmp_path: Path, processes: int, norm: str, dtype: torch.dtype) -> None:
    context = multiprocessing.get_context("spawn")
    ranks = [
        context.Process(target=run_rank, args=(rank, processes, str(tmp_path), norm, dtype))
        for rank in range(processes)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(120)
        assert process.exitcode == 0
    results = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(processes)]
    made = matrices(dtype)
    for A, B, _ in made:
        A.requires_grad_()
        B.requires_grad_()
    expected = torch.stack([conflict_penalty(*matrix, norm=norm) for matrix in made])
    expected.sum().backward()
    gradients = [A.grad for A, _, _ in made] + [B.grad for _, B, _ in made]
    for result in results:
        torch.testing.assert_close(result[0], expected.detach(), rtol=1e-6, atol=0)
    for index, gradient in enumerate(gradients, start=1):
        mean = torch.stack([result[index] for result in results]).mean(0)
        torch.testing.assert_close(mean, gradient, rtol=1e-5, atol=1e-6)
    # What is wrong with one process's piece is told on all, instead of leaving the others to wait.
    assert all("inf or NaN" in (tmp_path / f"error{rank}").read_text() for rank in range(processes))


def test_alone_it_is_the_plain_penalty_and_exactly_zero_at_the_start() -> None:
    (A, B, weight), *_ = matrices(torch.float32)
    A.requires_grad_()
    B = torch.zeros_like(B).requires_grad_()
    pieces = [piece_of(weight, 0, 1)]
    penalties = partitioned_penalties([A], [B], pieces, partitioned_retentions(pieces, 1.0, A.device))
    penalties.sum().backward()
    assert penalties.tolist() == [0.0] and not A.grad.any() and not B.grad.any()


def test_shapes_that_do_not_fit_are_refused() -> None:
    (A, B, weight), *_ = matrices(torch.float32)
    piece = piece_of(weight.T, 0, 1)
    with pytest.raises(ValueError, match="expected A"):
        partitioned_penalties([A], [B], [piece], partitioned_retentions([piece], 1.0, A.device))
