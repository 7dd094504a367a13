"""DeepSpeed's engines on one GPU. What several processes do is in test_engines.py, on the CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.runs import DEEPSPEED, PYTHON, assert_exact, assert_same_run, launch, log_of, needs_deepspeed, zero

pytestmark = [
    pytest.mark.gpu,
    needs_deepspeed,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU (make test-gpu)"),
]


@pytest.mark.parametrize("stage", ["zero2", "zero3", "zero3_offload"])
def test_same_run_as_without_deepspeed(flags: dict[str, str], tmp_path: Path, stage: str) -> None:
    """In float32 to rounding; in bf16, with CMR's fused kernel, the masks hold in every copy."""
    one_gpu = [*DEEPSPEED[:-1], "1"]
    launch(PYTHON, flags, tmp_path / "plain")
    launch(one_gpu, {**flags, **zero(stage)}, tmp_path / "zero")
    launch(one_gpu, {**flags, **zero(stage), "bf16": "True"}, tmp_path / "bf16")
    for name in ("plain", "zero", "bf16"):
        assert_exact(tmp_path / name, 1)
    assert_same_run(tmp_path / "zero", tmp_path / "plain")
    for mine, other in zip(log_of(tmp_path / "bf16"), log_of(tmp_path / "plain"), strict=True):
        assert mine["loss"] == pytest.approx(other["loss"], rel=1e-2)
        assert mine["cmr_llm"] == pytest.approx(other["cmr_llm"], rel=5e-2, abs=1e-6)
