"""The forgetting probe: what it measures, against a slow reference, and that it leaves training as it is."""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llava_sculpt.data.conversation import IMAGE_TOKEN_INDEX, encode_prompt
from llava_sculpt.data.images import load_rgb
from llava_sculpt.model.checkpoint import find_base_checkpoint
from llava_sculpt.model.files import ADAPTER_FILE, CONNECTOR_FILE, MASKS_FILE
from llava_sculpt.model.load import load_base
from llava_sculpt.train import train as entry
from llava_sculpt.train.forgetting import (
    MAX_NEW_TOKENS,
    PROMPTS,
    ForgettingProbe,
    forgetting_curve,
    measuring_steps,
    probe_pictures,
)
from tests.runs import (
    DEEPSPEED,
    PYTHON,
    TORCHRUN,
    Train,
    cut_off_after,
    launch,
    log_of,
    needs_deepspeed,
    same_files,
    zero,
)

pytestmark = pytest.mark.gpu

PICTURES = 10  # of 18, so that the last batch of 4 is not full
MEASURED = [2, 4, 6, 8, 9, 11, 13, 15, 17, 18]


def history(folder: Path) -> list[dict[str, float]]:
    """What was logged, less what depends on the clock."""
    logs = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    clock = ("train_runtime", "train_tokens_per_second", "train_samples_per_second", "train_steps_per_second")
    return [{k: v for k, v in log.items() if k not in clock} for log in logs]


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The trainers that runs in this process have built."""
    trainers: list[Any] = []
    build = entry.build_trainer

    def build_and_keep(*args: Any) -> Any:
        trainers.append(build(*args))
        return trainers[-1]

    monkeypatch.setattr(entry, "build_trainer", build_and_keep)
    return trainers


def probe_in(trainer: Any) -> ForgettingProbe:
    return next(c for c in trainer.callback_handler.callbacks if isinstance(c, ForgettingProbe))


@pytest.mark.parametrize("method", ["sculpt", "dora"])
def test_training_is_the_same_with_and_without(train: Train, tmp_path: Path, method: str) -> None:
    options = {"method": method, "lora_dropout": 0.1, "logging_steps": 2}
    assert train(tmp_path / "without", **options) == 0
    assert train(tmp_path / "with", **options, forgetting_probe=PICTURES) == 0
    names = (ADAPTER_FILE, CONNECTOR_FILE, *([MASKS_FILE] if method == "sculpt" else []))
    assert same_files(tmp_path / "with", tmp_path / "without", names)
    rest = [log for log in history(tmp_path / "with") if "forgetting_kl" not in log]
    assert rest == history(tmp_path / "without")
    assert forgetting_curve(tmp_path / "without") == {}
    curve = forgetting_curve(tmp_path / "with")
    assert curve["step"] == MEASURED
    assert all(kl > 0 for kl in curve["forgetting_kl"]) and curve["forgetting_changed"][-1] > 0


def test_the_untuned_model_has_forgotten_nothing_and_random_numbers_stay(
    train: Train, tmp_path: Path, built: list[Any]
) -> None:
    assert train(tmp_path / "run", max_steps=1, sculpt_density=1, warmup_steps=1, forgetting_probe=PICTURES) == 0
    trainer = built[0]  # its only step had the learning rate 0
    probe = probe_in(trainer)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    trainer.state.max_steps = 2
    probe.on_train_begin(trainer.args, trainer.state, trainer.control)
    assert probe.measure() == {"forgetting_kl": 0.0, "forgetting_changed": 0.0}
    after = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    assert torch.equal(before[0], after[0]) and before[1:] == after[1:]
    assert trainer.model.training and all(p.requires_grad for n, p in trainer.model.named_parameters() if "lora_" in n)


def test_measures_are_those_of_a_slow_reference(
    train: Train, checkpoint: Path, tmp_path: Path, built: list[Any]
) -> None:
    """In float64, one question at a time, without cache or padding."""
    assert train(tmp_path / "run", forgetting_probe=PICTURES, learning_rate=2e-3) == 0
    trainer = built[0]
    found = find_base_checkpoint(str(checkpoint))
    base = load_base(found, torch.float32).double().eval()
    tuned = copy.deepcopy(trainer.model).cpu().double().eval()
    dataset = trainer.train_dataset
    tokenizer = dataset.tokenizer
    images = [found.image_token_id] * found.image_tokens

    @torch.no_grad()
    def log_probabilities(model: Any, ids: list[int], pixels: torch.Tensor) -> torch.Tensor:
        logits = model(input_ids=torch.tensor([ids]), pixel_values=pixels).logits[0, :, : tokenizer.vocab_size]
        return logits.log_softmax(-1)

    divergences, changed, names = [], 0, probe_pictures(dataset.records, PICTURES)
    for number, name in enumerate(names):
        asked = encode_prompt(PROMPTS[number % len(PROMPTS)], tokenizer, True)
        at = asked.index(IMAGE_TOKEN_INDEX)
        prompt = [*asked[:at], *images, *asked[at + 1 :]]
        pixels = dataset.preprocessor(load_rgb(dataset.image_folder / name))[None].double()
        answer: list[int] = []
        while len(answer) < MAX_NEW_TOKENS and tokenizer.eos_id not in answer:
            answer.append(int(log_probabilities(base, prompt + answer, pixels)[-1].argmax()))
        p, q = (log_probabilities(m, prompt + answer[:-1], pixels)[len(prompt) - 1 :] for m in (base, tuned))
        divergences.append((p.exp() * (p - q)).sum(-1))
        changed += bool((p.argmax(-1) != q.argmax(-1)).any())
    measured = probe_in(trainer).measure()
    assert measured["forgetting_kl"] == pytest.approx(float(torch.cat(divergences).mean()), rel=1e-4)
    assert measured["forgetting_changed"] == changed / PICTURES
    assert measured["forgetting_kl"] == forgetting_curve(tmp_path / "run")["forgetting_kl"][-1] > 0

    # Where the connector was trained too, the base is the base, and the tuned model is left as it was.
    weights = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    inputs = {"input_ids": torch.tensor([prompt]), "pixel_values": pixels.float()}
    with torch.no_grad(), probe_in(trainer)._evaluating(), probe_in(trainer)._as_base():
        logits = trainer.model(**trainer._prepare_inputs(inputs)).logits.cpu()
        assert torch.allclose(logits, base.float()(**inputs).logits, atol=1e-4)
    assert all(torch.equal(value, weights[name]) for name, value in trainer.model.state_dict().items())


def test_resumed_equals_uninterrupted(train: Train, tmp_path: Path) -> None:
    options = {"forgetting_probe": PICTURES}
    assert train(tmp_path / "whole", save_steps=1, save_total_limit=100, **options) == 0
    for step in (1, 4, 12, 17, 18):
        folder = cut_off_after(step, tmp_path / "whole", tmp_path / f"from-{step}")
        assert train(folder, **options) == 0
        assert same_files(folder, tmp_path / "whole")
        assert forgetting_curve(folder) == forgetting_curve(tmp_path / "whole")
        assert [r["loss"] for r in log_of(folder)] == [r["loss"] for r in log_of(tmp_path / "whole")]


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_base(train: Train, tmp_path: Path, bits: int) -> None:
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes (make setup-dev)")
    assert train(tmp_path / "without", bits=bits, max_steps=8) == 0
    assert train(tmp_path / "with", bits=bits, max_steps=8, forgetting_probe=PICTURES) == 0
    assert same_files(tmp_path / "with", tmp_path / "without")
    assert forgetting_curve(tmp_path / "with")["forgetting_kl"][-1] > 0


def test_too_few_pictures_are_said_and_none_refused(
    train: Train, training_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(tmp_path / "few", max_steps=6, forgetting_probe=32) == 0
    output = capsys.readouterr().out
    assert output.count("forgetting_probe: 18 pictures, not 32: the training data has no more") == 1
    assert output.count("6/6  forgetting KL ") == 1

    records = [r for r in json.loads((training_data / "train.json").read_text()) if "image" not in r]
    (tmp_path / "text.json").write_text(json.dumps(records))
    assert train(tmp_path / "none", data_path=tmp_path / "text.json", forgetting_probe=32) == 2
    assert "text.json has no pictures to ask about; set it to 0" in capsys.readouterr().err
    assert train(tmp_path / "none", forgetting_probe=-1) == 2
    assert "forgetting_probe" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_pictures_are_distinct_and_the_same_in_any_order() -> None:
    records = [{"image": f"{index % 50}.png"} for index in range(200)] + [{}]
    chosen = probe_pictures(records, 32)
    assert len(set(chosen)) == 32 and chosen == probe_pictures(records[::-1], 32)
    assert sorted(probe_pictures(records, 1000)) == sorted({f"{index}.png" for index in range(50)})


@pytest.mark.parametrize("steps", [1, 7, 18, 375])
def test_about_ten_steps_and_the_last_one_are_measured(steps: int) -> None:
    found = sorted(measuring_steps(steps))
    assert len(found) == min(steps, 10) and found[0] >= 1 and found[-1] == steps
    gaps = [b - a for a, b in zip([0, *found], found, strict=False)]
    assert max(gaps) - min(gaps) <= 1


@pytest.fixture(scope="module")
def one(flags: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("forgetting") / "one"
    launch(PYTHON, {**flags, "forgetting_probe": str(PICTURES)}, folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "engine"),
    [
        pytest.param(TORCHRUN, {}, id="ddp"),
        pytest.param(DEEPSPEED, zero("zero2"), id="zero2", marks=needs_deepspeed),
        pytest.param(DEEPSPEED, zero("zero3"), id="zero3", marks=needs_deepspeed),
    ],
)
def test_engines_train_the_same_with_and_without(
    flags: dict[str, str], one: Path, tmp_path: Path, command: list[str], engine: dict[str, str]
) -> None:
    two = {**flags, **engine, "per_device_train_batch_size": "2"}
    probed = {**two, "forgetting_probe": str(PICTURES), "save_steps": "5", "save_total_limit": "100"}
    launch(command, two, tmp_path / "without")
    launch(command, probed, tmp_path / "with")
    assert same_files(tmp_path / "with", tmp_path / "without")
    curve, alone = forgetting_curve(tmp_path / "with"), forgetting_curve(one)
    assert curve["step"] == alone["step"]
    assert curve["forgetting_kl"] == pytest.approx(alone["forgetting_kl"], rel=1e-3)
    resumed = cut_off_after(5, tmp_path / "with", tmp_path / "resumed")
    launch(command, probed, resumed)
    assert same_files(resumed, tmp_path / "with")
    assert forgetting_curve(resumed) == curve
