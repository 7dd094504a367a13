"""Adapters travel to the original package and back, merge with proof, and shrink to small files."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoProcessor, LlamaConfig, LlamaForCausalLM, LlavaForConditionalGeneration

from llava_sculpt.artifacts import delta as delta_module
from llava_sculpt.artifacts.convert import convert_adapter, convert_checkpoint
from llava_sculpt.artifacts.delta import SparseDelta
from llava_sculpt.artifacts.inference import inference_dtype, load_for_inference
from llava_sculpt.artifacts.merge import WeightUpdate, bits, merge_adapter, rewrite_checkpoint
from llava_sculpt.artifacts.sparse import export_sparse, import_sparse, pack_mask, unpack_mask
from llava_sculpt.cli import main
from llava_sculpt.errors import UserError
from llava_sculpt.model.checkpoint import find_base_checkpoint
from llava_sculpt.model.files import ADAPTER_CONFIG, ADAPTER_FILE, CONNECTOR_FILE, MASKS_FILE
from llava_sculpt.model.lora import LLM_TARGETS
from llava_sculpt.model.whole import read_run
from tests.model.interop import make_adapter
from tests.runs import changed

PEFT_0_10 = {"r", "lora_alpha", "target_modules", "lora_dropout", "use_dora", "use_rslora", "bias", "peft_type"}


@pytest.fixture(scope="module")
def run(train, tmp_path_factory: pytest.TempPathFactory) -> Path:  # type: ignore[no-untyped-def]
    """A finished run: masks, connector, run.json."""
    folder = tmp_path_factory.mktemp("run") / "run"
    assert train(folder) == 0
    return folder


@pytest.fixture(scope="module")
def original_base(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("original") / "llava"
    convert_checkpoint(str(checkpoint), "original", out)
    return out


def logits(model: nn.Module) -> torch.Tensor:
    pixels = torch.linspace(-1, 1, 3 * 16 * 16).reshape(1, 3, 16, 16)
    image = model.config.image_token_id  # type: ignore[union-attr]
    with torch.inference_mode():
        return model.eval()(input_ids=torch.tensor([[1, 5] + [image] * 4 + [6, 7, 8]]), pixel_values=pixels).logits


def plain(checkpoint: Path, dtype: torch.dtype = torch.float32) -> nn.Module:
    return LlavaForConditionalGeneration.from_pretrained(checkpoint, dtype=dtype)


def same_file(one: Path, other: Path) -> bool:
    first, second = load_file(one), load_file(other)
    return first.keys() == second.keys() and all(torch.equal(bits(first[k]), bits(second[k])) for k in first)


# to the original and back


@pytest.mark.parametrize("connector", ["full", "frozen", "lora"])
def test_adapter_there_and_back(checkpoint: Path, original_base: Path, tmp_path: Path, connector: str) -> None:
    adapter = make_adapter(tmp_path / "adapter", connector, base=checkpoint)
    convert_adapter(adapter, "original", tmp_path / "llava-lora", str(original_base))
    convert_adapter(tmp_path / "llava-lora", "hf", tmp_path / "back", str(checkpoint))
    assert same_file(adapter / ADAPTER_FILE, tmp_path / "back" / ADAPTER_FILE)
    assert (adapter / CONNECTOR_FILE).exists() == (tmp_path / "back" / CONNECTOR_FILE).exists() == (connector == "full")
    if connector == "full":
        assert same_file(adapter / CONNECTOR_FILE, tmp_path / "back" / CONNECTOR_FILE)
    there, back = (json.loads((f / ADAPTER_CONFIG).read_text()) for f in (adapter, tmp_path / "back"))
    assert all(there[key] == back[key] for key in PEFT_0_10)
    if connector != "lora":
        assert back["target_modules"] == LLM_TARGETS
    ours, again = (load_for_inference(str(f), dtype=torch.float32).model for f in (adapter, tmp_path / "back"))
    assert torch.equal(logits(ours), logits(again))


def test_what_the_original_gets(
    run: Path, original_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "llava-lora"
    command = ["convert", "adapter", str(run), "--to", "original", "--base", str(original_base), "--out", str(out)]
    assert main(command) == 0
    assert "warning" not in capsys.readouterr().err
    assert main([*command[:-1], str(tmp_path / "Mine-LoRA")]) == 0
    assert "; convert into" in (told := capsys.readouterr().err) and "llava-Mine-LoRA" in told
    keys = load_file(out / ADAPTER_FILE).keys()
    assert "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight" in keys and len(keys) == 28
    others = torch.load(out / "non_lora_trainables.bin", weights_only=True)
    assert {k.removeprefix("base_model.model.model.mm_projector.") for k in others} == {
        "0.weight",
        "0.bias",
        "2.weight",
        "2.bias",
    }
    assert json.loads((out / "config.json").read_text()) == json.loads((original_base / "config.json").read_text())
    assert json.loads((out / "run.json").read_text())["base"].keys() == {
        "path",
        "fingerprint",
        "weights",
        "architecture",
    }


def test_a_pickled_adapter_of_llava(run: Path, original_base: Path, tmp_path: Path) -> None:
    convert_adapter(run, "original", tmp_path / "llava-lora", str(original_base))
    torch.save(load_file(tmp_path / "llava-lora" / ADAPTER_FILE), tmp_path / "llava-lora" / "adapter_model.bin")
    (tmp_path / "llava-lora" / ADAPTER_FILE).unlink()
    convert_adapter(changed(tmp_path / "llava-lora"), "hf", tmp_path / "back")
    assert same_file(run / ADAPTER_FILE, tmp_path / "back" / ADAPTER_FILE)


def test_other_trained_weights_are_not_dropped(run: Path, original_base: Path, tmp_path: Path) -> None:
    convert_adapter(run, "original", tmp_path / "llava-lora", str(original_base))
    file = tmp_path / "llava-lora" / "non_lora_trainables.bin"
    torch.save({**torch.load(file, weights_only=True), "model.embed_tokens.weight": torch.ones(2)}, file)
    with pytest.raises(UserError, match="embed_tokens"):
        convert_adapter(changed(tmp_path / "llava-lora"), "hf", tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_a_setting_that_old_peft_lacks_is_refused(run: Path, original_base: Path, tmp_path: Path) -> None:
    adapter = shutil.copytree(run, tmp_path / "adapter")
    config = json.loads((adapter / ADAPTER_CONFIG).read_text())
    (adapter / ADAPTER_CONFIG).write_text(json.dumps({**config, "lora_bias": True}))
    changed(adapter)
    with pytest.raises(UserError, match="lora_bias is True"):
        convert_adapter(adapter, "original", tmp_path / "out", str(original_base))


def test_the_same_layout_is_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="'hf' already"):
        convert_adapter(run, "hf", tmp_path / "out")


# merging


def test_merged_is_unmerged_and_the_rest_is_the_base(run: Path, checkpoint: Path, tmp_path: Path, capsys) -> None:  # type: ignore[no-untyped-def]
    assert main(["merge", str(run), "--out", str(tmp_path / "merged")]) == 0
    table = capsys.readouterr().out
    assert "bit for bit" in table and "q_proj" in table and "total" in table
    merged = plain(tmp_path / "merged")
    assert (logits(merged) - logits(load_for_inference(str(run)).model)).abs().max() <= 1e-5
    adapter = load_file(run / ADAPTER_FILE)
    before, after = plain(checkpoint).state_dict(), merged.state_dict()
    counts: Counter[str] = Counter()
    for name in before:
        different = bits(before[name]) != bits(after[name])
        key = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{key}.lora_A.weight" in adapter:
            product = adapter[f"{key}.lora_B.weight"].double() @ adapter[f"{key}.lora_A.weight"].double()
            assert not different[product == 0].any()
            assert different.any()
            counts[name.split(".")[-2]] += int(different.sum())
        elif "multi_modal_projector" not in name:
            assert not different.any()
    record = json.loads((tmp_path / "merged" / "merge.json").read_text())
    assert {kind: record["changed"][kind]["changed"] for kind in counts} == counts
    assert record["base"]["fingerprint"] and record["versions"]["torch"]
    AutoProcessor.from_pretrained(tmp_path / "merged")
    assert torch.equal(logits(load_for_inference(str(tmp_path / "merged")).model), logits(merged))


@pytest.mark.parametrize(("name", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_merged_in_half_precision_is_rounded_once(
    run: Path, checkpoint: Path, tmp_path: Path, name: str, dtype: torch.dtype
) -> None:
    merge_adapter(run, tmp_path / "half", dtype=name)
    merge_adapter(run, tmp_path / "full")
    half, full = load_file(tmp_path / "half" / "model.safetensors"), load_file(tmp_path / "full" / "model.safetensors")
    assert all(half[key].dtype == dtype and torch.equal(half[key], full[key].to(dtype)) for key in full)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_merged_in_memory_is_what_merge_writes(
    run: Path, checkpoint: Path, tmp_path: Path, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a base stored in that dtype: weights off the support, and on it, bit for bit; in float32 nothing is merged."""
    rewrite_checkpoint(find_base_checkpoint(str(checkpoint)), tmp_path / "base", lambda *_: None, dtype)
    adapter = tmp_path / "adapter"  # as stock PEFT leaves it, with a connector: of no known base
    adapter.mkdir()
    for name in (ADAPTER_CONFIG, ADAPTER_FILE, CONNECTOR_FILE):
        shutil.copy(run / name, adapter)
    merge_adapter(adapter, tmp_path / "merged", str(tmp_path / "base"))
    expected = load_for_inference(str(tmp_path / "merged"), dtype=dtype).model.state_dict()
    loaded = load_for_inference(str(adapter), base=str(tmp_path / "base"), dtype=dtype, merge=True)
    found = loaded.model.state_dict()
    assert loaded.merged and found.keys() == expected.keys()
    assert all(torch.equal(bits(found[name]), bits(expected[name])) for name in found)
    assert not load_for_inference(str(run), dtype=torch.float32, merge=True).merged
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert inference_dtype(loaded.checkpoint) == dtype
    assert inference_dtype(find_base_checkpoint(str(checkpoint))) == torch.float16  # stored in float32


def test_merge_keeps_negative_zeros() -> None:
    update = WeightUpdate(torch.zeros(1, 3), torch.ones(2, 1), 1.0)
    weight = torch.tensor([[-0.0, 0.0, 1.0], [-1.0, -0.0, 2.0]])
    assert torch.equal(bits(update.apply(weight)), bits(weight))


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("dora", [False, True])
def test_merge_equals_pefts(checkpoint: Path, tmp_path: Path, rslora: bool, dora: bool) -> None:
    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=6, target_modules=LLM_TARGETS, use_rslora=rslora, use_dora=dora)
    model = get_peft_model(plain(checkpoint), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    model.peft_config["default"].base_model_name_or_path = str(checkpoint)
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    merge_adapter(tmp_path / "adapter", tmp_path / "merged")
    expected = model.merge_and_unload().state_dict()
    for name, weight in plain(tmp_path / "merged").state_dict().items():
        assert torch.allclose(weight, expected[name], rtol=1e-5, atol=1e-6), name


def broken(run: Path, folder: Path, change) -> Path:  # type: ignore[no-untyped-def]
    adapter = shutil.copytree(run, folder)
    tensors = load_file(adapter / ADAPTER_FILE)
    change(tensors)
    save_file(tensors, str(adapter / ADAPTER_FILE))
    return changed(adapter)


def test_adapters_that_cannot_be_merged(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    key = "base_model.model.model.language_model.layers.0.self_attn.q_proj"

    def refused(adapter: Path, *extra: str) -> str:
        assert main(["merge", str(adapter), "--out", str(tmp_path / "out"), *extra]) == 2
        assert not (tmp_path / "out").exists()
        return capsys.readouterr().err

    assert "no pair" in refused(broken(run, tmp_path / "1", lambda t: t.pop(f"{key}.lora_B.weight")))
    odd = broken(run, tmp_path / "2", lambda t: t.update({"base_model.model.x.lora_A.weight": torch.ones(8, 2)}))
    assert "no pair" in refused(odd)
    wide = broken(run, tmp_path / "3", lambda t: t.update({f"{key}.lora_A.weight": torch.ones(8, 99)}))
    (wide / MASKS_FILE).unlink()
    assert "does not fit" in refused(changed(wide))
    cut = shutil.copytree(run, tmp_path / "4")
    (cut / ADAPTER_FILE).write_bytes((cut / ADAPTER_FILE).read_bytes()[:-9])
    assert "truncated" in refused(changed(cut))
    config = json.loads((cut / ADAPTER_CONFIG).read_text())
    other = shutil.copytree(run, tmp_path / "5")
    (other / ADAPTER_CONFIG).write_text(json.dumps({**config, "rank_pattern": {"q_proj": 8}}))
    assert "rank_pattern" in refused(changed(other))


def test_another_base_is_refused(run: Path, checkpoint: Path, tmp_path: Path) -> None:
    base = shutil.copytree(checkpoint, tmp_path / "base")
    weights = load_file(base / "model.safetensors")
    weights["language_model.lm_head.weight"] += 1
    save_file(weights, str(base / "model.safetensors"), metadata={"format": "pt"})
    with pytest.raises(UserError, match="another base"):
        merge_adapter(run, tmp_path / "out", str(base))


def test_an_adapter_that_changes_nothing(run: Path, checkpoint: Path, tmp_path: Path) -> None:
    adapter = broken(
        run, tmp_path / "zero", lambda t: t.update({k: torch.zeros_like(v) for k, v in t.items() if "lora_B" in k})
    )
    (adapter / CONNECTOR_FILE).unlink()
    changed(adapter)
    with pytest.raises(UserError, match="changes nothing"):
        load_for_inference(str(adapter))
    with pytest.raises(UserError, match="changes nothing"):
        merge_adapter(adapter, tmp_path / "out")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, nn.Module]:
    """Base and adapter of a model that is not LLaVA, and what peft merges them to."""
    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes)).save_pretrained(folder / "base")
    base = LlamaForCausalLM.from_pretrained(folder / "base")
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False))
    model.save_pretrained(folder / "adapter", save_embedding_layers=False)
    return folder / "base", folder / "adapter", model.merge_and_unload()


def test_a_model_that_is_not_llava(llama: tuple[Path, Path, nn.Module], tmp_path: Path, capsys) -> None:  # type: ignore[no-untyped-def]
    base, adapter, expected = llama
    config = json.loads((adapter / ADAPTER_CONFIG).read_text())
    (adapter / ADAPTER_CONFIG).write_text(json.dumps({**config, "base_model_name_or_path": None}))
    words = ["--out", str(tmp_path / "merged")]
    assert main(["merge", str(adapter), *words]) == 2
    assert "name the base with --base" in capsys.readouterr().err
    assert main(["merge", str(adapter), *words, "--base", str(base)]) == 0
    assert "q_proj" in capsys.readouterr().out
    merged = LlamaForCausalLM.from_pretrained(tmp_path / "merged").state_dict()
    assert all(torch.allclose(merged[name], value, atol=1e-6) for name, value in expected.state_dict().items())
    delta_module.export_delta(adapter, tmp_path / "delta.safetensors", str(base))
    model = LlamaForCausalLM.from_pretrained(base)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    task = SparseDelta.load(tmp_path / "delta.safetensors")
    task.apply(model)
    assert all(torch.equal(value, merged[name]) for name, value in model.state_dict().items())
    task.remove(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


# small files


def test_sparse_file_there_and_back(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, out = tmp_path / "adapter.sparse.safetensors", tmp_path / "back"
    assert main(["export", str(run), "--format", "sparse", "--out", str(file)]) == 0
    assert main(["export", str(file), "--format", "dense", "--out", str(out)]) == 0
    for name in (ADAPTER_FILE, MASKS_FILE, CONNECTOR_FILE):
        one, other = load_file(run / name), load_file(out / name)
        assert one.keys() == other.keys()
        assert all(one[k].numpy().tobytes() == other[k].numpy().tobytes() for k in one)
    assert json.loads((out / ADAPTER_CONFIG).read_text()) == json.loads((run / ADAPTER_CONFIG).read_text())
    assert read_run(out) == {**read_run(run), "files": read_run(out)["files"]}
    assert torch.equal(logits(load_for_inference(str(out)).model), logits(load_for_inference(str(run)).model))


@pytest.mark.parametrize(("dtype", "times"), [(None, 4.2), (torch.bfloat16, 7.2)])
def test_sparse_file_is_small(tmp_path: Path, dtype: torch.dtype | None, times: float) -> None:
    """One layer's q_proj at the size of the 7B model: rank 32, density 0.1, float32."""
    torch.manual_seed(0)
    shapes = {"x.lora_A.weight": (32, 4096), "x.lora_B.weight": (4096, 32)}
    tensors = {name: torch.randn(shape).masked_fill(torch.rand(shape) > 0.1, 0) for name, shape in shapes.items()}
    save_file(tensors, str(tmp_path / ADAPTER_FILE))
    (tmp_path / ADAPTER_CONFIG).write_text(json.dumps({"peft_type": "LORA", "r": 32, "lora_alpha": 64}))
    sizes = export_sparse(tmp_path, tmp_path / "small.safetensors", dtype)
    assert sizes["dense_bf16"] == 2 * 2 * 32 * 4096
    assert (tmp_path / "small.safetensors").stat().st_size * times < sizes["dense_bf16"]


@given(st.lists(st.booleans(), min_size=1, max_size=200))
def test_masks_survive_packing(mask: list[bool]) -> None:
    tensor = torch.tensor(mask)
    assert torch.equal(unpack_mask(pack_mask(tensor), (len(mask),)), tensor)
    with pytest.raises(ValueError):
        unpack_mask(pack_mask(tensor), (len(mask) + 8,))


def test_broken_sparse_files(run: Path, tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    export_sparse(run, file)
    with pytest.raises(UserError, match="exists"):
        export_sparse(run, file)
    with pytest.raises(UserError, match="not a file of the format"):
        import_sparse(run / ADAPTER_FILE, tmp_path / "out")
    tampered = broken(run, tmp_path / "tampered", lambda t: [v.fill_(1) for v in t.values()])
    with pytest.raises(UserError, match="off its mask"):
        export_sparse(tampered, tmp_path / "b.safetensors")
    file.write_bytes(file.read_bytes()[:-7])
    with pytest.raises(UserError, match="truncated"):
        import_sparse(file, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_delta_goes_on_and_off(run: Path, checkpoint: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    file = tmp_path / "task.safetensors"
    assert main(["export", str(run), "--format", "delta", "--out", str(file)]) == 0
    merge_adapter(run, tmp_path / "merged", dtype="fp32" if dtype == torch.float32 else "bf16")
    model = plain(checkpoint, dtype)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    task = SparseDelta.load(file)
    task.apply(model)
    # The base is float32: merging rounds W + BA once, a bfloat16 model has rounded W before.
    merged = plain(tmp_path / "merged", dtype).state_dict()
    for name, value in model.state_dict().items():
        if dtype == torch.float32:
            assert torch.equal(value, merged[name]), name
    assert not torch.equal(logits(model.float()), logits(plain(checkpoint, dtype).float()))
    model.to(dtype)
    with pytest.raises(RuntimeError, match="applied already"):
        task.apply(model)
    task.remove(model)
    assert all(torch.equal(bits(value), bits(before[name])) for name, value in model.state_dict().items())
    with pytest.raises(RuntimeError, match="not applied"):
        task.remove(model)


def test_two_deltas_come_off_in_reverse(run: Path, checkpoint: Path, tmp_path: Path) -> None:
    delta_module.export_delta(run, tmp_path / "a.safetensors")
    model = plain(checkpoint)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    first, second = (SparseDelta.load(tmp_path / "a.safetensors") for _ in range(2))
    first.apply(model)
    second.apply(model)
    with pytest.raises(RuntimeError, match="changed since"):
        first.remove(model)
    second.remove(model)
    first.remove(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_delta_of_another_model(run: Path, tmp_path: Path) -> None:
    delta_module.export_delta(run, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="not in this model"):
        SparseDelta.load(tmp_path / "a.safetensors").apply(nn.Linear(2, 2))


def test_stock_peft_loads_what_came_back(run: Path, original_base: Path, checkpoint: Path, tmp_path: Path) -> None:
    convert_adapter(run, "original", tmp_path / "llava-lora", str(original_base))
    convert_adapter(tmp_path / "llava-lora", "hf", tmp_path / "back", str(checkpoint))
    stock = PeftModel.from_pretrained(plain(checkpoint), str(tmp_path / "back"))
    stock.get_base_model().load_state_dict(load_file(tmp_path / "back" / CONNECTOR_FILE), strict=False)
    assert torch.equal(logits(stock), logits(load_for_inference(str(run)).model))
