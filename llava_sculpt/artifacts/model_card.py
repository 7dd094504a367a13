"""The model card of a run (README.md of its folder), fit to be uploaded as it is."""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, HfApi, ModelCardData

from llava_sculpt.artifacts.inspect import inspect_adapter
from llava_sculpt.model.adapter import find_upwards
from llava_sculpt.model.files import CONNECTOR_FILE, MASKS_FILE
from llava_sculpt.model.whole import read_run
from llava_sculpt.names import METHODS, shipped
from llava_sculpt.records import write_atomically

CARD = "README.md"
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
# What wraps the training module when several processes train: the launcher it was started by.
_LAUNCHERS = {"DeepSpeedEngine": "deepspeed --num_gpus {} --module", "": "torchrun --nproc_per_node {} -m"}


def write_model_card(folder: Path, results: Mapping[str, Any] | None = None, scores: str = "") -> None:
    """Write README.md of a finished run: what was trained on what, the scores, how to load and to repeat it.

    It holds no path of this machine: absolute ones are shortened, the others are as the training command gave them.
    Does nothing in a folder without run.json.

    Args:
        results: content of results.json, for the card's metadata; None if there are no scores.
        scores: the same for people, as a table.
    """
    run = read_run(folder)
    if not run:
        return
    config, method = run["config"], METHODS[run["config"]["method"]]
    place, base = _portable(config["output_dir"]), _portable(run["base"]["path"])
    shown = [key for key in _SHOWN if config["method"] == "sculpt" or not key.startswith("sculpt_")] + [*method.fields]
    settings = "\n".join(f"| {key} | {_plain(config[key])} |" for key in shown if key in config)
    density = ""
    if (folder / MASKS_FILE).is_file():
        total = inspect_adapter(folder)["total"]
        density = (
            f"\nDensity: A {total['density_A']:.2%}, B {total['density_B']:.2%}, BA {total['density_BA']:.2%}\n"
            f"(Theorem 3.1 expects {total['expected_BA']:.2%}).\n"
        )
    connector = ""
    if (folder / CONNECTOR_FILE).is_file():
        connector = (
            f'\nconnector = load_file(f"{{folder}}/{CONNECTOR_FILE}")\n'
            "assert not model.get_base_model().load_state_dict(connector, strict=False).unexpected_keys"
        )
    snippet = f"""import torch
from peft import PeftModel
{"from safetensors.torch import load_file" + chr(10) if connector else ""}\
from transformers import LlavaForConditionalGeneration

folder = {json.dumps(place)}  # where these files are
model = LlavaForConditionalGeneration.from_pretrained({json.dumps(base)}, dtype=torch.bfloat16)
model = PeftModel.from_pretrained(model, folder).eval(){connector}"""
    word = shlex.quote(place)
    commands = f"""{_training_command(run)}
llava-sculpt eval --model {word} --tasks all
llava-sculpt inspect {word}
llava-sculpt merge {word} --out {shlex.quote(place + "-merged")}"""
    text = f"""---
{_metadata(folder, run["base"]["path"], results).to_yaml()}
---
# {method.label} adapter, rank {config["lora_r"]}, on {_plain(Path(run["data"]["path"]).parent.name)}

{run["data"]["samples"]:,} training samples, {run["steps"]:,} optimizer steps of {run["global_batch_size"]},
base model {_code(base)} (fingerprint {_code(run["base"]["fingerprint"][:16])}).
{density}
## Scores

{_block("", scores) if scores else "Not evaluated yet."}

## Use

With transformers and peft:

{_block("python", snippet)}

A base in the layout of LLaVA's own package loads with `load_for_inference(folder)` from
`llava_sculpt.artifacts.inference`, which also checks that it is the base trained on.

## Commands

{_block("bash", commands)}

## Training

| setting | value |
|---|---|
{settings}

Versions: {_plain(", ".join(f"{k} {v}" for k, v in run["versions"].items()))}.

The base model and the training data have licences of their own, which this adapter is bound by as well.
"""
    write_atomically(folder / CARD, text.encode(errors="replace"))


def upload_results(folder: Path) -> None:
    """Put card, scores and figure of a run beside the adapter that `--push_to_hub` has uploaded; else do nothing."""
    config = read_run(folder)["config"]
    if config.get("push_to_hub"):
        api = HfApi()
        name = config["hub_model_id"] or folder.absolute().name
        repository = api.create_repo(name, exist_ok=True).repo_id
        api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            allow_patterns=[CARD, "results.json", "*.png"],
            commit_message="Scores",
            revision=config["hub_revision"],
        )
        print(f"uploaded to {repository}")


def _metadata(folder: Path, base: str, results: Mapping[str, Any] | None) -> ModelCardData:
    """What the Hub shows beside the card: licence, base model, tags, and every score in its model-index."""
    scores = []
    if results is not None:
        rows: list[tuple[str, str, str | None, float]] = [
            (task, f"{task} ({e['n']} questions, {e['split']})", f"{e['metric']}, {e['variant']}", e["score"])
            for task, e in results["tasks"].items()
        ]
        rows += [(key, title, None, results[key]) for key, title in _TITLES.items() if results[key] is not None]
        scores = [
            EvalResult(
                task_type="image-to-text" if (metric or "").startswith("CIDEr") else "visual-question-answering",
                dataset_type=task,
                dataset_name=title,
                metric_type="cider" if (metric or "").startswith("CIDEr") else "accuracy" if metric else "score",
                metric_name=metric,
                metric_value=round(score, 2),
            )
            for task, title, metric, score in rows
        ]
    here = os.path.isabs(base) or os.path.isdir(shipped(find_upwards(base, folder)))  # the Hub knows ids, not folders
    fields: dict[str, Any] = {"license": "other", "license_name": "as-the-base-model"}
    if not here and "llava" in base and "1.5" in base:
        fields = {"license": "llama2"}
    if scores:
        fields |= {"model_name": folder.absolute().name, "eval_results": scores}
    return ModelCardData(
        base_model=None if here else base,
        library_name="peft",
        pipeline_tag="image-text-to-text",
        tags=["llava", "lora", "lorasculpt"],
        **fields,
    )


def _training_command(run: Mapping[str, Any]) -> str:
    """The command of run.json with the launcher it needs, without paths of this machine and the launcher's own flag."""
    words = [word for word in shlex.split(run.get("command", "")) if not word.startswith("--local_rank")]
    parts = [word.partition("=") for word in words]
    command = shlex.join(f"{key}{sign}{_portable(value)}" if sign else _portable(key) for key, sign, value in parts)
    if run["world_size"] > 1:
        launcher = _LAUNCHERS.get(run.get("engine", ""), _LAUNCHERS[""]).format(run["world_size"])
        command = command.replace("python -m", launcher, 1)
    return command


def _portable(path: str) -> str:
    """An absolute path from the working directory if it is below it, else its last part; anything else as it is."""
    if not os.path.isabs(path):
        return path
    return os.path.relpath(path) if Path(path).is_relative_to(Path.cwd()) else Path(path).name


def _plain(value: object) -> str:
    """A value in running text or a table: one line, and nothing in it is Markdown or HTML."""
    return re.sub(r"([\\`*_{}\[\]<>()#+!|~&$])", r"\\\1", " ".join(str(value).split()))


def _code(text: str) -> str:
    """A code span of one line."""
    line, ticks = " ".join(text.split()), "`" * (_longest_run(text) + 1)
    return f"{ticks} {line} {ticks}" if len(ticks) > 1 else f"`{line}`"


def _block(language: str, text: str) -> str:
    """A code block that no line of the text ends."""
    fence = "`" * max(3, _longest_run(text) + 1)
    return f"{fence}{language}\n{text}\n{fence}"


def _longest_run(text: str) -> int:
    return max(map(len, re.findall("`+", text)), default=0)
