"""Where the weights of a base model go, and that they are the files' own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPVisionModel, LlavaForConditionalGeneration

from llava_sculpt.artifacts import inference
from llava_sculpt.errors import UserError
from llava_sculpt.model import load
from llava_sculpt.model.checkpoint import find_base_checkpoint
from llava_sculpt.model.load import load_base, local_device
from llava_sculpt.train import train as entry
from tests.runs import Train


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_same_bits_wherever_they_go(checkpoint: Path, dtype: torch.dtype) -> None:
    """And on a GPU they are there once."""
    stock = LlavaForConditionalGeneration.from_pretrained(checkpoint, dtype=dtype).state_dict()
    device = local_device()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    model = load_base(find_base_checkpoint(str(checkpoint)), dtype, device=device)
    loaded = model.state_dict()
    assert {tensor.device for tensor in (*loaded.values(), *model.buffers())} == {device}
    assert stock.keys() == loaded.keys()
    for name, tensor in stock.items():
        assert tensor.dtype == loaded[name].dtype and torch.equal(tensor, loaded[name].cpu()), name
    if device.type == "cuda":
        size = sum(tensor.numel() * tensor.element_size() for tensor in loaded.values())
        assert torch.cuda.max_memory_allocated() - before < 1.5 * size + 2**20


def test_weights_go_straight_to_another_device(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And are checked there. "meta" is that device here: it has no values."""
    checked: dict[str, torch.Tensor] = {}
    monkeypatch.setattr(load, "check_finite", lambda tensors, _: checked.update(tensors))
    model = load_base(find_base_checkpoint(str(checkpoint)), torch.bfloat16, device="meta")
    assert {tensor.device.type for tensor in (*model.parameters(), *model.buffers())} == {"meta"}
    assert checked == dict(model.named_parameters())
    # DeepSpeed does the placing.
    monkeypatch.setattr(load, "is_deepspeed_zero3_enabled", lambda: True)
    assert load_base(find_base_checkpoint(str(checkpoint)), torch.bfloat16, device="meta").device.type == "cpu"


def test_training_and_answering_load_to_their_own_device(
    train: Train, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def ask(*_: object, device: object = None, **__: object) -> None:
        asked.append(device)
        raise UserError("asked")

    monkeypatch.setattr(entry, "load_base", ask)
    assert train(tmp_path / "run") == 2
    gpu = torch.device("cuda", 1)
    monkeypatch.setattr(inference, "load_base", ask)
    monkeypatch.setattr(inference, "local_device", lambda: gpu)
    for beside in (None, object()):
        with pytest.raises(UserError, match="asked"):
            inference.load_for_inference(str(checkpoint), beside=beside)  # type: ignore[arg-type]
    # Of two models that have weights in common the second waits on the CPU.
    assert [torch.device(device) for device in asked] == [torch.device("cpu"), gpu, torch.device("cpu")]


@pytest.fixture
def tower(checkpoint: Path, tmp_path: Path) -> Path:
    vision = LlavaForConditionalGeneration.from_pretrained(checkpoint).config.vision_config
    CLIPVisionModel(vision).save_pretrained(tmp_path / "tower")
    return tmp_path / "tower"


def test_another_vision_tower(checkpoint: Path, tower: Path) -> None:
    found, own = find_base_checkpoint(str(checkpoint)), load_file(tower / "model.safetensors")
    model = load_base(found, torch.bfloat16, vision_tower=str(tower))
    loaded = model.model.vision_tower.state_dict()
    assert own.keys() == loaded.keys() and all(torch.equal(own[name].bfloat16(), loaded[name]) for name in own)
    assert not any(parameter.requires_grad for parameter in model.parameters()) and not model.training
    name = "pre_layrnorm.weight"
    for change, message in (
        ({name: torch.full_like(own[name], torch.nan)}, f"NaN or infinite values in 1 tensors, such as {name}"),
        ({name: torch.ones(3)}, rf"vision_tower: .*{name} is \[3\], config.json says"),
        ({"encoder.layers.9.mlp.fc1.bias": torch.ones(3)}, "vision_tower: .*unexpected weight .*layers.9"),
    ):
        save_file({**own, **change}, tower / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(UserError, match=message):
            load_base(found, torch.bfloat16, vision_tower=str(tower))
    with pytest.raises(UserError, match=r"vision_tower: .*no-such"):
        load_base(found, torch.bfloat16, vision_tower=str(tower.with_name("no-such")))
