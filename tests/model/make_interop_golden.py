"""Answers and logits of the tiny LLaVA, with and without an adapter, as the original package gives them.

Two environments, two steps (the second one is described in tests/data/make_golden.py):

    python -m tests.model.make_interop_golden prepare DIR     # this project: base and adapter converted, questions
    .venv-llava/bin/python tests/model/make_interop_golden.py answer DIR    # the original: writes the golden files

Writes golden_interop.json (answers, versions) and golden_interop.safetensors (float32 logits of the next token)
beside this script. Everything runs through the original's `load_pretrained_model`, which loads in float16 whatever it
is asked for; its module is given a torch whose float16 is float32, so that 1e-5 can be asked of the comparison.
"""

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
NEW_TOKENS = 16
PACKAGES = ("llava-torch", "transformers", "tokenizers", "torch", "peft", "pillow", "safetensors")


def prepare(folder: Path) -> None:
    """Write everything the original needs into `folder`."""
    from llava_sculpt.artifacts.convert import convert_adapter, convert_checkpoint
    from tests.model import interop

    convert_checkpoint(str(interop.TINY), "original", folder / "llava-base")
    adapter = interop.make_adapter(folder / "adapter")
    # The original takes a folder for an adapter if its name contains "lora", and for LLaVA if it contains "llava".
    convert_adapter(adapter, "original", folder / "llava-lora", str(folder / "llava-base"))
    questions = interop.make_questions(folder / "world")
    facts = {
        "questions": questions,
        "sha256": interop.questions_hash(folder / "world", questions),
        "with_logits": list(interop.WITH_LOGITS),
    }
    (folder / "questions.json").write_text(json.dumps(facts))


def answer(folder: Path) -> None:
    """Answer the questions with the original package."""
    import torch
    from safetensors.torch import save_file

    facts = json.loads((folder / "questions.json").read_text())
    answers, logits = {}, {}
    for name, path, base in (
        ("base", folder / "llava-base", None),
        ("adapter", folder / "llava-lora", str(folder / "llava-base")),
    ):
        model = load(path, base)
        answers[name] = []
        rows = []
        for number, question in enumerate(facts["questions"]):
            text, row = ask(model, question["text"], folder / "world" / question["image"])
            answers[name].append(text)
            if number in facts["with_logits"]:
                rows.append(row)
        logits[name] = torch.stack(rows)
    save_file(logits, str(HERE / "golden_interop.safetensors"))
    golden = {"made_with": {p: version(p) for p in PACKAGES}, "sha256": facts["sha256"], "answers": answers}
    (HERE / "golden_interop.json").write_text(json.dumps(golden, indent=0) + "\n")
    changed = sum(a != b for a, b in zip(answers["base"], answers["adapter"], strict=True))
    print(f"{len(answers['base'])} answers, {changed} of them changed by the adapter")


class _Float32Torch:
    """torch, but half precision is single."""

    def __getattr__(self, name: str) -> Any:
        import torch

        return torch.float32 if name == "float16" else getattr(torch, name)


def load(path: Path, base: str | None) -> tuple[Any, Any, Any]:
    """(tokenizer, model, image processor) of a folder, in float32 on the CPU."""
    from llava.mm_utils import get_model_name_from_path
    from llava.model import builder

    builder.torch = _Float32Torch()
    name = get_model_name_from_path(str(path))
    tokenizer, model, processor, _ = builder.load_pretrained_model(
        str(path), base, name, device_map="cpu", device="cpu"
    )
    assert all(str(p.dtype) == "torch.float32" for p in model.parameters())
    return tokenizer, model.eval(), processor


def ask(loaded: tuple[Any, Any, Any], text: str, image: Path) -> tuple[str, Any]:
    """Greedy answer to one question, and the logits of its first token, as LLaVA's model_vqa_loader.py asks."""
    import torch
    from llava.constants import DEFAULT_IMAGE_TOKEN, IMAGE_TOKEN_INDEX
    from llava.conversation import conv_templates
    from llava.mm_utils import process_images, tokenizer_image_token
    from PIL import Image

    tokenizer, model, processor = loaded
    conversation = conv_templates["vicuna_v1"].copy()
    conversation.append_message(conversation.roles[0], f"{DEFAULT_IMAGE_TOKEN}\n{text}")
    conversation.append_message(conversation.roles[1], None)
    ids = tokenizer_image_token(conversation.get_prompt(), tokenizer, IMAGE_TOKEN_INDEX, return_tensors="pt")[None]
    picture = Image.open(image).convert("RGB")
    pixels = process_images([picture], processor, model.config)
    with torch.inference_mode():
        logits = model(input_ids=ids, images=pixels, image_sizes=[picture.size]).logits[0, -1]
        output = model.generate(
            ids, images=pixels, image_sizes=[picture.size], do_sample=False, num_beams=1, max_new_tokens=NEW_TOKENS
        )
    return tokenizer.batch_decode(output, skip_special_tokens=True)[0].strip(), logits.float().clone()


if __name__ == "__main__":
    {"prepare": prepare, "answer": answer}[sys.argv[1]](Path(sys.argv[2]).resolve())
