"""A training step as a GPU sees it: logits where there are labels, and no waiting of the host in a micro-step."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from transformers import TrainerCallback

from llava_sculpt.config_reader import parse_config
from llava_sculpt.data.collator import TrainCollator
from llava_sculpt.data.conversation import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava_sculpt.model.checkpoint import BaseCheckpoint, find_base_checkpoint
from llava_sculpt.model.load import load_base
from llava_sculpt.model.lora import inject_lora, lora_pairs
from llava_sculpt.model.whole import read_run
from llava_sculpt.train import train as entry
from llava_sculpt.train.callback import SculptCallback
from tests.runs import Train, log_of, same_files

# Four are transformers' in every forward (images against placeholders, padding), one is made inside PyTorch.
FORWARD_WAITS = 5


@pytest.fixture(scope="module")
def base(checkpoint: Path) -> BaseCheckpoint:
    return find_base_checkpoint(str(checkpoint))


@pytest.fixture
def model(base: BaseCheckpoint) -> nn.Module:
    torch.manual_seed(0)
    model = inject_lora(load_base(base, torch.float32), r=4, lora_alpha=8, dropout=0, connector="full")
    for pair in lora_pairs(model):
        nn.init.normal_(pair.lora_B, std=0.05)
    return model.train()


def sample(ids: list[int], trained: list[bool], image: bool) -> dict[str, Any]:
    labels = [n if keep else IGNORE_INDEX for n, keep in zip(ids, trained, strict=True)]
    pixels = torch.rand(3, 16, 16) if image else None
    return {"input_ids": torch.tensor(ids), "labels": torch.tensor(labels), "pixel_values": pixels}


PICTURE = sample([1, 5, IMAGE_TOKEN_INDEX, 6, 7, 8, 2], [False] * 4 + [True] * 3, image=True)
DIALOGUE = sample([1, 8, 9, 2, 10, 11, 2, 12], [False, False, True, True, False, False, True, True], image=False)
UNTRAINED = sample([1, 8, 9], [False] * 3, image=False)


@pytest.mark.parametrize("samples", [[PICTURE, DIALOGUE], [DIALOGUE, UNTRAINED], [UNTRAINED]])
@pytest.mark.parametrize("items", [None, 10])
def test_loss_and_gradients_are_those_of_all_logits(
    model: nn.Module, base: BaseCheckpoint, samples: list[dict[str, Any]], items: int | None
) -> None:
    fill = TrainCollator(base.pad_token_id, base.image_token_id, base.image_tokens, base.image_size, 100)
    batch = fill(samples)
    every = {key: value for key, value in batch.items() if key not in ("logits_to_keep", "shift_labels")}
    found = []
    for inputs in (batch, every):
        model.zero_grad()
        output = model(**inputs, num_items_in_batch=None if items is None else torch.tensor(items))
        output.loss.backward()
        found.append((output.logits, output.loss.detach(), [p.grad for p in model.parameters() if p.requires_grad]))
    (logits, loss, gradients), (all_logits, all_loss, all_gradients) = found
    assert logits.shape[:2] == batch["shift_labels"].shape and all_logits.shape[:2] == batch["input_ids"].shape
    torch.testing.assert_close(loss, all_loss, rtol=1e-6, atol=0, equal_nan=True)
    for mine, other in zip(gradients, all_gradients, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-8, equal_nan=True)


def test_a_mask_costs_one_operation_and_keeps_the_bits(model: nn.Module) -> None:
    masking = SculptCallback(lora_pairs(model), 0.1, 1)
    for key, parameter in masking.parameters.items():
        masking._hold(key, torch.rand(parameter.shape) < 0.1)
    parameter, mask = next((masking.parameters[key], mask) for key, mask in masking.masks.items())
    gradient = torch.randn(parameter.shape)
    gradient.view(-1)[:3] = torch.tensor([torch.nan, torch.inf, -0.0])
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        parameter.backward(gradient)
    assert parameter.grad is not None
    wanted = gradient.masked_fill(~mask, 0)
    assert torch.equal(parameter.grad.view(torch.int32), wanted.view(torch.int32))
    ran = Counter({event.key: event.count for event in profiler.key_averages()})
    assert ran["aten::where"] == 1 and not ran["aten::masked_fill"] and not ran["aten::bitwise_not"]
    assert masking.measured_density() == 1  # of the weights, not the masks


class Waits(TrainerCallback):
    """In each optimizer step, from its first forward to its optimizer: how often the host asks for a number."""

    def __init__(self) -> None:
        self.counts: list[int] = []

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.profiler = profile(activities=[ProfilerActivity.CPU])
        self.profiler.__enter__()

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.profiler.__exit__(None, None, None)
        ran = Counter({event.key: event.count for event in self.profiler.key_averages()})
        self.counts.append(ran["aten::_local_scalar_dense"] + ran["aten::nonzero"])


def watched(monkeypatch: pytest.MonkeyPatch, callback: TrainerCallback) -> None:
    build = entry.build_trainer

    def build_and_watch(*args: Any, **kwargs: Any) -> Any:
        trainer = build(*args, **kwargs)
        trainer.add_callback(callback)
        return trainer

    monkeypatch.setattr(entry, "build_trainer", build_and_watch)


def test_a_micro_step_waits_for_nothing_of_ours(train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also behind the mask step."""
    found = []
    for accumulation in (1, 3):
        waits = Waits()
        with monkeypatch.context() as patch:
            watched(patch, waits)
            flags = {"gradient_accumulation_steps": accumulation, "max_steps": 7, "logging_steps": 7}
            assert train(tmp_path / str(accumulation), include_num_input_tokens_seen="non_padding", **flags) == 0
        found.append(waits.counts)
    assert min(found[0][1:]) == max(found[0][1:]), "the masks, made at step 5, ask for nothing"
    per_micro_step = (found[1][-1] - found[0][-1]) / 2
    # (The look at loss and gradient norm, once per optimizer step, is one `tolist`, which is not counted.)
    assert (per_micro_step, found[0][-1]) == (FORWARD_WAITS, FORWARD_WAITS)
    tokens = [log_of(tmp_path / str(n))[-1]["num_input_tokens_seen"] for n in (1, 3)]
    assert tokens[1] > 2 * tokens[0] > 0


def test_plan_auto_takes_the_fastest_setting(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "activation_checkpointing": True}
    options = '{"every_n_layers": 2}'
    flags = {**given, "activation_checkpointing_kwargs": options, "max_steps": 6, "lora_dropout": 0}
    assert train(tmp_path / "given", **flags) == 0
    assert train(tmp_path / "none", **flags, plan="auto") == 0
    assert "no GPU here: a step is computed as given" in capsys.readouterr().out
    assert same_files(tmp_path / "given", tmp_path / "none")
    monkeypatch.setattr(entry, "gpu_memory", lambda: 80 * 10**9)
    assert train(tmp_path / "auto", **flags, plan="auto") == 0
    chosen = "--per_device_train_batch_size 4 --gradient_accumulation_steps 1 --activation_checkpointing false"
    assert f"fastest setting that fits: {chosen}" in capsys.readouterr().out
    before, now = (read_run(tmp_path / name) for name in ("given", "auto"))
    assert now["identity"] == before["identity"]  # either may continue the other
    assert now["config"]["per_device_train_batch_size"] == 4 and not now["config"]["activation_checkpointing"]
    losses = [[entry["loss"] for entry in log_of(tmp_path / name)] for name in ("given", "auto")]
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)


def test_liger_needs_a_gpu(train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(tmp_path / "run", use_liger_kernel=True) == 2
    assert "use_liger_kernel: needs a GPU" in capsys.readouterr().err
    found = parse_config(["--model_name_or_path", "any", "--use_liger_kernel", "true"], elsewhere=True)
    assert found.training.liger_kernel_config == {"cross_entropy": False, "fused_linear_cross_entropy": False}
