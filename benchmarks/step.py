"""Time of a training step with LoRASculpt beside the same step with plain LoRA.

    python benchmarks/step.py                    # tiny model, and one decoder layer of the 7B's shape
    python benchmarks/step.py --only layer --tokens 2600 --ranks 16 32 64 --json out.json

Both methods train the same model in one process and take turns, so that the ratio survives a noisy machine. A step is
forward, backward, clipping and AdamW, with gradient accumulation 1: the case in which the regularizer, evaluated once
per optimizer step, weighs most. LoRASculpt is measured after its masks are made (masked gradients, regularizer on).

  tiny    data/tiny_llava, 16 samples with an image each: its matrices are so small that fixed costs dominate
  layer   LLaVA with one LLM layer of the 7B's shape (4096, 11008, 32 heads) and a small vocabulary; 32 such layers
          make the 7B, so the ratio there is this one or better
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from measurements import write_results
from peft import PeftModel
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from llava_sculpt.config import SculptConfig
from llava_sculpt.model.checkpoint import find_base_checkpoint
from llava_sculpt.model.load import load_base
from llava_sculpt.model.lora import inject_lora, lora_pairs
from llava_sculpt.sculpt import magnitude_mask
from llava_sculpt.train.regularizer import ConflictRegularizer

TINY = Path(__file__).parents[1] / "data" / "tiny_llava"


class Step:
    """One optimizer step of a model, with or without the regularizer."""

    def __init__(self, model: PeftModel, batch: dict[str, torch.Tensor]) -> None:
        self.model, self.batch = model, batch
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-4, weight_decay=0.0)
        self.pairs = lora_pairs(model)
        self.regularizer = ConflictRegularizer(self.pairs, SculptConfig())

    def make_masks(self) -> list[Any]:
        """Prune as the callback does; returns the gradient hooks."""
        hooks = []
        for pair in self.pairs:
            for _, parameter in pair.parameters():
                mask = magnitude_mask(parameter, 0.1)
                parameter.data.masked_fill_(~mask, 0)
                hooks.append(parameter.register_hook(lambda gradient, mask=mask: gradient.masked_fill(~mask, 0)))
        return hooks

    def run(self, sculpt: bool) -> float:
        start = time.perf_counter()
        term = self.regularizer() if sculpt else None
        loss = self.model(**self.batch).loss
        if term is None:
            loss.backward()
        else:
            (loss + term).backward()
            self.regularizer.value()
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.trained[0].device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start


def measure(model: PeftModel, batch: dict[str, torch.Tensor], repeats: int) -> dict[str, float]:
    step = Step(model, batch)
    for sculpt in (False, True, False, True):  # libraries load, B leaves zero, constants of W are made
        step.run(sculpt)
    seconds: dict[bool, list[float]] = {False: [], True: []}
    for _ in range(repeats):
        seconds[False].append(step.run(False))
        hooks = step.make_masks()
        seconds[True].append(step.run(True))
        for hook in hooks:
            hook.remove()
    lora, sculpt = (statistics.median(seconds[key]) for key in (False, True))
    # Neighbours in time share the machine's state: the median of their ratios is steadier than the ratio of medians.
    ratio = statistics.median(s / plain for s, plain in zip(seconds[True], seconds[False], strict=True))
    return {"lora_ms": 1e3 * lora, "sculpt_ms": 1e3 * sculpt, "ratio": ratio}


def tiny_case(rank: int, repeats: int, device: torch.device) -> dict[str, Any]:
    checkpoint = find_base_checkpoint(str(TINY))
    torch.manual_seed(0)
    model = inject_lora(load_base(checkpoint, torch.float32), r=rank, lora_alpha=2 * rank, dropout=0, connector="full")
    text = torch.randint(5, 200, (16, 40), device=device)
    images = torch.full((16, checkpoint.image_tokens), checkpoint.image_token_id, device=device)
    ids = torch.cat([text[:, :8], images, text[:, 8:]], dim=1)
    side = checkpoint.image_size
    batch = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "labels": ids.masked_fill(ids == checkpoint.image_token_id, -100),
        "pixel_values": torch.randn(16, 3, side, side, device=device),
    }
    return {"case": "tiny", "rank": rank, "tokens": ids.numel(), **measure(model.to(device), batch, repeats)}


def layer_case(rank: int, tokens: int, dtype: torch.dtype, repeats: int, device: torch.device) -> dict[str, Any]:
    vision = CLIPVisionConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=1, image_size=28, patch_size=14
    )
    text = LlamaConfig(
        vocab_size=1024, hidden_size=4096, intermediate_size=11008, num_hidden_layers=1, num_attention_heads=32
    )
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_id=1000)
    torch.manual_seed(0)
    base = LlavaForConditionalGeneration(config).to(dtype).requires_grad_(False)
    model = inject_lora(base, r=rank, lora_alpha=2 * rank, dropout=0, connector="frozen").to(device)
    for pair in lora_pairs(model):  # one dtype: what DeepSpeed's bf16 engine trains with
        pair.lora_A.data, pair.lora_B.data = pair.lora_A.data.to(dtype), pair.lora_B.data.to(dtype)
    ids = torch.randint(5, 900, (1, tokens), device=device)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    name = str(dtype).removeprefix("torch.")
    return {"case": "layer", "rank": rank, "tokens": tokens, "dtype": name, **measure(model, batch, repeats)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["tiny", "layer"])
    parser.add_argument("--ranks", nargs="+", type=int, default=[16, 32, 64])
    parser.add_argument("--tokens", type=int, default=1300, help="tokens of the layer's batch (default 1300)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the layer case")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, help="CPU threads (default: PyTorch's choice)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results there")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    print(f"{'case':8}{'r':>4}{'tokens':>8}{'LoRA ms':>10}{'LoRASculpt ms':>15}{'ratio':>8}")
    cases = []
    for rank in arguments.ranks:
        if arguments.only != "layer":
            cases.append(tiny_case(rank, 4 * arguments.repeats, device))
        if arguments.only != "tiny":
            cases.append(layer_case(rank, arguments.tokens, getattr(torch, arguments.dtype), arguments.repeats, device))
        for case in cases[-(1 if arguments.only else 2) :]:
            print(
                f"{case['case']:8}{rank:4}{case['tokens']:8}{case['lora_ms']:10.1f}{case['sculpt_ms']:15.1f}"
                f"{case['ratio']:8.3f}",
                flush=True,
            )
    if arguments.json:
        write_results(arguments.json, cases, device, arguments.repeats)


if __name__ == "__main__":
    main()
