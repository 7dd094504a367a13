"""The patched front end, watched: run by the launchers in the original package's environment.

Each process writes OUTPUT_DIR/../probe-NAME-RANK.json: the engine, its gradient clipping, and per optimizer step the
learning rate of each group as the innermost optimizer used it and the largest magnitude off the masks in working
copies, master copies and moments.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from llava_sculpt.llava_patch import train as entry
from llava_sculpt.llava_patch import trainer as patched
from llava_sculpt.train.zero import is_zero_parameter

used_rates: list[float] = []
inner_step = torch.optim.AdamW.step


def noting_step(self: torch.optim.AdamW, *args: Any, **kwargs: Any) -> Any:
    # ZeRO steps its groups one after the other.
    used_rates.extend(group["lr"] for group in self.param_groups)
    return inner_step(self, *args, **kwargs)


class Probe(TrainerCallback):
    def __init__(self, trainer: Any) -> None:
        self.trainer, self.steps = trainer, []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.steps.append({"rates": list(used_rates), "off_mask": self.off_mask(kwargs["optimizer"])})
        used_rates.clear()

    def off_mask(self, optimizer: Any) -> float:
        largest = 0.0
        for key, mask in self.trainer.masking.masks.items():
            parameter = self.trainer.masking.parameters[key]
            values = [parameter.detach()]
            if is_zero_parameter(parameter):
                from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

                values.append(safe_get_full_fp32_param(parameter))
                values += [safe_get_full_optimizer_state(parameter, name) for name in ("exp_avg", "exp_avg_sq")]
            else:
                values += [optimizer.state[parameter][name] for name in ("exp_avg", "exp_avg_sq")]
            largest = max(largest, *(float(value.masked_select(~mask).abs().max()) for value in values))
        return largest

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        engine = self.trainer.model_wrapped
        found = {"engine": type(engine).__name__, "steps": self.steps}
        if args.deepspeed:
            found |= {"stage": engine.zero_optimization_stage(), "clipping": engine.gradient_clipping()}
        folder = Path(args.output_dir)
        (folder.parent / f"probe-{folder.name}-{args.process_index}.json").write_text(json.dumps(found))


def main() -> int:
    torch.optim.AdamW.step = noting_step  # type: ignore[method-assign]
    make_trainer = patched.make_trainer

    def make_and_watch(*args: Any, **kwargs: Any) -> Any:
        trainer = make_trainer(*args, **kwargs)
        if hasattr(trainer, "masking"):
            trainer.add_callback(Probe(trainer))
        return trainer

    patched.make_trainer = make_and_watch
    return entry.main()


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
