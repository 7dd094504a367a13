"""4- and 8-bit base weights: what is quantised, what the method computes with, whole runs of the entry point."""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import BitsAndBytesConfig, LlavaForConditionalGeneration

from llava_sculpt.artifacts.inference import load_for_inference
from llava_sculpt.config import SculptConfig
from llava_sculpt.model import load
from llava_sculpt.model.checkpoint import find_base_checkpoint
from llava_sculpt.model.files import ADAPTER_FILE, CONNECTOR_FILE, MASKS_FILE, RUN_FILE
from llava_sculpt.model.load import load_base
from llava_sculpt.model.lora import (
    CONNECTOR_TARGETS,
    REGULARIZED_LLM,
    LoraPair,
    connector_weights,
    inject_lora,
    lora_pairs,
    matching_pairs,
)
from llava_sculpt.sculpt import kept_count
from llava_sculpt.train import train as entry
from llava_sculpt.train.regularizer import ConflictRegularizer
from tests.runs import (
    DEEPSPEED,
    PYTHON,
    TORCHRUN,
    Train,
    assert_exact,
    assert_same_run,
    cut_off_after,
    launch,
    log_of,
    needs_deepspeed,
    same_files,
    zero,
)

bnb = pytest.importorskip("bitsandbytes", reason="needs bitsandbytes (make setup-dev)")
pytestmark = pytest.mark.gpu

LAYER = {4: bnb.nn.Linear4bit, 8: bnb.nn.Linear8bitLt}
PROJECTIONS = [f"self_attn.{x}_proj" for x in "qkvo"] + [f"mlp.{x}_proj" for x in ("gate", "up", "down")]
LLM_LINEAR = {f"model.language_model.layers.{layer}.{name}" for layer in (0, 1) for name in PROJECTIONS}
both_bits = pytest.mark.parametrize("bits", [4, 8])
both_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def base(checkpoint: Path, bits: int, dtype: torch.dtype = torch.float32, **options: object) -> nn.Module:
    return load_base(find_base_checkpoint(str(checkpoint)), dtype, bits=bits, **options)  # type: ignore[arg-type]


def adapted(checkpoint: Path, bits: int, dtype: torch.dtype = torch.float32, connector: str = "sculpt") -> nn.Module:
    """A quantised model with LoRA whose B is no longer zero, in training mode."""
    torch.manual_seed(0)
    model = inject_lora(base(checkpoint, bits, dtype), r=8, lora_alpha=16, dropout=0, connector=connector)
    for pair in lora_pairs(model):
        nn.init.normal_(pair.lora_B, std=0.01)
    return model.train()


def tensor_bytes(value: torch.Tensor) -> bytes:
    return value.detach().contiguous().flatten().view(torch.uint8).cpu().numpy().tobytes()


def frozen_digest(model: nn.Module) -> dict[str, str]:
    """What every frozen parameter stands for, bit by bit; of quantised ones what they dequantise to as well."""
    whole = {pair.name: tensor_bytes(pair.weight()) for pair in lora_pairs(model) if not pair.in_connector}
    digest = {name: hashlib.sha256(content).hexdigest() for name, content in whole.items()}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            digest[name] = hashlib.sha256(tensor_bytes(parameter)).hexdigest()
    return digest


@both_bits
def test_the_llms_linear_layers_are_quantised_and_nothing_else(checkpoint: Path, bits: int) -> None:
    model = base(checkpoint, bits, torch.bfloat16)
    kinds = (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt)
    assert {name for name, module in model.named_modules() if isinstance(module, kinds)} == LLM_LINEAR
    for name, parameter in model.named_parameters():
        assert not parameter.requires_grad
        if name.removesuffix(".weight") not in LLM_LINEAR:  # tower, connector, embeddings, norms, lm_head
            assert type(parameter) is nn.Parameter and parameter.dtype == torch.bfloat16, name
    # The same layers as LoRA finds them, one class name deeper in the module tree.
    pairs = lora_pairs(inject_lora(model, r=4, lora_alpha=8, dropout=0, connector="lora"))
    assert {p.name.removeprefix("base_model.model.") for p in pairs if not p.in_connector} == LLM_LINEAR
    for pair in pairs:
        assert type(pair.layer.get_base_layer()) is (nn.Linear if pair.in_connector else LAYER[bits])
        assert pair.lora_A.dtype == pair.lora_B.dtype == torch.float32


@pytest.mark.parametrize(("double_quant", "quant_type"), [(True, "nf4"), (False, "fp4")])
def test_four_bit_options(checkpoint: Path, double_quant: bool, quant_type: str) -> None:
    model = base(checkpoint, 4, torch.bfloat16, double_quant=double_quant, quant_type=quant_type)
    layer = model.get_submodule("model.language_model.layers.1.mlp.up_proj")
    assert layer.weight.quant_state.nested == double_quant
    assert layer.weight.quant_state.quant_type == quant_type
    assert layer.compute_dtype == torch.bfloat16


def test_quantisation_is_repeatable(checkpoint: Path) -> None:
    for bits in (4, 8):
        first, again = (frozen_digest(adapted(checkpoint, bits)) for _ in range(2))
        assert first == again


@both_bits
@both_dtypes
def test_weight_is_what_the_layer_computes_with(checkpoint: Path, bits: int, dtype: torch.dtype) -> None:
    """Before the first forward pass, when 8-bit layers still keep their scales elsewhere, and after it."""
    original = base(checkpoint, 16, torch.float32)
    for pair in lora_pairs(adapted(checkpoint, bits, dtype)):
        layer = pair.layer.get_base_layer()
        before = pair.weight().clone()
        assert before.dtype == (torch.float32 if bits == 8 and not pair.in_connector else dtype)
        W = original.get_submodule(pair.name.removeprefix("base_model.model.")).weight.to(before.device)
        assert before.shape == W.shape
        assert (before - W).norm() < (0.15 if bits == 4 else 0.02) * W.norm()
        computed = layer(torch.eye(W.shape[1], dtype=dtype, device=W.device)).T
        if layer.bias is not None:
            computed = computed - layer.bias.unsqueeze(1)
        # On a GPU bitsandbytes multiplies int8 by int8 and answers in float16 precision.
        in_float16 = bits == 8 and W.is_cuda and not pair.in_connector
        rounding = max(torch.finfo(dtype).eps, torch.finfo(torch.float16).eps if in_float16 else 0)
        assert torch.allclose(computed, before.to(dtype), rtol=2 * rounding, atol=2 * rounding * float(W.abs().max()))
        assert torch.equal(pair.weight(), before)


def float64_penalty(pair: LoraPair, norm: str) -> torch.Tensor:
    W = pair.weight().double()
    M = (1 / torch.log(W.abs() / W.norm() + 1e-15)).abs().tanh()
    weighted = M * (pair.lora_B.double() @ pair.lora_A.double())
    return weighted.norm() if norm == "fro" else weighted.abs().sum()


@both_bits
@both_dtypes
def test_regularizer_on_dequantised_weights(
    checkpoint: Path, bits: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Value and gradients are those of float64, at every step the same; no dequantised matrix outlives its term."""
    pairs = lora_pairs(adapted(checkpoint, bits, dtype))
    llm = matching_pairs(pairs, REGULARIZED_LLM, "regularize")
    connector = [pair for pair in pairs if pair.in_connector]
    assert (len(llm), len(connector)) == (6, 2)
    expected = 0.5 * sum(float64_penalty(p, "fro") for p in llm) / 6
    expected = expected + 0.1 * sum(float64_penalty(p, "l1") for p in connector) / 2
    matrices = [matrix for pair in llm + connector for matrix in (pair.lora_A, pair.lora_B)]
    gradients = torch.autograd.grad(expected, matrices)
    value = expected.item()

    made: list[weakref.ref[torch.Tensor]] = []
    dequantise = LoraPair.weight

    def watched(pair: LoraPair) -> torch.Tensor:
        weight = dequantise(pair)
        if not pair.in_connector:
            made.append(weakref.ref(weight))
        assert sum(reference() is not None for reference in made) <= 1
        return weight

    monkeypatch.setattr(LoraPair, "weight", watched)
    regularizer = ConflictRegularizer(pairs, SculptConfig(alpha=0.5, beta=0.1, connector=CONNECTOR_TARGETS))
    values = []
    for _ in range(3):
        term = regularizer()
        assert term is not None and term.item() == 0
        found = torch.autograd.grad(term, matrices)
        assert all(reference() is None for reference in made)
        for mine, exact in zip(found, gradients, strict=True):
            assert (mine - exact).norm() <= 1e-5 * exact.norm()
        values.append(regularizer.value().item())
        assert values[-1] == pytest.approx(value, rel=1e-6)
    assert len(made) == 3 * 6
    assert len(set(values)) == 1


def test_eight_bit_layers_do_not_flood_the_log(checkpoint: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = adapted(checkpoint, 8).eval()
    model(input_ids=torch.tensor([[1, 5, 6, 7]], device=model.device))
    assert "MatMul8bitLt" not in caplog.text


def test_without_bitsandbytes(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One message, before any weight is read."""
    monkeypatch.setattr(load, "is_bitsandbytes_available", lambda: False)
    monkeypatch.setattr(load.LlavaForConditionalGeneration, "from_pretrained", lambda *_, **__: pytest.fail("loaded"))
    assert train(tmp_path / "run", bits=4) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(errors) == 1 and "bits: 4 needs bitsandbytes" in errors[0]
    assert not (tmp_path / "run").exists()


@dataclass
class Trained:
    bits: int
    folder: Path
    before: dict[str, str]
    after: dict[str, str]


@pytest.fixture(scope="module", params=[4, 8])
def trained(
    request: pytest.FixtureRequest, train: Train, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Trained]:
    """A run of 18 steps with every checkpoint kept, and its frozen weights before and after."""
    folder = tmp_path_factory.mktemp("quantised") / "run"
    models, before = [], {}
    build = entry.build_trainer

    def build_and_look(*args, **kwargs):  # type: ignore[no-untyped-def]
        trainer = build(*args, **kwargs)
        models.append(trainer.model)
        before.update(frozen_digest(trainer.model))
        return trainer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(entry, "build_trainer", build_and_look)
        assert train(folder, bits=request.param, save_steps=1, save_total_limit=100) == 0
    yield Trained(request.param, folder, before, frozen_digest(models[0]))


def test_training_lowers_the_loss_and_leaves_the_base_alone(trained: Trained) -> None:
    losses = [record["task_loss"] for record in log_of(trained.folder)]
    assert len(losses) == 18
    assert losses[4] < losses[0] - 0.05  # dense
    assert losses[-1] < losses[5] - 0.05  # under the masks
    assert sum(name in trained.before for name in trained.after) == len(trained.before) > 14
    assert trained.before == trained.after


def test_masks_hold_and_every_pair_trains(trained: Trained) -> None:
    weights, masks = load_file(trained.folder / ADAPTER_FILE), load_file(trained.folder / MASKS_FILE)
    assert weights.keys() == masks.keys() and len(masks) == 28
    for key, mask in masks.items():
        assert int(mask.sum()) == kept_count(mask.numel(), 0.1)
        assert not weights[key][~mask].any()
        assert weights[key][mask].any()
    assert all(record["cmr_llm"] > 0 for record in log_of(trained.folder)[2:])


def test_connector_trains_in_float32(trained: Trained, checkpoint: Path) -> None:
    saved = load_file(trained.folder / CONNECTOR_FILE)
    original = connector_weights(base(checkpoint, 16))
    assert saved.keys() == original.keys()
    for name, value in saved.items():
        assert value.dtype == torch.float32
        assert not torch.equal(value, original[name])


@pytest.mark.parametrize("step", [4, 6])  # before and after the masks are made
def test_resumed_equals_uninterrupted(train: Train, trained: Trained, tmp_path: Path, step: int) -> None:
    folder = cut_off_after(step, trained.folder, tmp_path / "run")
    assert train(folder, bits=trained.bits) == 0
    assert same_files(folder, trained.folder)
    assert [r["loss"] for r in log_of(folder)] == [r["loss"] for r in log_of(trained.folder)]


def test_resume_with_other_bits_is_refused(
    train: Train, trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = cut_off_after(6, trained.folder, tmp_path / "run")
    assert train(folder, bits=16) == 2
    assert f"bits: {trained.bits} there, 16 now" in capsys.readouterr().err


def test_adapter_loads_for_inference(trained: Trained, checkpoint: Path) -> None:
    """On the 16-bit base, with its connector; run.json says how it was trained."""
    inference = load_for_inference(str(trained.folder))
    saved, connector = load_file(trained.folder / ADAPTER_FILE), load_file(trained.folder / CONNECTOR_FILE)
    loaded = {key: parameter for pair in lora_pairs(inference.model) for key, parameter in pair.parameters()}
    assert all(torch.equal(loaded[key].cpu(), saved[key]) for key in saved)
    own = connector_weights(inference.model)
    device = next(inference.model.parameters()).device
    # Inference on a GPU is in bf16, the connector too.
    assert all(torch.equal(own[key].cpu(), connector[key].to(own[key].dtype)) for key in connector)
    assert inference.model(input_ids=torch.tensor([[1, 5, 6, 7]], device=device)).logits.isfinite().all()
    assert f'"bits": {trained.bits}' in (trained.folder / RUN_FILE).read_text()


def test_stock_peft_loads_the_adapter_on_a_quantised_base(trained: Trained, checkpoint: Path) -> None:
    from peft import PeftModel

    skip = [".*multi_modal_projector", ".*vision_tower", "lm_head"]
    quantization = BitsAndBytesConfig(
        load_in_4bit=trained.bits == 4, load_in_8bit=trained.bits == 8, llm_int8_skip_modules=skip
    )
    model = LlavaForConditionalGeneration.from_pretrained(checkpoint, quantization_config=quantization)
    loaded = PeftModel.from_pretrained(model, str(trained.folder))
    saved = load_file(trained.folder / ADAPTER_FILE)
    weights = {name.replace(".default", ""): value for name, value in loaded.state_dict().items() if "lora_" in name}
    assert weights.keys() == saved.keys()
    assert all(torch.equal(weights[name].cpu(), saved[name]) for name in saved)


@both_bits
def test_activation_checkpointing_changes_nothing(train: Train, tmp_path: Path, bits: int) -> None:
    """With a frozen connector no input of the LLM requires a gradient; LoRA of the first layer still gets its own."""
    options = {"bits": bits, "connector": "frozen", "max_steps": 4, "sculpt_warmup_steps": 3}
    options |= {"save_steps": 3, "save_total_limit": 2}
    assert train(tmp_path / "plain", **options) == 0
    assert train(tmp_path / "saving", activation_checkpointing=True, **options) == 0
    assert same_files(tmp_path / "plain", tmp_path / "saving", (ADAPTER_FILE, MASKS_FILE))
    dense = load_file(tmp_path / "saving" / "checkpoint-3" / ADAPTER_FILE)
    for key, value in dense.items():
        assert value.any(dim=1).all(), key  # lora_B starts at zero: every row has moved


@both_bits
@pytest.mark.parametrize("mode", ["lora", "sculpt"])
def test_lora_on_the_connector(train: Train, tmp_path: Path, bits: int, mode: str) -> None:
    assert train(tmp_path / "run", bits=bits, connector=mode, max_steps=8) == 0
    assert not (tmp_path / "run" / CONNECTOR_FILE).exists()
    weights, masks = load_file(tmp_path / "run" / ADAPTER_FILE), load_file(tmp_path / "run" / MASKS_FILE)
    on_connector = [key for key in weights if "multi_modal_projector" in key]
    assert len(on_connector) == 4 and not any(key in masks for key in on_connector)
    assert all(weights[key].any() for key in on_connector)
    assert ("cmr_connector" in log_of(tmp_path / "run")[-1]) == (mode == "sculpt")


@both_bits
def test_bf16(train: Train, tmp_path: Path, bits: int) -> None:
    assert train(tmp_path / "run", bits=bits, bf16=True, use_cpu=not torch.cuda.is_available()) == 0
    weights, masks = load_file(tmp_path / "run" / ADAPTER_FILE), load_file(tmp_path / "run" / MASKS_FILE)
    assert all(value.dtype == torch.float32 for value in weights.values())
    assert not any(weights[key][~mask].any() for key, mask in masks.items())
    assert all(v.dtype == torch.float32 for v in load_file(tmp_path / "run" / CONNECTOR_FILE).values())
    losses = [record["task_loss"] for record in log_of(tmp_path / "run")]
    assert losses[-1] < losses[5] - 0.05


@pytest.mark.slow
@both_bits
@pytest.mark.parametrize("engine", ["torchrun", pytest.param("zero2", marks=needs_deepspeed)])
def test_two_processes_train_what_one_trains(flags: dict[str, str], tmp_path: Path, bits: int, engine: str) -> None:
    quantised = {**flags, "bits": str(bits)}
    launch(PYTHON, quantised, tmp_path / "one")
    two = {**quantised, "per_device_train_batch_size": "2"}
    if engine == "zero2":
        launch(DEEPSPEED, {**two, **zero("zero2")}, tmp_path / "two")
    else:
        launch(TORCHRUN, two, tmp_path / "two")
    assert_same_run(tmp_path / "two", tmp_path / "one")
    assert_exact(tmp_path / "two", processes=2)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs no GPU: a limit of bitsandbytes' CPU kernels")
def test_four_bits_with_odd_widths_are_refused_on_a_cpu(
    train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny = Path(__file__).parents[2] / "data" / "tiny_llava"  # 160 wide
    assert train(tmp_path / "run", bits=4, model_name_or_path=tiny) == 2
    assert "multiple of 64, this model has 160" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
