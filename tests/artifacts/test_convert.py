"""Original checkpoints: both ways to the same bits, resumable, and every fault of one told at once."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlavaForConditionalGeneration

from llava_sculpt.artifacts import from_original, writing
from llava_sculpt.artifacts.convert import convert_checkpoint
from llava_sculpt.artifacts.from_original import ROWS_FILE
from llava_sculpt.artifacts.open import open_checkpoint
from llava_sculpt.cli import main
from llava_sculpt.errors import UserError
from llava_sculpt.memory.plan import read_checkpoint_config
from llava_sculpt.model.checkpoint import find_base_checkpoint
from llava_sculpt.model.layout import CLIP_L_336, hf_config, name_of_original, original_name


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return LlavaForConditionalGeneration.from_pretrained(folder).state_dict()


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(one[k], other[k]) and one[k].dtype == other[k].dtype for k in one
    )


@pytest.fixture(scope="module")
def original(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("original") / "llava"
    assert main(["convert", "checkpoint", str(checkpoint), "--to", "original", "--out", str(out)]) == 0
    return out


@pytest.fixture
def copy(original: Path, tmp_path: Path) -> Path:
    """A copy to break, with a tower it finds inside itself."""
    return shutil.copytree(original, tmp_path / "copy")


def test_there_and_back_is_bit_exact(checkpoint: Path, original: Path, tmp_path: Path) -> None:
    convert_checkpoint(str(original), "hf", tmp_path / "hf")
    assert same(weights(checkpoint), weights(tmp_path / "hf"))
    convert_checkpoint(str(tmp_path / "hf"), "original", tmp_path / "again")
    for name in ("model.safetensors", "vision_tower/model.safetensors", ROWS_FILE):
        assert same(load_file(original / name), load_file(tmp_path / "again" / name))
    there, back = (json.loads((f / "config.json").read_text()) for f in (original, tmp_path / "again"))
    assert there | {"mm_vision_tower": ""} == back | {"mm_vision_tower": ""}


def test_the_original_has_no_rows_for_image_and_padding(checkpoint: Path, original: Path) -> None:
    image = find_base_checkpoint(str(checkpoint)).image_token_id
    theirs = load_file(original / "model.safetensors")
    assert theirs["lm_head.weight"].shape[0] == theirs["model.embed_tokens.weight"].shape[0] == image
    assert json.loads((original / "config.json").read_text())["vocab_size"] == image
    assert not any("vision_tower" in name for name in theirs)


def test_new_rows_are_means_and_never_the_largest_logit(copy: Path, tmp_path: Path) -> None:
    (copy / ROWS_FILE).unlink()
    convert_checkpoint(str(copy), "hf", tmp_path / "hf")
    made = weights(tmp_path / "hf")
    theirs = load_file(copy / "model.safetensors")
    for name in ("model.language_model.embed_tokens.weight", "lm_head.weight"):
        real = theirs[original_name(name)]
        assert made[name].shape[0] % 64 == 0
        assert torch.equal(made[name][: len(real)], real)
        assert torch.equal(made[name][len(real) :], real.mean(0).expand(made[name].shape[0] - len(real), -1))


def test_pickled_shards_and_what_old_versions_left_in_them(copy: Path, checkpoint: Path, tmp_path: Path) -> None:
    theirs = load_file(copy / "model.safetensors")
    (copy / "model.safetensors").unlink()
    tower = load_file(copy / "vision_tower" / "model.safetensors")
    # A half-precision copy of the tower and constants, as in liuhaotian/llava-v1.5-7b.
    theirs |= {f"model.vision_tower.vision_tower.{name}": value.half() for name, value in tower.items()}
    theirs["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    names = sorted(theirs)
    for number, part in enumerate((names[::2], names[1::2]), 1):
        torch.save({name: theirs[name] for name in part}, copy / f"pytorch_model-{number:05}-of-00002.bin")
    convert_checkpoint(str(copy), "hf", tmp_path / "hf")
    assert same(weights(checkpoint), weights(tmp_path / "hf"))


def test_every_fault_is_told_at_once(copy: Path, tmp_path: Path) -> None:
    theirs = load_file(copy / "model.safetensors")
    del theirs["model.norm.weight"], theirs["model.mm_projector.2.bias"]
    theirs["model.extra.weight"] = torch.ones(2)
    theirs["model.layers.1.mlp.up_proj.weight"] = torch.ones(3, 3)
    save_file(theirs, str(copy / "model.safetensors"))
    with pytest.raises(UserError) as caught:
        convert_checkpoint(str(copy), "hf", tmp_path / "hf")
    told = "\n".join(caught.value.problems)
    assert len(caught.value.problems) == 4
    for part in (
        "model.language_model.norm.weight is missing",
        "model.multi_modal_projector.linear_2.bias is missing",
        "unexpected weight model.language_model.extra.weight",
        "up_proj.weight is [3, 3], config.json says [128, 64]",
    ):
        assert part in told
    assert not (tmp_path / "hf").exists()


@pytest.mark.parametrize("bin_file", [False, True])
def test_a_truncated_shard(copy: Path, tmp_path: Path, bin_file: bool, capsys: pytest.CaptureFixture[str]) -> None:
    file = copy / "model.safetensors"
    if bin_file:
        torch.save(load_file(file), copy / "pytorch_model.bin")
        file.unlink()
        file = copy / "pytorch_model.bin"
    file.write_bytes(file.read_bytes()[:-100])
    assert main(["convert", "checkpoint", str(copy), "--to", "hf", "--out", str(tmp_path / "hf")]) == 2
    assert f"{file}: truncated" in capsys.readouterr().err


def test_a_shard_that_the_index_names_is_missing(copy: Path, tmp_path: Path) -> None:
    index = {"weight_map": {"lm_head.weight": "model-00002-of-00002.safetensors"}}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"model-00002-of-00002.safetensors: missing, and .* names it"):
        convert_checkpoint(str(copy), "hf", tmp_path / "hf")


def test_a_pickle_with_code_in_it_is_not_run(copy: Path, tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self):  # type: ignore[no-untyped-def]
            return os.mkdir, (str(tmp_path / "ran"),)

    (copy / "model.safetensors").unlink()
    torch.save({"x": Bomb()}, copy / "pytorch_model.bin")
    with pytest.raises(UserError, match="more than tensors"):
        convert_checkpoint(str(copy), "hf", tmp_path / "hf")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mm_projector_type": "linear"}, "mm_projector_type is 'linear'"),
        ({"mm_use_im_start_end": True}, "mm_use_im_start_end is True"),
        ({"mm_patch_merge_type": "spatial_unpad"}, "LLaVA-1.6"),
        ({"mm_vision_tower": "/no/such/tower"}, "no such folder: /no/such/tower"),
    ],
)
def test_what_is_not_llava_1_5(copy: Path, tmp_path: Path, change: dict[str, object], message: str) -> None:
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | change))
    if "mm_vision_tower" in change:
        shutil.rmtree(copy / "vision_tower")
    with pytest.raises(UserError, match=message):
        convert_checkpoint(str(copy), "hf", tmp_path / "hf")


KILLED_AFTER_TWO_FILES = """
import os, sys
from pathlib import Path
from llava_sculpt.artifacts import from_original, writing
from llava_sculpt.artifacts.convert import convert_checkpoint
from_original.in_shards = lambda tensors: writing.in_shards(tensors, 20_000)
write, done = writing.write_safetensors, []
def two_only(file, tensors, metadata=None):
    if len(done) == 2:
        os._exit(9)
    write(file, tensors, metadata)
    done.append(file)
writing.write_safetensors = two_only
convert_checkpoint(sys.argv[1], "hf", Path(sys.argv[2]))
"""


def test_a_killed_conversion_continues(
    original: Path,
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "hf"
    killed = subprocess.run([sys.executable, "-c", KILLED_AFTER_TWO_FILES, str(original), str(out)], check=False)
    assert killed.returncode == 9 and not out.exists()
    kept = sorted((tmp_path / ".hf.partial").glob("model*.safetensors"))
    assert len(kept) == 2
    times = [file.stat().st_mtime_ns for file in kept]
    monkeypatch.setattr(from_original, "in_shards", lambda tensors: writing.in_shards(tensors, 20_000))
    convert_checkpoint(str(original), "hf", out)
    assert "2 of" in capsys.readouterr().err
    assert [(out / file.name).stat().st_mtime_ns for file in kept] == times
    assert len(list(out.glob("model-*.safetensors"))) > 5 and not (out / "progress.json").exists()
    assert same(weights(checkpoint), weights(out))


def test_what_was_kept_of_another_source_is_not_used(copy: Path, tmp_path: Path) -> None:
    aside = tmp_path / ".hf.partial"
    aside.mkdir()
    (aside / "progress.json").write_text('{"source": "other"}')
    (aside / "model-00001-of-00009.safetensors").write_bytes(b"old")
    convert_checkpoint(str(copy), "hf", tmp_path / "hf")
    assert sorted(f.name for f in (tmp_path / "hf").glob("model*")) == ["model.safetensors"]


def test_finding_does_not_convert(
    copy: Path, checkpoint: Path, training_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(UserError, match="convert it: llava-sculpt convert checkpoint"):
        find_base_checkpoint(str(copy))
    found, ours = (find_base_checkpoint(str(folder), weights=False) for folder in (copy, checkpoint))
    for name in ("image_token_id", "pad_token_id", "image_tokens", "smallest_dimension"):
        assert getattr(found, name) == getattr(ours, name)
    data = [str(training_data / "train.json"), "--image_folder", str(training_data / "images")]
    assert main(["check-data", *data, "--model", str(copy)]) == 0
    assert not (tmp_path / "cache").exists()


def test_tied_embeddings_there_and_back(checkpoint: Path, tmp_path: Path) -> None:
    model = LlavaForConditionalGeneration.from_pretrained(checkpoint)
    model.config.tie_word_embeddings = model.config.text_config.tie_word_embeddings = True
    model.tie_weights()
    model.save_pretrained(tmp_path / "tied")
    for name in ("tokenizer.model", "preprocessor_config.json"):
        shutil.copy(checkpoint / name, tmp_path / "tied" / name)
    convert_checkpoint(str(tmp_path / "tied"), "original", tmp_path / "llava")
    assert json.loads((tmp_path / "llava" / "config.json").read_text())["tie_word_embeddings"] is True
    convert_checkpoint(str(tmp_path / "llava"), "hf", tmp_path / "back")
    assert same(weights(tmp_path / "tied"), weights(tmp_path / "back"))
    first, again = (find_base_checkpoint(str(tmp_path / name)) for name in ("tied", "back"))
    assert first.weights_fingerprint() == again.weights_fingerprint()


def test_a_name_that_llava_does_not_recognise(checkpoint: Path, tmp_path: Path, capsys) -> None:  # type: ignore[no-untyped-def]
    convert_checkpoint(str(checkpoint), "original", tmp_path / "mine")
    assert "; convert into" in (told := capsys.readouterr().err) and "llava-mine" in told
    convert_checkpoint(str(checkpoint), "original", tmp_path / "LLaVA")
    assert capsys.readouterr().err == ""


def test_opening_converts_once_into_the_cache(
    copy: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    first = open_checkpoint(str(copy))
    assert "converting it once into" in capsys.readouterr().err
    again = open_checkpoint(str(copy))
    assert capsys.readouterr().err == ""
    assert first == again and first.path.is_relative_to(tmp_path / "cache")
    assert first.fingerprint() == again.fingerprint()
    assert same(weights(checkpoint), weights(first.path))
    theirs = load_file(copy / "model.safetensors")
    theirs["lm_head.weight"] += 1
    save_file(theirs, str(copy / "model.safetensors"))
    assert open_checkpoint(str(copy)).path != first.path


def test_training_takes_an_original_checkpoint(copy: Path, train, tmp_path: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    options = {"max_steps": 2, "sculpt_warmup_steps": 1, "method": "lora"}
    assert train(tmp_path / "theirs", model_name_or_path=copy, **options) == 0
    assert train(tmp_path / "ours", **options) == 0
    files = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("theirs", "ours")]
    assert same(*files)


def test_plan_reads_an_original_configuration(original: Path, checkpoint: Path) -> None:
    theirs, ours = read_checkpoint_config(str(original)), json.loads((checkpoint / "config.json").read_text())
    for part, key in (("text_config", "hidden_size"), ("text_config", "vocab_size"), ("vision_config", "image_size")):
        assert theirs[part][key] == ours[part][key]
    assert read_checkpoint_config("liuhaotian/llava-v1.5-13b")["text_config"]["hidden_size"] == 5120


def test_the_published_configuration_of_7b() -> None:
    published = {
        "model_type": "llava",
        "mm_vision_tower": "openai/clip-vit-large-patch14-336",
        "mm_projector_type": "mlp2x_gelu",
        "mm_use_im_patch_token": False,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "vocab_size": 32000,
    }
    config = hf_config(published, CLIP_L_336)
    assert config["text_config"]["vocab_size"] == 32064  # as in llava-hf/llava-1.5-7b-hf
    assert (config["image_token_index"], config["pad_token_id"], config["image_seq_length"]) == (32000, 32001, 576)


def test_names_there_and_back(checkpoint: Path) -> None:
    for name in weights(checkpoint):
        assert name_of_original(original_name(name)) == name
