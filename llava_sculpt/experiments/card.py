"""The model card of a finished run (README.md of its folder)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, HfApi, ModelCardData

from llava_sculpt.artifacts.inspect import inspect_adapter
from llava_sculpt.evaluation.table import format_details, format_table
from llava_sculpt.model.adapter import read_run
from llava_sculpt.names import METHODS

_SHOWN = (
    "method lora_r lora_alpha lora_dropout connector learning_rate mm_projector_lr num_train_epochs seed "
    "sculpt_density sculpt_warmup_steps sculpt_omega sculpt_alpha sculpt_beta sculpt_reduction"
).split()


# The three summaries of every evaluation.
_TITLES = {
    "source": "Source (mean of OKVQA, OCRVQA, GQA, TextVQA)",
    "target": "Target",
    "avg": "Avg of Source and Target",
}


def card_metadata(folder: Path, run: dict[str, Any], results: dict[str, Any]) -> ModelCardData:
    """What the Hub shows beside the card: base model, tags, and every score in its model-index.

    Args:
        run: content of run.json.
        results: content of results.json.
    """
    scores = [
        EvalResult(
            task_type="visual-question-answering" if "CIDEr" not in entry["metric"] else "image-to-text",
            dataset_type=name,
            dataset_name=f"{name} ({entry['n']} questions, {entry['split']})",
            metric_type="cider" if "CIDEr" in entry["metric"] else "accuracy",
            metric_name=f"{entry['metric']}, {entry['variant']}",
            metric_value=round(entry["score"], 2),
        )
        for name, entry in results["tasks"].items()
    ]
    scores += [
        EvalResult(
            task_type="visual-question-answering",
            dataset_type=key,
            dataset_name=title,
            metric_type="score",
            metric_value=round(results[key], 2),
        )
        for key, title in _TITLES.items()
        if results.get(key) is not None
    ]
    base = run["base"]["path"]
    return ModelCardData(
        base_model=None if Path(base).is_dir() else base,  # the Hub knows ids, not folders
        library_name="peft",
        pipeline_tag="image-text-to-text",
        tags=["llava", "lora", "lorasculpt"],
        model_name=folder.name,
        eval_results=scores,
    )


def upload_results(folder: Path) -> None:
    """Put card, scores and figure of a run beside the adapter that `--push_to_hub` has uploaded; else do nothing."""
    config = read_run(folder)["config"]
    if config["push_to_hub"]:
        api = HfApi()
        name = config["hub_model_id"] or folder.absolute().name
        repository = api.create_repo(name, exist_ok=True).repo_id
        files = ["README.md", "results.json", "*.png"]
        api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            allow_patterns=files,
            commit_message="Scores",
            revision=config["hub_revision"],
        )
        print(f"uploaded to {repository}")


def write_card(folder: Path, run: dict[str, Any], rows: list[tuple[str, dict[str, Any]]]) -> None:
    """Write README.md: what was trained on what, the scores, the densities, how to use it.

    Args:
        run: content of run.json.
        rows: (label, results) to show; the last one is this run's.
    """
    config, total = run["config"], inspect_adapter(folder)["total"]
    method = config["method"]
    shown = [key for key in _SHOWN if method == "sculpt" or not key.startswith("sculpt_")]
    shown += METHODS[method].fields
    settings = "\n".join(f"| {key} | {config[key]} |" for key in shown)
    (folder / "README.md").write_text(
        f"""---
{card_metadata(folder, run, rows[-1][1]).to_yaml()}
---
# {METHODS[method].label} adapter, rank {config["lora_r"]}, on {Path(run["data"]["path"]).parent.name}

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

## Commands

```bash
{run.get("command", "(command not recorded)")}   # {run["world_size"]} process(es)
llava-sculpt eval --model {folder} --base {run["base"]["path"]} --tasks {",".join(rows[-1][1]["tasks"])}
```

## Use

```bash
llava-sculpt eval --model {folder} --tasks all
llava-sculpt inspect {folder}
```

`adapter_model.safetensors` loads with `peft.PeftModel.from_pretrained`; when `connector.safetensors` is there, its
weights belong into the base model's `multi_modal_projector` as well
(`llava_sculpt.artifacts.inference.load_for_inference` does both).
""",
        encoding="utf-8",
    )
