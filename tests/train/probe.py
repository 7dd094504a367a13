"""The training entry point, watched: run by the launchers, it notes after every step what an engine really holds.

Each process writes OUTPUT_DIR/../probe-NAME-RANK.json: the engine, and per optimizer step the learning rate of each
group as the innermost optimizer used it, the largest magnitude off the masks in working copies, master copies and
moments, and the number of real images in the step's micro-batches.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from llava_sculpt.train import train as entry
from llava_sculpt.train.zero import gather_working_copies, is_zero_parameter

used_rates: dict[str, float] = {}
inner_step = torch.optim.AdamW.step


def noting_step(self: torch.optim.AdamW, *args: Any, **kwargs: Any) -> Any:
    used_rates.update({group["name"]: group["lr"] for group in self.param_groups})
    return inner_step(self, *args, **kwargs)


class Probe(TrainerCallback):
    def __init__(self, trainer: Any) -> None:
        self.trainer, self.steps, self.images = trainer, [], 0
        collator = trainer.data_collator

        def counting(samples: list[Any]) -> Any:
            self.images += sum(sample.get("pixel_values") is not None for sample in samples)
            return collator(samples)

        trainer.data_collator = counting

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.steps.append(
            {"rates": dict(used_rates), "off_mask": self.off_mask(kwargs["optimizer"]), "images": self.images}
        )
        self.images = 0

    def off_mask(self, optimizer: Any) -> float:
        if not isinstance(self.trainer, entry.LLaVASculptTrainer):
            return 0.0  # a method without masks
        masking, largest = self.trainer.masking, 0.0
        working = gather_working_copies(masking.parameters.items())
        for key, mask in masking.masks.items():
            values = [working[key]]
            if is_zero_parameter(masking.parameters[key]):
                from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

                values.append(safe_get_full_fp32_param(masking.parameters[key]))
                for moment in ("exp_avg", "exp_avg_sq"):
                    values.append(safe_get_full_optimizer_state(masking.parameters[key], moment))
            else:
                state = optimizer.state[masking.parameters[key]]
                values += [state["exp_avg"], state["exp_avg_sq"]]
            assert all(value.shape == mask.shape for value in values)
            largest = max(largest, *(float(value.masked_select(~mask).abs().max()) for value in values))
        return largest

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        engine = type(self.trainer.model_wrapped).__name__
        plugin = args.deepspeed_plugin
        found = {"engine": engine, "zero_stage": None if plugin is None else plugin.zero_stage, "steps": self.steps}
        folder = Path(args.output_dir)
        (folder.parent / f"probe-{folder.name}-{args.process_index}.json").write_text(json.dumps(found))


def main() -> int:
    torch.set_num_threads(1)
    torch.optim.AdamW.step = noting_step  # type: ignore[method-assign]
    build = entry.build_trainer

    def build_and_watch(*args: Any) -> Any:
        trainer = build(*args)
        trainer.add_callback(Probe(trainer))
        return trainer

    entry.build_trainer = build_and_watch
    return entry.main([word for word in sys.argv[1:] if not word.startswith("--local_rank")])


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    sys.exit(main())
