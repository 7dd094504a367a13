"""The GPU kernels of CMR against the plain formula in float64: on a GPU, or in Triton's interpreter on the CPU."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from llava_sculpt.sculpt import (
    Retention,
    conflict_penalty,
    conflict_terms,
    penalties_and_gradients,
    penalty_and_gradients,
    retention_mask,
)
from llava_sculpt.sculpt import cmr as cmr_module
from llava_sculpt.sculpt.cmr import FUSED_MAX_RANK, TILE, TILE_ALONE, fused_gradients_on

triton = pytest.importorskip("triton", reason="needs triton (make setup-dev; on Linux)")
DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
with pytest.MonkeyPatch.context() as patch:  # read when the kernels are declared
    if DEVICE.type == "cpu":
        patch.setitem(os.environ, "TRITON_INTERPRET", "1")
    from triton.runtime.interpreter import InterpretedFunction

    from llava_sculpt.sculpt.fused import group_gradients

pytestmark = pytest.mark.gpu
NORMS = ["fro", "l1"]
Group = tuple[Tensor, Tensor, Tensor]


@pytest.fixture(autouse=True)
def fused_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """What goes to the kernels on a GPU goes to the interpreter here."""
    if DEVICE.type == "cpu":
        for name in ("max", "sum"):  # Triton's own functions were declared when it was imported
            monkeypatch.setattr(triton.language, name, InterpretedFunction(getattr(triton.language, name).fn))
        monkeypatch.setattr(cmr_module, "runs_in_groups", lambda weight: weight.dtype != torch.float32)
        monkeypatch.setattr(cmr_module, "fused_gradients_on", lambda *_: group_gradients)


def make(n: int, p: int, q: int, r: int, norm: str = "fro", factors: torch.dtype = torch.float32) -> Group:
    """n times A, B, W. For L1 of small integers: rounding must not decide the sign of an entry of BA near 0."""
    generator = torch.Generator().manual_seed(p + q + r)
    W = torch.randn(n, p, q, generator=generator) * 0.02
    A, B = torch.randn(n, r, q, generator=generator), torch.randn(n, p, r, generator=generator)
    A, B = (A, B * 1e-3) if norm == "fro" else (A.round(), B.round())
    return A.to(DEVICE, factors), B.to(DEVICE, factors), W.to(DEVICE, torch.bfloat16)


def in_float64(A: Tensor, B: Tensor, W: Tensor, norm: str) -> Group:
    A, B, M = A.double(), B.double(), retention_mask(W).double()
    P = B @ A
    Q = M.square() * P if norm == "fro" else M * P.sign()
    value = (Q * P).sum().sqrt() if norm == "fro" else (Q * P).sum()
    slope = 1 / value if norm == "fro" else 1.0
    return value, slope * (B.T @ Q), slope * (Q @ A.T)


def assert_close(found: Group, expected: Group, tolerance: float = 1e-6) -> None:
    for mine, reference in zip(found, expected, strict=True):
        assert mine.shape == reference.shape
        assert (mine - reference).norm() <= tolerance * reference.norm()


def run(A: Tensor, B: Tensor, W: Tensor, norm: str = "fro", **options: Tensor) -> Group:
    return group_gradients([*A], [*B], [*W], [Retention.of(w) for w in W], norm, **options)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("factors", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("n", "p", "q", "r"),
    [(3, 64, 64, 16), (2, 50, 70, 8), (1, 1, 130, 20), (1, 33, 9, 64), (1, 17, 65, FUSED_MAX_RANK)],
)
def test_any_shape(n: int, p: int, q: int, r: int, factors: torch.dtype, norm: str) -> None:
    A, B, W = make(n, p, q, r, norm, factors)
    found = run(A, B, W, norm)
    assert all(part.dtype == torch.float32 for part in found)
    for index in range(n):
        assert_close(tuple(part[index] for part in found), in_float64(A[index], B[index], W[index], norm))


@pytest.mark.parametrize(
    ("n", "p", "q"), [(2, TILE[0] + 9, 20), (2, 9, TILE[1] + 20), (1, 3 * TILE_ALONE[0] + 9, 20), (1, 9, TILE[1])]
)
def test_several_tiles(n: int, p: int, q: int) -> None:
    A, B, W = make(n, p, q, 4)
    assert_close(tuple(part[0] for part in run(A, B, W)), in_float64(A[0], B[0], W[0], "fro"))


def test_fp16_weights_and_factors_that_lie_anywhere() -> None:
    """Factors of ZeRO-2 are slices of a buffer, at any multiple of their own size."""
    A, B, _ = make(1, 20, 30, 4)
    W = (torch.randn(1, 20, 30) * 0.02).half().to(DEVICE)
    buffer = torch.cat([torch.zeros(1, device=DEVICE), A.flatten(), B.flatten()])
    A, B = buffer[1 : 1 + A.numel()].view_as(A), buffer[1 + A.numel() :].view_as(B)
    assert_close(tuple(part[0] for part in run(A, B, W)), in_float64(A[0], B[0], W[0], "fro"))


@pytest.mark.parametrize("norm", NORMS)
def test_same_bits_again(norm: str) -> None:
    A, B, W = make(2, 20, 70, 8, norm, torch.bfloat16)
    assert all(torch.equal(one, other) for one, other in zip(run(A, B, W, norm), run(A, B, W, norm), strict=True))


@pytest.mark.parametrize("factors", [torch.bfloat16, torch.float32], ids=str)
def test_tiny_huge_and_zero_factors(factors: torch.dtype) -> None:
    """Squares of these leave float32; at 0 value and gradients are exactly 0, whatever the others of the group are."""
    A, B, W = make(3, 24, 20, 4, factors=factors)
    A[0], B[0] = A[0] * 1e15, B[0] * 1e15
    A[1], B[1] = A[1] * 1e-20, B[1] * 1e-20
    B[2] = 0
    found = run(A, B, W)
    for index in range(2):
        value, grad_A, grad_B = in_float64(A[index], B[index], W[index], "fro")
        mine = tuple(part[index] for part in found)
        if index == 1:  # the value, 1e-43, is below float32's normal numbers
            value, mine = torch.ones_like(value), (torch.ones_like(mine[0]), *mine[1:])
        assert_close(mine, (value, grad_A, grad_B))
    assert not any(part[2].any() for part in found)


@pytest.mark.parametrize("norm", NORMS)
def test_a_diverged_adapter_is_not_hidden(norm: str) -> None:
    A, B, W = make(2, 24, 48, 16, norm)
    B[0, 3, 2] = torch.nan
    values, grads_A, grads_B = run(A, B, W, norm)
    assert values[0].isnan() and grads_A[0].isnan().any() and grads_B[0, 3].isnan().all()
    assert all(part[1].isfinite().all() for part in (values, grads_A, grads_B))


def test_scaled_gradients_have_the_dtype_of_their_factors() -> None:
    A, B, W = make(2, 24, 40, 8, factors=torch.bfloat16)
    values, grads_A, grads_B = run(A, B, W)
    scaled = run(A, B, W, scale=torch.tensor(256.0, device=DEVICE))
    assert torch.equal(scaled[0], values)
    for mine, exact in zip(scaled[1:], (grads_A, grads_B), strict=True):
        assert mine.dtype == torch.bfloat16
        torch.testing.assert_close(mine.float(), 256 * exact, rtol=2**-7, atol=0)  # the interpreter truncates


def test_blocks_of_larger_matrices() -> None:
    """What ZeRO-3 passes: rows and columns cut out of A, B and W; the value before its root."""
    A, B, W = (x[0] for x in make(1, 40, 50, 8))
    rows, columns = slice(11, 30), slice(3, 47)
    found = conflict_terms(A[:, columns], B[rows], W[rows, columns], Retention.of(W))
    A, B, M = A[:, columns].double(), B[rows].double(), retention_mask(W)[rows, columns].double()
    Q = M.square() * (B @ A)
    assert found[0].dtype == torch.float64
    assert_close(found, ((Q * (B @ A)).sum(), B.T @ Q, Q @ A.T))


def test_which_matrices_go_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """One shape, one dtype, ranks that fit; what differs goes one by one, with the same result."""
    calls: list[int] = []

    def counted(A: list[Tensor], *others: object, **options: object) -> Group:
        calls.append(len(A))
        return group_gradients(A, *others, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(cmr_module, "fused_gradients_on", lambda *_: counted)
    alike, other = make(2, 20, 24, 4), make(1, 16, 24, 4)
    A, B, W = ([*mine, *others] for mine, others in zip(alike, other, strict=True))
    retentions = [Retention.of(w) for w in W]
    together = penalties_and_gradients(A[:2], B[:2], W[:2], retentions[:2])
    assert calls == [2]
    mixed = penalties_and_gradients(A, B, W, retentions)
    assert calls == [2, 1, 1, 1]
    for index in range(2):
        for one, alone in zip(together, mixed, strict=True):
            torch.testing.assert_close(one[index], alone[index], rtol=1e-5, atol=1e-8)
    assert_close(tuple(part[2] for part in mixed), in_float64(A[2], B[2], W[2], "fro"))
    wide = make(1, 4, 6, FUSED_MAX_RANK + 1)
    penalty_and_gradients(*(x[0] for x in wide), Retention.of(wide[2][0]))
    penalty_and_gradients(A[0], B[0], W[0].float(), Retention.of(W[0].float()))
    assert calls == [2, 1, 1, 1]


@pytest.mark.parametrize("n", [1, 3])
def test_what_a_group_takes(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Launches and memory: four kernels, and `group_bytes` (less what is per thousand entries)."""
    p, q, r = TILE[0] + 8, 40, 16
    A, B, W = make(n, p, q, r, factors=torch.bfloat16)
    module = sys.modules[group_gradients.__module__]
    launched, taken = [], []

    class Launcher:
        def __init__(self, name: str) -> None:
            self.name = name

        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            return lambda *_, **__: launched.append(self.name)

    empty = torch.empty
    for name in ("_largest", "_walk", "_add_up", "_finish"):
        monkeypatch.setattr(module, name, Launcher(name))
    monkeypatch.setattr(torch, "empty", lambda *size, **how: (taken.append(empty(*size, **how)), taken[-1])[1])
    retentions = [Retention.of(w) for w in W]
    taken.clear()
    group_gradients([*A], [*B], [*W], retentions, "fro", torch.ones((), device=DEVICE))
    assert launched == ["_largest", "_walk", "_add_up", "_finish"]
    assert sum(x.nbytes for x in taken) == pytest.approx(cmr_module.group_bytes(p, q, r, 2, n), rel=0.02)


def test_addresses_are_copied_once_and_again_when_they_change(monkeypatch: pytest.MonkeyPatch) -> None:
    A, B, W = make(1, 16, 16, 4)
    retentions = [Retention.of(W[0])]
    tables = sys.modules[group_gradients.__module__]._pointer_table
    first = group_gradients([*A], [*B], [*W], retentions, "fro")
    misses = tables.cache_info().misses
    group_gradients([*A], [*B], [*W], retentions, "fro")
    assert tables.cache_info().misses == misses
    moved = A.clone() * 2
    second = group_gradients([*moved], [*B], [*W], retentions, "fro")
    assert tables.cache_info().misses == misses + 1
    torch.testing.assert_close(second[0], 2 * first[0])


def test_retention_of_another_dtype_is_refused() -> None:
    A, B, W = make(1, 16, 16, 4)
    with pytest.raises(ValueError, match=r"prepared for torch\.bfloat16, weight is torch\.float16"):
        group_gradients([*A], [*B], [*W.half()], [Retention.of(W[0])], "fro")


def test_another_device_is_refused() -> None:
    A, B, W = make(1, 16, 16, 4)
    retention = Retention.of(W[0])
    with pytest.raises(ValueError, match="must be on one device"):
        penalties_and_gradients([*A.to("meta")], [*B], [*W], [retention])
    assert retention.table is not None
    retention.table = retention.table.to("meta")
    with pytest.raises(ValueError, match="must be on one device"):
        penalties_and_gradients([*A], [*B], [*W], [retention])


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("factors", [torch.bfloat16, torch.float32], ids=str)
def test_the_probe_passes(factors: torch.dtype, norm: str) -> None:
    assert fused_gradients_on(DEVICE, 16, factors, norm) is group_gradients


def test_where_it_cannot_be_had_a_warning_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llava_sculpt.sculpt.fused", None)
    with pytest.warns(UserWarning, match="without its fused GPU kernels, and slower: import of .* halted"):
        assert fused_gradients_on(DEVICE, 17, torch.float32, "l1") is None


@pytest.mark.parametrize("wrong", [0, 1, 2])
def test_a_wrong_kernel_is_not_used(wrong: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: object) -> Group:
        parts = [*group_gradients(*arguments)]  # type: ignore[arg-type]
        parts[wrong][1] *= 1.001  # of the second matrix alone
        return tuple(parts)

    monkeypatch.setattr(sys.modules[group_gradients.__module__], "group_gradients", broken)
    with pytest.warns(UserWarning, match="its result is off by 1e-03"):
        assert fused_gradients_on(DEVICE, 18 + wrong, torch.float32, "fro") is None


COMPILED = """
import sys
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
import torch, triton.language as tl
from llava_sculpt.sculpt import fused
from llava_sculpt.sculpt.cmr import TILE

def built(kernel, architecture, constants, **types):
    names, warps = kernel.arg_names, constants.pop("num_warps", 4)
    types |= dict(pointers="*i64", units="*i32", p="i32", q="i32", rank="i32", parts_A="*fp32", parts_B="*fp32")
    signature = {name: types.get(name, "constexpr") for name in names}
    values = {(names.index(name),): constants[name] for name in names if name not in types}
    aligned = {(index,): [["tt.divisibility", 16]] for index, name in enumerate(names) if name in types}
    source = ASTSource(fn=kernel, signature=signature, constexprs=values, attrs=aligned)
    return compile(source, target=GPUTarget("cuda", architecture, 32), options=dict(num_warps=warps, num_stages=1))

for case in sys.argv[1:]:
    architecture, rank, dtype = case.split(",")
    factor = dict(FACTOR=fused._DTYPES[getattr(torch, dtype)], ALIGNED=True, UNITS=16, BLOCK=1024)
    walk = dict(OPERAND=tl.bfloat16, SPLIT=dtype != "bfloat16", L1=False)
    walk |= dict(TILE_ROWS=TILE[0], TILE_COLUMNS=TILE[1], **fused._tile(int(rank)))
    kernel = built(fused._walk, int(architecture), factor | walk)
    print(kernel.metadata.shared, kernel.asm["ptx"].count("mma"))
    built(fused._largest, int(architecture), dict(factor))
    built(fused._add_up, int(architecture), factor | dict(COUNT=4), dots="*fp64")
    finish = dict(COUNT_A=8, COUNT_B=4, BLOCKS_B=256, DOTS=256, SCALED=True, NORM="fro", UNITS=16, BLOCK=1024)
    written = dict.fromkeys(("grads_A", "grads_B"), f"*{factor['FACTOR']}")
    built(fused._finish, int(architecture), finish, dots="*fp64", values="*fp32", scale="*fp32", **written)
"""
SHARED = {"80": 163, "89": 99, "90": 227}  # KB that a program may have (CUDA C++ programming guide)
QUICK = ["89,32,bfloat16", "89,128,float32"]
ALL = [
    f"{arch},{rank},{dtype}" for arch in (80, 89, 90) for rank in (16, 32, 64, 128) for dtype in ("bfloat16", "float32")
]


@pytest.mark.skipif(sys.platform != "linux", reason="Triton compiles on Linux")
@pytest.mark.parametrize("cases", [QUICK, pytest.param(ALL, marks=pytest.mark.slow)], ids=["quick", "all"])
def test_compiles_for_cards_that_are_not_here(cases: list[str], tmp_path: Path) -> None:
    """All kernels, to machine code; the products are the tensor cores', and the card's shared memory is enough."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", COMPILED, *cases], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    measured = [line.split() for line in done.stdout.splitlines()]
    assert len(measured) == len(cases)
    for case, (shared, products) in zip(cases, measured, strict=True):
        assert int(shared) <= 1024 * SHARED[case.split(",")[0]] and int(products) > 0, case


@pytest.mark.skipif(DEVICE.type == "cpu", reason="needs a GPU (make test-gpu)")
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("r", [16, 32, 64, FUSED_MAX_RANK, FUSED_MAX_RANK + 1])
@pytest.mark.parametrize("factors", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_penalty_on_a_gpu(
    dtype: torch.dtype, factors: torch.dtype, r: int, norm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole matrices, fused or not, with TF32 asked for elsewhere; the same bits again."""
    monkeypatch.setattr(torch.backends.cuda.matmul, "fp32_precision", "tf32", raising=False)
    A, B, W = (x[0] for x in make(1, 1408, 1024, r, norm, factors))
    W = W.to(dtype)
    results = [penalty_and_gradients(A, B, W, Retention.of(W), norm) for _ in range(2)]
    assert all(torch.equal(first, again) for first, again in zip(*results, strict=True))
    assert_close(results[0], in_float64(A, B, W, norm))
    A, B = (factor.clone().requires_grad_() for factor in (A, B))
    gradients = torch.autograd.grad(conflict_penalty(A, B, W, norm=norm), (A, B))
    assert all(torch.equal(a, b.to(factors)) for a, b in zip(gradients, results[0][1:], strict=True))
