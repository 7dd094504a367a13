"""The model card of a finished run (README.md of its folder)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llava_sculpt.config import METHOD_NAMES, REGULARIZED_METHODS
from llava_sculpt.evaluation.table import format_details, format_table
from llava_sculpt.model.inspect import inspect_adapter

_SHOWN = (
    "method lora_r lora_alpha lora_dropout connector learning_rate mm_projector_lr num_train_epochs seed "
    "sculpt_density sculpt_warmup_steps sculpt_omega sculpt_alpha sculpt_beta sculpt_reduction"
).split()


def write_card(folder: Path, run: dict[str, Any], rows: list[tuple[str, dict[str, Any]]]) -> None:
    """Write README.md: what was trained on what, the scores, the densities, how to use it.

    Args:
        run: content of run.json.
        rows: (label, results) to show; the last one is this run's.
    """
    config, total = run["config"], inspect_adapter(folder)["total"]
    method = config["method"]
    shown = [key for key in _SHOWN if method == "sculpt" or not key.startswith("sculpt_")]
    shown += ["reg_lambda"] if method in REGULARIZED_METHODS else []
    settings = "\n".join(f"| {key} | {config[key]} |" for key in shown)
    (folder / "README.md").write_text(
        f"""---
base_model: {run["base"]["path"]}
library_name: peft
tags: [llava, lora, lorasculpt]
---
# {METHOD_NAMES[method]} adapter, rank {config["lora_r"]}, on {Path(run["data"]["path"]).parent.name}

{run["data"]["samples"]:,} training samples, {run["steps"]:,} optimizer steps of {run["global_batch_size"]},
base model `{run["base"]["path"]}` (fingerprint `{run["base"]["fingerprint"][:16]}`).

```
{format_table(rows)}
```

```
{format_details(rows[-1][1])}
```

Density: A {total["density_A"]:.2%}, B {total["density_B"]:.2%}, BA {total["density_BA"]:.2%}
(Theorem 3.1 expects {total["expected_BA"]:.2%}).

| setting | value |
|---|---|
{settings}

Versions: {", ".join(f"{k} {v}" for k, v in run["versions"].items())}.

## Use

```bash
llava-sculpt eval --model {folder} --tasks all
llava-sculpt inspect {folder}
```

`adapter_model.safetensors` loads with `peft.PeftModel.from_pretrained`; when `connector.safetensors` is there, its
weights belong into the base model's `multi_modal_projector` as well (`llava_sculpt.model.load.load_for_inference`
does both).
""",
        encoding="utf-8",
    )
