"""Fill a golden file with what the original LLaVA package makes of its records and prompts.

The package needs an environment of its own, .venv-llava, which `make parity` builds (and then compares it live with the
stored file: tests/llava_patch/). By hand:

    .venv-llava/bin/python tests/data/make_golden.py [FILE]

FILE (default: golden_llava.json beside this script) is read, and written again in place. It has "samples", each with
a "record", and "prompts", each with "question" and "has_image". The script adds "input_ids", "labels" and, for a
record with an image, "pixels_shape" and "pixels_sha256" (of the float32 bytes) to the samples, and "input_ids" to
the prompts. To add a case, add its record and run the script. A record that the package fails on gets "error".
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from golden_images import write_image
from llava.constants import DEFAULT_IMAGE_TOKEN, IMAGE_TOKEN_INDEX
from llava.conversation import conv_templates
from llava.mm_utils import tokenizer_image_token
from llava.train.train import LazySupervisedDataset
from transformers import AutoTokenizer, CLIPImageProcessor

HERE = Path(__file__).resolve().parent
PACKAGES = ("llava-torch", "transformers", "tokenizers", "sentencepiece", "torch", "pillow", "numpy")


def load_tokenizer(folder: Path) -> Any:
    """The Llama tokenizer of a folder with tokenizer.model, set up as LLaVA's train.py does for ``--version v1``."""
    settings = {
        "tokenizer_class": "LlamaTokenizer",
        "legacy": False,
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
    }
    with tempfile.TemporaryDirectory() as temporary:
        (Path(temporary) / "tokenizer.model").write_bytes((folder / "tokenizer.model").read_bytes())
        (Path(temporary) / "tokenizer_config.json").write_text(json.dumps(settings))
        (Path(temporary) / "config.json").write_text('{"model_type": "llama"}')
        tokenizer = AutoTokenizer.from_pretrained(
            temporary, model_max_length=2048, padding_side="right", use_fast=False
        )
    tokenizer.pad_token = tokenizer.unk_token
    return tokenizer


def run_sample(record: dict[str, Any], folder: Path, tokenizer: Any, processor: Any) -> dict[str, Any]:
    """Ids, labels and pixels of one record through LLaVA's own dataset class."""
    data = folder / "data.json"
    data.write_text(json.dumps([record]))
    if "image" in record:
        write_image(folder, record["image"])
    arguments = SimpleNamespace(
        is_multimodal=True,
        mm_use_im_start_end=False,
        image_folder=str(folder),
        image_processor=processor,
        image_aspect_ratio="pad",
    )
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # it prints a warning for each record that it masks
            item = LazySupervisedDataset(str(data), tokenizer, arguments)[0]
    except (AssertionError, KeyError, ValueError, IndexError, TypeError) as error:
        return {"error": type(error).__name__}
    result = {"input_ids": item["input_ids"].tolist(), "labels": item["labels"].tolist()}
    if "image" in record:
        pixels = item["image"]
        if str(pixels.dtype) != "torch.float32":
            raise TypeError(f"pixels are {pixels.dtype}")
        result["pixels_shape"] = list(pixels.shape)
        result["pixels_sha256"] = hashlib.sha256(pixels.contiguous().numpy().tobytes()).hexdigest()
    return result


def run_prompt(question: str, has_image: bool, tokenizer: Any) -> list[int]:
    """Prompt ids as LLaVA's model_vqa_loader.py makes them."""
    conversation = conv_templates["vicuna_v1"].copy()
    conversation.append_message(conversation.roles[0], f"{DEFAULT_IMAGE_TOKEN}\n{question}" if has_image else question)
    conversation.append_message(conversation.roles[1], None)
    ids: list[int] = tokenizer_image_token(conversation.get_prompt(), tokenizer, IMAGE_TOKEN_INDEX)
    return ids


def main(path: Path) -> None:
    """Read the file, fill in the answers, write it back."""
    golden = json.loads(path.read_text(encoding="utf-8"))
    tokenizer = load_tokenizer(HERE / "fixtures")
    processor = CLIPImageProcessor.from_pretrained(str(HERE / "fixtures"))
    with tempfile.TemporaryDirectory() as folder:
        golden["samples"] = [
            {"record": s["record"], **run_sample(s["record"], Path(folder), tokenizer, processor)}
            for s in golden["samples"]
        ]
    for prompt in golden["prompts"]:
        prompt["input_ids"] = run_prompt(prompt["question"], prompt["has_image"], tokenizer)
    golden["made_with"] = {name: version(name) for name in PACKAGES}
    lines = [json.dumps("made_with") + ": " + json.dumps(golden["made_with"])]
    for key in ("samples", "prompts"):
        rows = ",\n".join(json.dumps(row) for row in golden[key])
        lines.append(f"{json.dumps(key)}: [\n{rows}\n]")
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE / "golden_llava.json")
