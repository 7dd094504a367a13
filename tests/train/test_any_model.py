"""The method on models that are not LLaVA, in front of the plain Trainer: exact masks, resume, accumulation."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration, Trainer, TrainingArguments, set_seed

from llava_sculpt import SculptConfig, SculptMixin
from llava_sculpt.errors import UserError
from llava_sculpt.model.files import ADAPTER_FILE, MASKS_FILE
from llava_sculpt.sculpt import kept_count

SCRIPT = Path(__file__).parents[2] / "scripts" / "sculpt_any_model.py"
STEPS, MASK_STEP = 12, 3


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("sculpt_any_model", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(script: ModuleType, folder: Path, *flags: str) -> Path:
    assert script.main(["--output_dir", str(folder), "--max_steps", str(STEPS), *flags]) == 0
    return folder


@pytest.fixture(scope="module")
def whole(script: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(script, tmp_path_factory.mktemp("any") / "whole", "--save_steps", "1")


def log_of(folder: Path) -> list[dict[str, float]]:
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [record for record in history if "loss" in record]


def assert_masked(folder: Path, density: float = 0.1) -> None:
    weights, masks = load_file(folder / ADAPTER_FILE), load_file(folder / MASKS_FILE)
    for key, mask in masks.items():
        assert int(mask.sum()) == kept_count(mask.numel(), density)
        assert not weights[key].masked_select(~mask).any()


def test_masks_are_exact_and_kept(whole: Path) -> None:
    masks = load_file(whole / MASKS_FILE)
    assert masks.keys() == load_file(whole / ADAPTER_FILE).keys() and len(masks) == 2 * 7 * 2
    for step in range(1, STEPS + 1):
        checkpoint = whole / f"checkpoint-{step}"
        assert (checkpoint / MASKS_FILE).exists() == (step > MASK_STEP)
        if step > MASK_STEP:
            assert_masked(checkpoint)
            assert (checkpoint / MASKS_FILE).read_bytes() == (whole / MASKS_FILE).read_bytes()
    assert_masked(whole)


def test_loss_is_task_plus_regularizer(whole: Path) -> None:
    log = log_of(whole)
    assert log[0]["cmr_llm"] == 0 and log[-1]["cmr_llm"] > 0
    for record in log:
        assert record["loss"] == pytest.approx(record["task_loss"] + 1e-2 * record["cmr_llm"], abs=1e-6)
    assert log[-1]["task_loss"] < log[0]["task_loss"] - 0.2
    assert log[-1]["density"] == pytest.approx(0.1, abs=5e-3)


@pytest.mark.parametrize("step", [MASK_STEP - 1, MASK_STEP, MASK_STEP + 1])
def test_resumed_equals_uninterrupted(script: ModuleType, whole: Path, tmp_path: Path, step: int) -> None:
    shutil.copytree(whole / f"checkpoint-{step}", tmp_path / "run" / f"checkpoint-{step}")
    folder = run(script, tmp_path / "run", "--resume")
    for name in (ADAPTER_FILE, MASKS_FILE):
        assert (folder / name).read_bytes() == (whole / name).read_bytes()
    for key in ("loss", "task_loss", "cmr_llm"):
        assert [record[key] for record in log_of(folder)] == [record[key] for record in log_of(whole)]


def test_resume_without_its_masks_is_refused(script: ModuleType, whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole / "checkpoint-6", tmp_path / "run" / "checkpoint-6")
    (tmp_path / "run" / "checkpoint-6" / MASKS_FILE).unlink()
    with pytest.raises(UserError, match="step 6 is after the mask step 3"):
        run(script, tmp_path / "run", "--resume")


@pytest.mark.parametrize(("batch", "accumulation"), [(4, 2), (1, 8)])
def test_accumulation_changes_nothing(
    script: ModuleType, whole: Path, tmp_path: Path, batch: int, accumulation: int
) -> None:
    folder = run(script, tmp_path / "split", "--batch", str(batch), "--accumulation", str(accumulation))
    for mine, other in zip(log_of(folder), log_of(whole), strict=True):
        for key in ("loss", "task_loss", "cmr_llm"):
            assert mine[key] == pytest.approx(other[key], rel=1e-4, abs=1e-6)


# A vision-language model with names of its own: `visual`, a merger as connector, `language_model`.
QWEN = Qwen2VLConfig(
    text_config=dict(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, rope_parameters={"rope_type": "default", "mrope_section": [2, 3, 3]},
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    ),
    vision_config=dict(depth=1, embed_dim=16, hidden_size=32, num_heads=2, mlp_ratio=2, patch_size=4),
    image_token_id=60, video_token_id=61, vision_start_token_id=62, vision_end_token_id=63,
)  # fmt: skip
QWEN_LLM = r".*language_model\.layers.*\.(q|k|v|o|gate|up|down)_proj"
QWEN_MERGER = r".*visual\.merger\.mlp\.[02]"


class SculptTrainer(SculptMixin, Trainer):
    pass


def qwen_trainer(folder: Path, sculpt: SculptConfig, lora: dict[str, Any] | None = None, **arguments: Any) -> Any:
    set_seed(0)
    model = get_peft_model(
        Qwen2VLForConditionalGeneration(QWEN),
        LoraConfig(r=4, target_modules=f"({QWEN_LLM})|({QWEN_MERGER})", **(lora or {})),
    )
    # One picture of 4 x 4 patches, which the merger makes 4 tokens of.
    ids = [1, 62, 60, 60, 60, 60, 63, 5, 6, 7, 8, 2]
    rows = [{"input_ids": [*ids[:-4], n % 50, (n + 1) % 50, (n + 2) % 50, 2], "n": n} for n in range(3, 19)]

    def collate(samples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        input_ids = torch.tensor([sample["input_ids"] for sample in samples])
        pixels = [torch.randn(16, 96, generator=torch.Generator().manual_seed(s["n"])) for s in samples]
        return {
            "input_ids": input_ids,
            "mm_token_type_ids": (input_ids == 60).int(),
            "labels": input_ids.where(input_ids < 60, -100),
            "pixel_values": torch.cat(pixels),
            "image_grid_thw": torch.tensor([[1, 4, 4]] * len(samples)),
        }

    defaults = {"max_steps": 6, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "logging_steps": 1}
    training = TrainingArguments(
        str(folder), report_to="none", disable_tqdm=True, remove_unused_columns=False, **(defaults | arguments)
    )
    return SculptTrainer(model, training, train_dataset=rows, data_collator=collate, sculpt=sculpt)


def test_qwen2_vl_with_a_regularized_connector(tmp_path: Path) -> None:
    sculpt = SculptConfig(warmup_steps=2, prune=QWEN_LLM, beta=1e-2, connector=QWEN_MERGER)
    trainer = qwen_trainer(tmp_path / "run", sculpt)
    assert len(trainer.regularizer.llm) == 6 and len(trainer.regularizer.connector) == 2
    trainer.train()
    trainer.save_model()
    assert_masked(tmp_path / "run")
    masks, weights = load_file(tmp_path / "run" / MASKS_FILE), load_file(tmp_path / "run" / ADAPTER_FILE)
    prefix = "base_model.model."
    expected = {key for key in weights if re.fullmatch(QWEN_LLM, key.removeprefix(prefix).rsplit(".lora_", 1)[0])}
    assert masks.keys() == expected and len(expected) == 2 * 7 * 2
    merger = [value for key, value in weights.items() if "merger" in key]
    assert len(merger) == 4 and all(torch.count_nonzero(value) == value.numel() for value in merger)
    last = [record for record in trainer.state.log_history if "loss" in record][-1]
    assert last["cmr_connector"] > 0 and last["cmr_llm"] > 0


def test_evaluation_is_without_the_regularizer(tmp_path: Path) -> None:
    trainer = qwen_trainer(tmp_path / "run", SculptConfig(warmup_steps=2, alpha=0.0))
    trainer.train()
    before = trainer.evaluate(trainer.train_dataset)["eval_loss"]
    trainer.regularizer = lambda: torch.tensor(1e6)
    assert trainer.evaluate(trainer.train_dataset)["eval_loss"] == before


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"prune": r".*\.c_attn"}, r"prune: no LoRA layer matches '\.\*\\\\\.c_attn' \(LoRA is on 16 layers"),
        ({"regularize": "query"}, "regularize: no LoRA layer matches 'query'"),
        ({"connector": "nothing"}, "connector: no LoRA layer matches"),
    ],
)
def test_patterns_that_match_nothing_are_refused(tmp_path: Path, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        qwen_trainer(tmp_path / "run", SculptConfig(**settings))


def test_dora_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="DoRA"):
        qwen_trainer(tmp_path / "run", SculptConfig(), {"use_dora": True})


def test_training_shorter_than_the_warm_up_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="training ends after 6 steps"):
        qwen_trainer(tmp_path / "run", SculptConfig(warmup_steps=100)).train()


def test_impossible_settings_are_told_at_once() -> None:
    with pytest.raises(UserError) as caught:
        SculptConfig(density=0, warmup_steps=-1, omega=0, alpha=-1, reduction="max", prune="(")
    told = [problem.partition(":")[0] for problem in caught.value.problems]
    assert told == ["density", "warmup_steps", "omega", "alpha", "reduction", "prune"]
