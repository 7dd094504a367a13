"""Entry of the pretraining: tokenizer, tower, connector and LLM of the tiny LLaVA, as a checkpoint folder."""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from llava_sculpt.data.tokenizer import LlavaTokenizer
from llava_sculpt.tiny.draw import draw_pretraining, draw_world
from llava_sculpt.tiny.pretraining.language import exact_match, train_language
from llava_sculpt.tiny.pretraining.packing import Packer
from llava_sculpt.tiny.pretraining.readme import model_card
from llava_sculpt.tiny.pretraining.tower import normalise, patch_features, pictures_and_tags, train_tower
from llava_sculpt.tiny.pretraining.vocabulary import VOCABULARY, write_tokenizer
from llava_sculpt.tiny.scenes import GRID, PATCH, SIZE, Scene

MEAN, STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]  # CLIP's
PICTURES = {"gqa": 14_000, "okvqa": 6_000, "ocrvqa": 6_000, "textvqa": 6_000}
TOWER_STEPS, LANGUAGE_STEPS = 1200, 2400
LAYERS, HEADS, WIDTH, FEED_FORWARD = 4, 4, 160, 416
INITIAL_STD = 0.08  # 1 / sqrt(WIDTH); with the usual 0.02 so narrow a model needs twice the steps
TOWER_LAYERS, TOWER_WIDTH = 3, 128


def new_model() -> LlavaForConditionalGeneration:
    """The untrained model, from torch's random state. Behind the tokenizer's ids come <image> and padding."""
    image, pad = VOCABULARY, VOCABULARY + 1
    rows = -(-(VOCABULARY + 2) // 64) * 64
    vision = CLIPVisionConfig(
        hidden_size=TOWER_WIDTH,
        intermediate_size=4 * TOWER_WIDTH,
        num_hidden_layers=TOWER_LAYERS,
        num_attention_heads=HEADS,
        image_size=SIZE,
        patch_size=PATCH,
        projection_dim=64,
    )
    text = LlamaConfig(
        vocab_size=rows,
        hidden_size=WIDTH,
        intermediate_size=FEED_FORWARD,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        max_position_embeddings=2048,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=pad,
        initializer_range=INITIAL_STD,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=image,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        image_seq_length=GRID * GRID,
    )
    config.pad_token_id = pad
    return LlavaForConditionalGeneration(config)


def write_preprocessor(folder: Path) -> None:
    """`preprocessor_config.json` of a CLIPImageProcessor for 48 x 48 pictures."""
    settings = {
        "image_processor_type": "CLIPImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": SIZE},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": SIZE, "width": SIZE},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": MEAN,
        "image_std": STD,
        "do_convert_rgb": True,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


@torch.no_grad()
def _features(model: LlavaForConditionalGeneration, pixels: torch.Tensor) -> torch.Tensor:
    return torch.cat([patch_features(model.model.vision_tower, part) for part in pixels.split(500)])


def _pixels(scenes: list[Scene]) -> tuple[torch.Tensor, torch.Tensor]:
    pictures, tags = pictures_and_tags(scenes)
    return normalise(pictures, MEAN, STD), torch.from_numpy(tags)


def score(model: LlavaForConditionalGeneration, packer: Packer, seed: int) -> dict[str, dict[str, float]]:
    """Exact match on all questions about the world's validation pictures, per Source task and family."""
    scores = {}
    for name, splits in draw_world(seed).sources.items():
        features = _features(model, _pixels([scene for scene, _ in splits["val"]])[0])
        scores[name] = exact_match(model, packer, features, [questions for _, questions in splits["val"]])
    return scores


def save(model: LlavaForConditionalGeneration, out: Path, recipe: dict[str, Any]) -> None:
    """Write weights in float16, `recipe.json` with their sha256, and the model card."""
    model.half().save_pretrained(out)
    digest = hashlib.sha256((out / "model.safetensors").read_bytes()).hexdigest()
    recipe = {**recipe, "sha256": digest}
    (out / "recipe.json").write_text(json.dumps(recipe, indent=2) + "\n", encoding="utf-8")
    (out / "README.md").write_text(model_card(recipe), encoding="utf-8")


def pretrain(out: Path, seed: int, threads: int, tower_steps: int, language_steps: int) -> None:
    """Make the checkpoint. The same seed, thread count and package versions give the same file."""
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    out.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    write_tokenizer(out, seed)
    write_preprocessor(out)
    drawn = [sample for samples in draw_pretraining(seed, PICTURES).values() for sample in samples]
    pixels, tags = _pixels([scene for scene, _ in drawn])
    print(f"{len(drawn)} pictures drawn and rendered: {time.monotonic() - started:.0f} s", flush=True)
    model = new_model()
    tower_accuracy = train_tower(model.model.vision_tower, pixels, tags, tower_steps, seed)
    # From here on the tower is the one that will be loaded: rounded to float16, frozen.
    model.model.vision_tower.half().float().requires_grad_(False)
    features = _features(model, pixels)
    packer = Packer(LlavaTokenizer.from_dir(out), GRID * GRID)
    train_language(model, packer, features, [questions for _, questions in drawn], language_steps, seed)
    model.half().float()
    scores = score(model, packer, seed)
    recipe = {
        "seed": seed,
        "pictures": PICTURES,
        "tower_steps": tower_steps,
        "language_steps": language_steps,
        "tower_patch_accuracy": tower_accuracy,
        "validation_exact_match": scores,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "threads": threads,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "machine": platform.machine(),
        "minutes": round((time.monotonic() - started) / 60, 1),
    }
    save(model, out, recipe)
    for name, families in scores.items():
        print(name, families)
    print(f"written to {out} in {recipe['minutes']} minutes")


def main() -> None:
    """`python -m llava_sculpt.tiny.pretraining.pretrain --out data/tiny_llava`."""
    parser = argparse.ArgumentParser(description="Pretrain the tiny LLaVA on CPU.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tower_steps", type=int, default=TOWER_STEPS)
    parser.add_argument("--language_steps", type=int, default=LANGUAGE_STEPS)
    args = parser.parse_args()
    pretrain(args.out, args.seed, args.threads, args.tower_steps, args.language_steps)


if __name__ == "__main__":
    main()
