"""LoRASculpt on a model that is not LLaVA, with a plain Hugging Face Trainer: two changes to a LoRA script.

Runs in seconds on a CPU, without downloads: a tiny Llama with random weights learns to count. For a model of yours take
its name in place of `tiny_llama()`, its data in place of `counting()`, and name its layers in SculptConfig. The same
mixin goes in front of TRL's trainers: `class SculptSFTTrainer(SculptMixin, SFTTrainer)`. docs/interop.md has more.

    python scripts/sculpt_any_model.py --output_dir runs/any_model
"""

from __future__ import annotations

import argparse
import sys

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, set_seed

from llava_sculpt import SculptConfig, SculptMixin


class SculptTrainer(SculptMixin, Trainer):  # change 1: the mixin
    """Hugging Face's Trainer with LoRASculpt."""


def tiny_llama() -> LlamaForCausalLM:
    """A language model of 28,000 random weights."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            pad_token_id=0,
            initializer_range=0.2,  # nothing is pretrained, so the random layers must carry a signal
        )
    )


def counting(samples: int = 64, length: int = 12) -> list[dict[str, torch.Tensor]]:
    """Sequences n, n + 1, n + 2, ..."""
    rows = (torch.arange(start % 50, start % 50 + length) for start in range(samples))
    return [{"input_ids": row, "labels": row} for row in rows]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--max_steps", type=int, default=40)
    parser.add_argument("--save_steps", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=8, help="samples per micro-step")
    parser.add_argument("--accumulation", type=int, default=1, help="micro-steps per optimizer step")
    parser.add_argument("--resume", action="store_true", help="from the last checkpoint in output_dir")
    options = parser.parse_args(argv)

    set_seed(0)
    # Layers are chosen as PEFT chooses them: a regular expression for whole module names.
    adapted = r"model\.layers\.\d+\.(self_attn|mlp)\.(q|k|v|o|gate|up|down)_proj"
    model = get_peft_model(tiny_llama(), LoraConfig(r=8, lora_alpha=16, target_modules=adapted, task_type="CAUSAL_LM"))
    trainer = SculptTrainer(
        model,
        TrainingArguments(
            output_dir=options.output_dir,
            max_steps=options.max_steps,
            save_steps=options.save_steps,
            per_device_train_batch_size=options.batch,
            gradient_accumulation_steps=options.accumulation,
            learning_rate=1e-2,
            logging_steps=1,
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=counting(),
        sculpt=SculptConfig(  # change 2: its settings
            density=0.1,
            warmup_steps=0.25,
            alpha=1e-2,
            prune=adapted,
            regularize=r".*\.self_attn\.(q|k|v)_proj",
        ),
    )
    trainer.train(resume_from_checkpoint=options.resume)
    trainer.save_model()
    trainer.save_state()
    return 0


if __name__ == "__main__":
    sys.exit(main())
