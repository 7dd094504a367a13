"""The training-time baselines through the entry point: each one's own parameters or penalty change the run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from llava_sculpt.artifacts.inference import load_for_inference
from llava_sculpt.errors import UserError
from llava_sculpt.model.adapter import load_adapter, read_adapter
from llava_sculpt.model.checkpoint import find_base_checkpoint
from llava_sculpt.model.files import ADAPTER_CONFIG, ADAPTER_FILE, CONNECTOR_FILE, MASKS_FILE
from llava_sculpt.model.load import load_base
from llava_sculpt.model.lora import lora_pairs
from tests.runs import Train, cut_off_after, log_of, same_files

TRAINED = (ADAPTER_FILE, CONNECTOR_FILE)
MODULES = 14  # 2 layers x 7


@pytest.fixture(scope="module")
def lora(train: Train, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "lora"
    assert train(folder, method="lora") == 0
    return folder


@pytest.fixture(scope="module")
def dora(train: Train, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "dora"
    assert train(folder, method="dora", save_steps=6, save_total_limit=9) == 0
    return folder


def squares(folder: Path) -> float:
    return sum(float(value.double().square().sum()) for value in load_file(folder / ADAPTER_FILE).values())


@pytest.mark.parametrize("method", ["l2", "orth"])
def test_lambda_zero_is_lora_and_lambda_is_felt(train: Train, lora: Path, tmp_path: Path, method: str) -> None:
    assert train(tmp_path / "none", method=method, reg_lambda=0) == 0
    assert same_files(tmp_path / "none", lora, TRAINED)
    assert f"{method}_penalty" not in log_of(tmp_path / "none")[0]
    ends = []
    for strength in (1e-3, 10):
        folder = tmp_path / str(strength)
        assert train(folder, method=method, reg_lambda=strength) == 0
        assert not same_files(folder, lora, (ADAPTER_FILE,))
        for record in log_of(folder):
            expected = record["task_loss"] + strength * record[f"{method}_penalty"]
            assert record["loss"] == pytest.approx(expected, rel=1e-6)
        ends.append(log_of(folder)[-1][f"{method}_penalty"])
    assert ends[1] < 0.6 * ends[0]


def test_the_logged_l2_value_is_that_of_the_weights(train: Train, tmp_path: Path) -> None:
    """The log of step 2 is taken before its update: it is the value of the weights after step 1."""
    assert train(tmp_path / "one", method="l2", max_steps=1, warmup_steps=0, lr_scheduler_type="constant") == 0
    assert train(tmp_path / "two", method="l2", max_steps=2, warmup_steps=0, lr_scheduler_type="constant") == 0
    assert log_of(tmp_path / "two")[1]["l2_penalty"] == pytest.approx(squares(tmp_path / "one"), rel=1e-6)


def test_orth_starts_at_zero_and_covers_every_matrix(train: Train, tmp_path: Path, checkpoint: Path) -> None:
    options = {"method": "orth", "warmup_steps": 0, "lr_scheduler_type": "constant", "connector": "lora"}
    assert train(tmp_path / "one", max_steps=1, **options) == 0
    assert train(tmp_path / "two", max_steps=2, **options) == 0
    log = log_of(tmp_path / "two")
    assert log[0]["orth_penalty"] == 0  # B = 0
    pairs = lora_pairs(load_for_inference(str(tmp_path / "one")).model)
    assert len(pairs) == MODULES + 2  # the connector's LoRA counts too
    norms = [(p.weight().double().T @ p.lora_B.double() @ p.lora_A.double()).norm() for p in pairs]
    assert log[1]["orth_penalty"] == pytest.approx(float(sum(norms)), rel=1e-5)


def test_dora_trains_its_magnitudes(lora: Path, dora: Path) -> None:
    """Frozen magnitudes would make DoRA another LoRA with a rescaled forward pass."""
    assert json.loads((dora / ADAPTER_CONFIG).read_text())["use_dora"] is True
    start, end = (load_file(folder / ADAPTER_FILE) for folder in (dora / "checkpoint-6", dora))
    keys = [key for key in end if key.endswith(".lora_magnitude_vector")]
    assert len(keys) == MODULES and len(end) == 3 * MODULES
    assert all((start[key] != end[key]).all() and end[key].dtype == torch.float32 for key in keys)
    plain = load_file(lora / ADAPTER_FILE)
    assert all(not torch.equal(plain[key], end[key]) for key in plain)
    losses = [[record["loss"] for record in log_of(folder)] for folder in (lora, dora)]
    assert losses[0][0] == pytest.approx(losses[1][0], rel=1e-5)  # B = 0: both are the base model
    assert losses[0][2:] != pytest.approx(losses[1][2:], rel=1e-5)


def test_dora_loads_as_it_was_trained(dora: Path) -> None:
    model = load_for_inference(str(dora)).model
    saved = load_file(dora / ADAPTER_FILE)
    own = {key: parameter for pair in lora_pairs(model) for key, parameter in pair.parameters()}
    assert own.keys() == saved.keys()
    assert all(torch.equal(own[key], saved[key]) for key in saved)


def test_dora_is_merged_for_inference_and_computes_the_same(dora: Path, checkpoint: Path) -> None:
    loaded = load_for_inference(str(dora))
    assert all(pair.layer.merged for pair in lora_pairs(loaded.model))
    base = find_base_checkpoint(str(checkpoint))
    unmerged = load_adapter(load_base(base, torch.float32), read_adapter(dora), base).eval()
    inputs = {"input_ids": torch.arange(3, 40).unsqueeze(0), "use_cache": False}
    with torch.no_grad():
        merged_logits, logits = loaded.model(**inputs).logits, unmerged(**inputs).logits
        plain = load_base(base, torch.float32).eval()(**inputs).logits
    assert torch.allclose(merged_logits, logits, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(plain, logits, rtol=1e-2, atol=1e-3)


def test_dora_without_a_magnitude_is_refused(dora: Path, tmp_path: Path) -> None:
    tensors = load_file(dora / ADAPTER_FILE)
    lost = next(key for key in tensors if "magnitude" in key)
    del tensors[lost]
    for name in (ADAPTER_CONFIG, CONNECTOR_FILE):
        (tmp_path / name).write_bytes((dora / name).read_bytes())
    save_file(tensors, tmp_path / ADAPTER_FILE, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lora_magnitude_vector is missing"):
        load_for_inference(str(tmp_path))


@pytest.mark.parametrize("method", ["dora", "orth"])
def test_resumed_equals_uninterrupted(train: Train, tmp_path: Path, method: str) -> None:
    assert train(tmp_path / "whole", method=method, save_steps=6, save_total_limit=9) == 0
    folder = cut_off_after(6, tmp_path / "whole", tmp_path / "cut")
    assert train(folder, method=method) == 0
    assert same_files(folder, tmp_path / "whole", TRAINED)


def test_srr_alone_and_rkh_alone(train: Train, lora: Path, tmp_path: Path) -> None:
    assert train(tmp_path / "srr", sculpt_alpha=0, sculpt_beta=0) == 0
    assert (tmp_path / "srr" / MASKS_FILE).exists()
    assert "cmr_llm" not in log_of(tmp_path / "srr")[-1]
    # Nothing is pruned, so no step for it need exist.
    assert train(tmp_path / "rkh", sculpt_density=1.0, sculpt_warmup_steps=500, save_steps=6, save_total_limit=9) == 0
    assert not (tmp_path / "rkh" / MASKS_FILE).exists()
    assert log_of(tmp_path / "rkh")[-1]["cmr_llm"] > 0
    folder = cut_off_after(6, tmp_path / "rkh", tmp_path / "cut")
    assert train(folder, sculpt_density=1.0, sculpt_warmup_steps=500) == 0
    assert same_files(folder, tmp_path / "rkh", TRAINED)
    assert train(tmp_path / "neither", sculpt_density=1.0, sculpt_alpha=0, sculpt_beta=0) == 0
    assert same_files(tmp_path / "neither", lora, TRAINED)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"method": "adapter"}, "method"),
        ({"method": "l2", "reg_lambda": -1}, "reg_lambda: must not be negative"),
        ({"method": "dora", "connector": "sculpt"}, "connector: sculpt needs method: sculpt"),
    ],
)
def test_bad_settings(
    train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: dict, words: str
) -> None:
    assert train(tmp_path / "run", **change) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
