"""Training as a user sees it: logs, masks, learning rates, invariance to how a step is split."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from llava_sculpt.model.files import ADAPTER_FILE, CONNECTOR_FILE, MASKS_FILE
from llava_sculpt.sculpt import kept_count
from llava_sculpt.train import train as entry
from tests.runs import Train, log_of, same_files

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def finished(train: Train, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "sculpt"
    assert train(folder) == 0
    return folder


def test_masked_entries_are_exactly_zero_and_kept_counts_exact(finished: Path) -> None:
    weights, masks = load_file(finished / ADAPTER_FILE), load_file(finished / MASKS_FILE)
    assert weights.keys() == masks.keys()
    for key, mask in masks.items():
        assert int(mask.sum()) == kept_count(mask.numel(), 0.1)
        assert not weights[key][~mask].any()
        assert weights[key][mask].any()


def test_same_seed_same_bytes_other_seed_other_bytes(train: Train, finished: Path, tmp_path: Path) -> None:
    assert train(tmp_path / "again") == 0
    assert same_files(finished, tmp_path / "again")
    assert train(tmp_path / "other", seed=1) == 0
    assert not same_files(finished, tmp_path / "other", (ADAPTER_FILE,))


def test_what_a_run_leaves_is_readable_like_any_other_file(finished: Path) -> None:
    modes = {file.name: file.stat().st_mode for file in finished.iterdir() if file.is_file()}
    assert {ADAPTER_FILE, CONNECTOR_FILE, MASKS_FILE} < modes.keys() and len(set(modes.values())) == 1, modes


def test_evaluation_leaves_training_as_it_is(train: Train, finished: Path, training_data: Path, tmp_path: Path) -> None:
    held_out = {"eval_data_path": training_data / "train.json", "per_device_eval_batch_size": 5}
    assert train(tmp_path / "run", eval_strategy="steps", eval_steps=4, **held_out) == 0
    assert same_files(finished, tmp_path / "run")
    assert [r["loss"] for r in log_of(tmp_path / "run")] == [r["loss"] for r in log_of(finished)]
    history = json.loads((tmp_path / "run" / "trainer_state.json").read_text())["log_history"]
    losses = {record["step"]: record["eval_loss"] for record in history if "eval_loss" in record}
    # (Making the masks at step 5 costs some.)
    assert list(losses) == [4, 8, 12, 16, 18] and losses[18] < losses[8]


def test_logs_hold_every_quantity(finished: Path) -> None:
    log = log_of(finished)
    assert len(log) == 18
    for record in log:
        expected = record["task_loss"] + 0.1 * record["cmr_llm"]
        assert record["loss"] == pytest.approx(expected, rel=1e-6)
        assert record["train_tokens_per_second"] > 0
    assert log[0]["cmr_llm"] == 0  # B = 0
    assert [record["density"] for record in log[:5]] != [pytest.approx(0.1, abs=0.01)] * 5
    assert all(record["density"] == pytest.approx(0.1, abs=0.005) for record in log[5:])


def test_learning_rate_of_every_group_at_every_step(finished: Path) -> None:
    for record in log_of(finished):
        assert record["lr_connector"] == pytest.approx(record["lr_lora"] / 5, rel=1e-12)
    assert max(record["lr_lora"] for record in log_of(finished)) == pytest.approx(5e-3)


class EveryStep(TrainerCallback):
    """After each optimizer step: what is off the mask, in weights and in Adam's moments."""

    def __init__(self, trainer: entry.LLaVASculptTrainer) -> None:
        self.masking, self.steps_checked = trainer.masking, 0

    def on_optimizer_step(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def]
        optimizer = kwargs["optimizer"]
        for key, mask in self.masking.masks.items():
            parameter = self.masking.parameters[key]
            values = [parameter, parameter.grad, *optimizer.state[parameter].values()]
            for value in values:
                if value.shape == mask.shape:
                    assert not value[~mask].any()
            self.steps_checked += 1


def test_nothing_off_the_mask_after_any_step(train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checks: list[EveryStep] = []
    build = entry.build_trainer

    def build_and_watch(*args, **kwargs):  # type: ignore[no-untyped-def]
        trainer = build(*args, **kwargs)
        checks.append(EveryStep(trainer))
        trainer.add_callback(checks[0])
        return trainer

    monkeypatch.setattr(entry, "build_trainer", build_and_watch)
    assert train(tmp_path / "run", weight_decay=0.1) == 0
    assert checks[0].steps_checked == (18 - 5) * 28  # 2 layers x 7 modules x (A, B)


@pytest.mark.parametrize("method", ["sculpt", "lora", "dora", "l2", "orth"])
def test_the_split_of_a_step_does_not_matter(train: Train, tmp_path: Path, method: str) -> None:
    """Gradient accumulation 1 x 8 = 2 x 4 = 8 x 1, regularizer included."""
    logs = []
    for batch, accumulation in ((8, 1), (4, 2), (1, 8)):
        folder = tmp_path / f"{batch}x{accumulation}"
        options = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
        assert train(folder, lora_dropout=0, method=method, reg_lambda=0.02, **options) == 0
        logs.append([record["loss"] for record in log_of(folder)])
    assert len(logs[0]) == 9
    for other in logs[1:]:
        assert torch.allclose(torch.tensor(other), torch.tensor(logs[0]), rtol=0, atol=1e-5)


def test_regularizer_shrinks_what_it_weighs(train: Train, finished: Path, tmp_path: Path) -> None:
    assert train(tmp_path / "strong", sculpt_alpha=10) == 0
    assert train(tmp_path / "none", sculpt_alpha=0) == 0
    assert log_of(tmp_path / "strong")[-1]["cmr_llm"] < 0.5 * log_of(finished)[-1]["cmr_llm"]
    assert not same_files(finished, tmp_path / "none", (ADAPTER_FILE,))


def test_connector_modes(train: Train, tmp_path: Path) -> None:
    for mode, trained in (("frozen", False), ("full", True), ("lora", False), ("sculpt", False)):
        folder = tmp_path / mode
        assert train(folder, connector=mode) == 0
        assert (folder / CONNECTOR_FILE).exists() == trained
        on_connector = [key for key in load_file(folder / ADAPTER_FILE) if "multi_modal_projector" in key]
        assert len(on_connector) == (4 if mode in ("lora", "sculpt") else 0)
        # The connector is never pruned.
        assert not [key for key in load_file(folder / MASKS_FILE) if "multi_modal_projector" in key]
    assert any(record["cmr_connector"] > 0 for record in log_of(tmp_path / "sculpt"))
    assert "cmr_connector" not in log_of(tmp_path / "lora")[0]
    assert not same_files(tmp_path / "lora", tmp_path / "sculpt", (ADAPTER_FILE,))


def test_stock_peft_loads_the_adapter(finished: Path, checkpoint: Path) -> None:
    """PEFT alone, without this package, computes with the trained and pruned matrices."""
    from peft import PeftModel
    from transformers import LlavaForConditionalGeneration

    base = LlavaForConditionalGeneration.from_pretrained(checkpoint)
    loaded = PeftModel.from_pretrained(base, str(finished))
    saved = load_file(finished / ADAPTER_FILE)
    weights = {name.replace(".default", ""): value for name, value in loaded.state_dict().items() if "lora_" in name}
    assert weights.keys() == saved.keys()
    assert all(torch.equal(weights[name], saved[name]) for name in saved)


def test_checkpointing_changes_no_result_and_leaves_the_tower_out(
    train: Train, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The LLM's layers run again in backward, the frozen tower's do not."""
    calls: dict[str, int] = {}
    build = entry.build_trainer

    def build_and_count(*args, **kwargs):  # type: ignore[no-untyped-def]
        trainer = build(*args, **kwargs)
        for name, module in trainer.model.named_modules():
            if name.endswith(".mlp"):
                part = "tower" if "vision_tower" in name else "llm"
                module.register_forward_pre_hook(lambda *_, part=part: calls.update({part: calls.get(part, 0) + 1}))
        return trainer

    monkeypatch.setattr(entry, "build_trainer", build_and_count)
    assert train(tmp_path / "run", activation_checkpointing=True) == 0
    assert same_files(finished, tmp_path / "run")
    assert calls == {"tower": 18 * 2, "llm": 18 * 2 * 2}  # steps x layers (x 2)
