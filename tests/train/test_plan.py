"""The plan's formulas against real tensors: every part within 15 % of what a step really holds."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama import modeling_llama

from llava_sculpt.cli import main
from llava_sculpt.config import SculptConfig
from llava_sculpt.config_reader import parse_config, with_defaults
from llava_sculpt.data.collator import supervised_positions
from llava_sculpt.data.conversation import IGNORE_INDEX
from llava_sculpt.errors import UserError
from llava_sculpt.memory.parts import (
    Architecture,
    Setup,
    Zero,
    activation_peaks,
    base_weights,
    gradients,
    loss_saved,
    optimizer_states,
    regularizer,
    saved_activations,
    step_flops,
    trained_weights,
)
from llava_sculpt.memory.plan import check_fits, fastest, make_plan, read_checkpoint_config
from llava_sculpt.model.checkpoint import BaseCheckpoint
from llava_sculpt.model.load import load_base
from llava_sculpt.model.lora import CONNECTOR_TARGETS, inject_lora, lora_pairs
from llava_sculpt.train.regularizer import ConflictRegularizer
from tests.runs import DEEPSPEED, ROOT, needs_deepspeed, start_script

WITHIN = 0.15
RANK = 16


class LiveBytes(TorchDispatchMode):
    """Counts the storages that operations make while it is active: those alive now, and the most there ever were."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self._known | given:
                    self._known.add(storage._cdata)
                    self.live += storage.nbytes()
                    weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.live)
        return result

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


def setup_of(config: LlavaConfig, **changes: Any) -> Setup:
    return Setup(
        **{
            "architecture": Architecture.from_config(config.to_dict()),
            "half": False,
            "bits": 16,
            "double_quant": True,
            "lora_r": RANK,
            "lora_dropout": 0.0,
            "connector": "full",
            "regularized": True,
            "connector_regularized": False,
            "masked": True,
            "zero": None,
            "gpus": 1,
            "batch": 2,
            "accumulation": 1,
            "length": 256,
            "checkpointing": True,
            **changes,
        }
    )


def small_config(vocabulary: int = 8000, hidden: int = 256, layers: int = 4) -> LlavaConfig:
    return LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=3,
            num_attention_heads=2,
            image_size=64,
            patch_size=8,
        ),
        text_config=LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=hidden,
            intermediate_size=hidden * 43 // 16,
            num_hidden_layers=layers,
            num_attention_heads=4,
            pad_token_id=vocabulary - 1,
        ),
        image_token_id=vocabulary - 2,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )


def large_config(layers: int, vocabulary: int = 32064) -> LlavaConfig:
    """LLaVA-1.5-7B, with fewer layers and another vocabulary if asked."""
    found = read_checkpoint_config("llava-hf/llava-1.5-7b-hf")
    text = {**found["text_config"], "num_hidden_layers": layers, "vocab_size": vocabulary}
    return LlavaConfig.from_dict({**found, "text_config": text, "image_token_index": vocabulary - 64})


def build(config: LlavaConfig, setup: Setup, dtype: torch.dtype = torch.float32) -> Any:
    torch.set_default_dtype(dtype)
    model = LlavaForConditionalGeneration(config).requires_grad_(False)
    torch.set_default_dtype(torch.float32)
    peft_model = inject_lora(
        model,
        r=setup.lora_r,
        lora_alpha=2 * setup.lora_r,
        dropout=setup.lora_dropout,
        connector=setup.connector,
    )
    model.config.use_cache = model.config.text_config.use_cache = False  # as the Trainer sets it
    if setup.checkpointing:
        peft_model.activation_checkpointing_enable(every_n_layers=setup.checkpointing)
        peft_model.disable_input_require_grads()  # as our Trainer does
    return peft_model.train()


def batch_of(config: LlavaConfig, setup: Setup) -> dict[str, torch.Tensor]:
    """The longest sample, and shorter ones beside it if there are several."""
    image, side = setup.architecture.image_tokens, config.vision_config.image_size
    ids = torch.randint(0, config.image_token_id, (setup.batch, setup.length))
    ids[:, 4 : 4 + image] = config.image_token_id
    attended = torch.ones_like(ids)
    attended[1:, -8:] = 0
    pixels = torch.randn(setup.batch, 3, side, side)
    with torch.device("cpu"):  # where the collator makes them
        labels = torch.ones(setup.batch, setup.length, dtype=torch.int64)
        labels[:, 4 : 4 + setup.unlabelled] = IGNORE_INDEX
        positions, shifted = (t.to(ids.device) for t in supervised_positions(labels))
    return {
        "input_ids": ids,
        "attention_mask": attended,
        "labels": ids.clone(),
        "logits_to_keep": positions,
        "shift_labels": shifted,
        "pixel_values": pixels,
    }


def measure_step(model: nn.Module, batch: dict[str, torch.Tensor], setup: Setup, autocast: bool) -> tuple[int, int]:
    """(bytes saved for backward besides those of the loss, peak bytes) of one step whose gradients exist already."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    with LiveBytes() as counted:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            output = model(**batch)
        loss = output.loss
        del output
        saved = counted.live
        loss.backward()
    return saved - loss_saved(setup), counted.peak


def agrees(predicted: float, measured: float) -> bool:
    print(f"predicted {predicted / 1e6:.3f} measured {measured / 1e6:.3f} MB ratio {predicted / measured:.3f}")
    return abs(predicted / measured - 1) <= WITHIN


@pytest.mark.parametrize("vocabulary", [8000, 300])  # the worst moment is the loss, or a layer's backward
@pytest.mark.parametrize(("batch", "length", "unlabelled"), [(1, 96, 0), (1, 256, 64), (3, 96, 64)])
@pytest.mark.parametrize("checkpointing", [0, 1, 2, 3, 4])  # every n-th of 3 + 4 layers
def test_activations_of_a_real_step(
    checkpointing: int, batch: int, length: int, unlabelled: int, vocabulary: int
) -> None:
    config = small_config(vocabulary)
    setup = setup_of(config, batch=batch, length=length, checkpointing=checkpointing, unlabelled=unlabelled)
    torch.manual_seed(0)
    model = build(config, setup)
    layers = model.get_base_model().model.language_model.layers
    assert [layer.gradient_checkpointing for layer in layers] == setup.checkpointed
    saved, peak = measure_step(model, batch_of(config, setup), setup, autocast=False)
    assert agrees(saved_activations(setup), saved)
    assert agrees(max(activation_peaks(setup).values()), peak)


@pytest.mark.parametrize("checkpointing", [True, False])
def test_activations_under_autocast(checkpointing: bool) -> None:
    """Plain PyTorch in bf16: float32 LoRA on a bf16 base."""
    config = small_config(300, layers=2)
    setup = setup_of(config, half=True, checkpointing=checkpointing, length=128)
    model = build(config, setup, torch.bfloat16)
    saved, peak = measure_step(model, batch_of(config, setup), setup, autocast=True)
    # 16-bit copies of what trains are counted with it, not here; those of a checkpointed layer end with forward.
    copies = 2 * (setup.architecture.connector_parameters if checkpointing else setup.trainable)
    assert agrees(saved_activations(setup) + copies, saved)
    assert agrees(max(activation_peaks(setup).values()) + copies, peak)


@contextmanager
def cuda_kernels_on_meta() -> Iterator[None]:
    """Shapes without data, through the operations that a GPU runs: fused dropout and memory-efficient attention."""

    def attention(module: nn.Module, q: Any, k: Any, v: Any, mask: Any, scaling: float, **_: Any) -> Any:
        bias = None
        if mask is not None:  # as the kernel makes it from the boolean mask
            bias = torch.zeros_like(mask, dtype=q.dtype).expand(*q.shape[:3], k.shape[2])
        efficient = torch.ops.aten._scaled_dot_product_efficient_attention
        output = efficient(q, k, v, bias, True, 0.0, mask is None, scale=scaling)[0]
        return output.transpose(1, 2).contiguous(), None

    def causal_mask(attention_mask: Any = None, **_: Any) -> Any:
        if attention_mask is None or len(attention_mask) == 1:
            return None
        rows, length = attention_mask.shape
        return torch.ones(rows, 1, length, length, dtype=torch.bool)

    with pytest.MonkeyPatch.context() as patch, torch.device("meta"):
        patch.setitem(ALL_ATTENTION_FUNCTIONS, "sdpa", attention)
        patch.setattr(modeling_llama, "create_causal_mask", causal_mask)
        patch.setattr(nn.Dropout, "forward", lambda self, x: torch.native_dropout(x, self.p, True)[0])
        patch.setattr(
            "transformers.models.llava.modeling_llava.LlavaModel.get_placeholder_mask",
            lambda self, ids, inputs_embeds, image_features: (ids == 0).unsqueeze(-1),
        )
        yield


@pytest.mark.parametrize(
    ("checkpointing", "batch", "length", "dropout", "connector", "vocabulary"),
    [
        (1, 4, 2048, 0.05, "full", 32064),
        (2, 2, 1024, 0.05, "full", 32064),  # one of the two layers
        (1, 4, 2048, 0.05, "full", 2000),  # the worst moment is a layer's backward
        (1, 4, 2048, 0.0, "full", 2000),
        (0, 4, 2048, 0.05, "full", 32064),
        (0, 1, 800, 0.0, "frozen", 2000),
    ],
)
def test_activations_and_flops_of_7b_in_bf16(
    checkpointing: int, batch: int, length: int, dropout: float, connector: str, vocabulary: int
) -> None:
    """Two of the 32 layers, traced with the shapes, dtypes and operations of a GPU under DeepSpeed."""
    config = large_config(layers=2, vocabulary=vocabulary)
    setup = setup_of(
        config,
        half=True,
        zero=Zero(2),
        batch=batch,
        length=length,
        checkpointing=checkpointing,
        lora_dropout=dropout,
        connector=connector,
        regularized=False,
        unlabelled=576,
    )
    with cuda_kernels_on_meta():
        model = build(config, setup, torch.bfloat16).to(torch.bfloat16)  # as the engine casts it
        batch_ = batch_of(config, setup)
        saved, peak = measure_step(model, batch_, setup, autocast=False)
        with FlopCounterMode(display=False) as flops:
            model(**batch_).loss.backward()
    assert agrees(saved_activations(setup), saved)
    assert agrees(max(activation_peaks(setup).values()), peak)
    print(f"flops ratio {step_flops(setup) / flops.get_total_flops():.3f}")
    assert abs(step_flops(setup) / flops.get_total_flops() - 1) <= 0.05


@pytest.mark.parametrize("connector", ["full", "frozen", "sculpt"])
def test_weights_gradients_and_optimizer(connector: str) -> None:
    config = small_config(1000)
    setup = setup_of(config, connector=connector, checkpointing=False)
    model = build(config, setup)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    model(**batch_of(config, setup)).loss.backward()
    optimizer.step()
    assert sum(p.nbytes for p in model.parameters() if not p.requires_grad) == base_weights(setup)
    assert sum(p.nbytes for p in trained) == trained_weights(setup)
    assert sum(p.grad.nbytes for p in trained) == gradients(setup)
    states = [t for state in optimizer.state.values() for t in state.values()]
    assert agrees(optimizer_states(setup), sum(t.nbytes for t in states))


def test_known_models_have_their_published_sizes() -> None:
    for name, parameters in (("7b", 7_063_427_072), ("13b", 13_351_490_560)):
        sizes = Architecture.from_config(read_checkpoint_config(f"llava-hf/llava-1.5-{name}-hf"))
        assert abs(sizes.parameters / parameters - 1) < 1e-3
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(large_config(32))
    assert sum(p.numel() for p in model.parameters()) == Architecture.from_config(large_config(32).to_dict()).parameters


@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="needs bitsandbytes (make setup-dev)")
@pytest.mark.parametrize(("bits", "double_quant"), [(4, True), (4, False), (8, True)])
def test_quantised_weights(tmp_path: Path, bits: int, double_quant: bool) -> None:
    config = small_config(1000, layers=2)
    LlavaForConditionalGeneration(config).to(torch.bfloat16).save_pretrained(tmp_path)
    checkpoint = BaseCheckpoint(tmp_path, config.to_dict())
    model = load_base(checkpoint, torch.bfloat16, bits=bits, double_quant=double_quant)
    setup = setup_of(config, half=True, bits=bits, double_quant=double_quant, connector="frozen")
    assert agrees(base_weights(setup), sum(map(stored_bytes, model.parameters())))


def stored_bytes(parameter: nn.Parameter) -> int:
    """Bytes of a parameter and of what bitsandbytes keeps beside it."""
    total = parameter.nbytes
    state = getattr(parameter, "quant_state", None)
    while state is not None:
        total += sum(t.nbytes for t in (state.absmax, state.code, state.offset) if t is not None)
        state = state.state2
    scales = getattr(parameter, "SCB", None)
    return total + (0 if scales is None else scales.nbytes)


@pytest.mark.parametrize("connector", ["full", "sculpt"])
def test_regularizer(connector: str) -> None:
    config = small_config(1000, hidden=128, layers=6)  # W of one tile, on a CPU too
    setup = setup_of(config, half=True, connector=connector, connector_regularized=connector == "sculpt")
    model = build(config, setup, torch.bfloat16).to(torch.bfloat16)
    layers = CONNECTOR_TARGETS if connector == "sculpt" else None
    regularizer_of_model = ConflictRegularizer(lora_pairs(model), SculptConfig(connector=layers))
    for parameter in model.parameters():
        if parameter.requires_grad:  # LoRA's own gradients are another part
            parameter.register_post_accumulate_grad_hook(lambda parameter: setattr(parameter, "grad", None))
    with LiveBytes() as counted:
        term = regularizer_of_model()
        assert term is not None
        term.backward()
    # Matrix by matrix, as on a GPU with a quantised W; here W is not dequantised.
    one_by_one = regularizer(replace(setup, bits=8)) - 4 * 128 * 128
    assert agrees(one_by_one, counted.peak)


def test_a_paper_run_from_the_real_command(tmp_path: Path) -> None:
    """No data, no weights, no GPU: the size of LLaVA-1.5-7B is known."""
    done = subprocess.run(
        [sys.executable, "-m", "llava_sculpt.cli", "plan", "--config", "configs/iconqa_sculpt.yaml", "--json"],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env={**os.environ, "HF_HUB_CACHE": str(tmp_path), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["zero"] == 2 and found["gpus"] == 4 and found["fits"]
    assert found["total"] == sum(found["parts"].values())
    assert found["steps"] == 1875 and found["samples"] == 10_000


PlanCommand = Callable[..., dict[str, Any]]


@pytest.fixture
def plan_command(flags: dict[str, str], capsys: pytest.CaptureFixture[str]) -> PlanCommand:
    def run(**overrides: object) -> dict[str, Any]:
        given = {**flags, "output_dir": "nowhere", **overrides}
        words = [word for key, value in given.items() for word in (f"--{key}", str(value))]
        assert main(["plan", *words, "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    return run


def test_lengths_come_from_the_data_when_it_is_there(plan_command: PlanCommand) -> None:
    found = plan_command(gpus=1)
    assert found["samples"] == 24 and found["steps"] == 18
    assert found["typical_length"] < found["longest"] < 2048
    assert found["typical_total"] < found["total"]
    assert plan_command(gpus=2)["steps"] == 9
    absent = plan_command(data_path="nowhere.json", image_folder="nowhere")
    assert absent["samples"] == 10_000 and absent["longest"] == 2048 and absent["notes"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model_name_or_path", "someone/unknown"], "someone/unknown is neither"),
        (["--model_name_or_path", "no model/at all"], "no model/at all is neither"),
        (["--config", "nowhere.yaml"], "nowhere.yaml"),
        (["--lora_r", "0"], "lora_r"),
        (["--gpus", "0"], "--gpus"),
        (["--deepspeed", "nowhere.json"], "nowhere.json"),
        (["--bits", "4", "--zero", "3"], "bits: 4"),
        (["--colour", "blue"], "colour"),
    ],
)
def test_bad_input(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    usual = {"config": ROOT / "configs/iconqa_sculpt.yaml", "deepspeed": ROOT / "configs/zero2.json"}
    assert main(["plan", *with_defaults(arguments, usual)]) == 2
    errors = capsys.readouterr().err
    assert words in errors and errors.startswith("error:") and "Traceback" not in errors


def paper_plan(*flags: str, gpus: int = 4, zero: int | None = 2) -> Any:
    config = parse_config(["--config", str(ROOT / "configs" / "iconqa_sculpt.yaml"), *flags], elsewhere=True)
    return make_plan(config, read_checkpoint_config(config.model.model_name_or_path), gpus, zero, 10_000)


def test_what_does_not_fit_is_refused_with_what_makes_it_smaller(capsys: pytest.CaptureFixture[str]) -> None:
    plan = paper_plan("--activation_checkpointing", "false")
    check_fits(plan, 10**12)
    with pytest.raises(UserError) as caught:
        check_fits(plan, 24 * 10**9)
    (message,) = caught.value.problems
    assert "--activation_checkpointing true" in message and "--ignore_plan true" in message
    # Each change does what is said of it.
    flags = ["--config", str(ROOT / "configs" / "iconqa_sculpt.yaml"), "--activation_checkpointing", "false"]
    sizes = [plan.total]
    for change in ([], ["--per_device_train_batch_size", "1"], ["--bits", "4"], ["--lora_r", "8"]):
        assert main(["plan", *flags, "--json", *change]) == 0
        found = json.loads(capsys.readouterr().out)
        assert bool(found["hints"]) == (not found["fits"])
        sizes.append(found["total"])
    assert sizes[0] == sizes[1] > max(sizes[2:])


def test_the_fastest_setting_that_fits() -> None:
    """From 24 to 80 GB: fewer layers are computed again, never another global batch."""
    plans = {gb: fastest(paper_plan(), gb * 10**9) for gb in (20, 24, 32, 48, 80)}
    flops = []
    for gb, found in plans.items():
        assert found is not None and found.total <= 0.9 * gb * 10**9
        assert found.setup.batch * found.setup.accumulation == 4 and found.steps == paper_plan().steps
        flops.append(found.flops)
    assert flops == sorted(flops, reverse=True) and flops[-1] < 0.75 * paper_plan().flops
    large = plans[80]
    assert large is not None and (large.setup.checkpointing, large.setup.batch) == (0, 2)
    assert fastest(paper_plan(), 8 * 10**9) is None
    # What it names is what is then planned.
    for found in plans.values():
        assert found is not None and paper_plan(*shlex.split(found.setting())) == found
    # ZeRO-3 gathers the weights in every micro-step: as few of them as fit.
    thin = paper_plan("--per_device_train_batch_size", "1", "--gradient_accumulation_steps", "4", zero=3)
    best = fastest(thin, 24 * 10**9)
    assert best is not None and best.setup.batch == 4


def test_every_option_moves_the_part_it_should() -> None:
    base = paper_plan().setup
    bigger = {
        "gpus": (replace(base, gpus=2), optimizer_states),
        "rank": (replace(base, lora_r=64), trained_weights),
        "length": (replace(base, length=4096), saved_activations),
        "zero": (replace(base, zero=None), optimizer_states),
    }
    for name, (changed, part) in bigger.items():
        assert part(changed) > part(base), name
    assert base_weights(replace(base, zero=Zero(3))) == -(-base_weights(base) // 4)
    offloaded = replace(base, zero=Zero(3, offload_weights=True, offload_optimizer=True))
    assert base_weights(offloaded) == optimizer_states(offloaded) == 0


@pytest.mark.slow
@needs_deepspeed
@pytest.mark.parametrize("stage", [2, 3])
def test_what_two_deepspeed_processes_hold(tmp_path: Path, stage: int) -> None:
    process = start_script(DEEPSPEED, "held.py", str(stage), str(tmp_path / "held.json"))
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output[-6000:]
    held = json.loads((tmp_path / "held.json").read_text())
    bucket = Zero(stage, reduce_bucket=1_000_000, overlap=True, persistence_threshold=0)
    setup = setup_of(small_config(1000, layers=4), half=True, zero=bucket, gpus=2, lora_r=64, checkpointing=False)
    assert agrees(optimizer_states(setup), held["optimizer"])
    assert agrees(base_weights(setup), held["frozen"])
    assert agrees(trained_weights(setup), held["trained"])
    assert agrees(gradients(setup), held["gradients"])
