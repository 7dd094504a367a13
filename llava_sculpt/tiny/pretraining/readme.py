"""The model card of the tiny checkpoint."""

from __future__ import annotations

from typing import Any


def model_card(recipe: dict[str, Any]) -> str:
    """Markdown text from the fields of `recipe.json`."""
    scores = recipe["validation_exact_match"]
    lines = [f"| {name} | {families['all']:.1f} |" for name, families in scores.items()]
    mean = sum(families["all"] for families in scores.values()) / len(scores)
    return f"""# Tiny LLaVA

A LLaVA-1.5 in miniature ({recipe["parameters"]:,} parameters, 48 x 48 pictures, 36 image tokens) for
trying LoRASculpt on a laptop. It knows the tiny world of `llava_sculpt/tiny/` and nothing else.

- Layout: Hugging Face `LlavaForConditionalGeneration`, float16 weights, SentencePiece Llama tokenizer.
- Rebuild ({recipe["minutes"]} minutes on the machine that made it): `python -m llava_sculpt.tiny.pretraining.pretrain
  --out data/tiny_llava --seed {recipe["seed"]} --threads {recipe["threads"]}`. The same seed, thread count,
  kind of machine and package versions give the same file.
- Recipe: the CLIP tower learns to name what each patch shows ({recipe["tower_steps"]} steps) and is frozen;
  then connector and LLM learn the four Source tasks ({recipe["language_steps"]} steps). All numbers are in
  `recipe.json`. No picture of the tasks' validation or test splits was used, and nothing of the two
  Target tasks; only the tokenizer has seen the words of all six.
- `model.safetensors` sha256: `{recipe["sha256"]}`

Exact match in percent on all questions about the validation pictures:

| task | exact match |
|---|---|
{chr(10).join(lines)}
| mean | {mean:.1f} |

Made from generated pictures only. The icons in them are from OpenMoji (https://openmoji.org), CC BY-SA 4.0.
"""
