"""`llava-sculpt`: every job as a subcommand. Heavy imports wait until a subcommand needs them."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

from llava_sculpt.errors import UserError

_TASKS = ("iconqa", "coco", "okvqa", "ocrvqa", "gqa", "textvqa")


def main(argv: list[str] | None = None) -> int:
    """Run one subcommand; returns the exit code (2 for bad input, 130 when interrupted)."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(prog="llava-sculpt", description="LoRASculpt for LLaVA-1.5.", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (summary, add_arguments, _) in _COMMANDS.items():
        add_arguments(commands.add_parser(name, help=summary, description=summary, allow_abbrev=False))
    if arguments[:1] == ["train"]:  # its flags are the training configuration's, parsed there
        from llava_sculpt.train.train import main as train

        return train(arguments[1:])
    options, rest = parser.parse_known_args(arguments)
    if rest and options.command not in ("finetune", "plan"):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    options.train_flags = rest
    try:
        return _COMMANDS[options.command][2](options)
    except UserError as error:
        for problem in error.problems:
            print(f"error: {problem}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _add_train(parser: argparse.ArgumentParser) -> None:
    parser.epilog = "Flags: --config FILE.yaml and any field of llava_sculpt/config.py."


def _train(options: argparse.Namespace) -> int:
    raise AssertionError("handled before the other subcommands")


def _add_finetune(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("task", choices=["iconqa", "coco"])
    parser.add_argument("--scale", choices=["paper", "tiny"], help="default: paper if this machine can run it")
    parser.add_argument("--method", choices=["sculpt", "lora"], default="sculpt")
    parser.add_argument("--rank", type=int, default=32, help="LoRA rank (paper: 16, 32, 64)")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--output_dir", help="default: runs/SCALE/TASK/METHOD_rRANK_seedSEED")
    parser.epilog = "Any further flag goes to the training entry point and wins over its YAML."


def _finetune(options: argparse.Namespace) -> int:
    from llava_sculpt.experiments.finetune import finetune

    return finetune(
        options.task,
        options.scale,
        options.method,
        options.rank,
        options.seed,
        options.output_dir,
        options.train_flags,
    )


def _add_plan(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--gpus", type=int, default=4, help="GPUs that train together (default 4)")
    parser.add_argument("--gpu_memory", type=float, default=24, help="of one GPU, in GB = 10^9 bytes (default 24)")
    parser.add_argument("--zero", type=int, choices=[2, 3], help="DeepSpeed ZeRO stage (default: the configuration's)")
    parser.add_argument("--json", action="store_true")
    parser.epilog = "Further flags: those of training, with --config FILE.yaml. No GPU, weights or data are needed."


def _plan(options: argparse.Namespace) -> int:
    from llava_sculpt.train.plan import run_plan

    return run_plan(options.train_flags, options.gpus, options.gpu_memory, options.zero, as_json=options.json)


def _add_eval(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="base model, adapter folder or merged model")
    parser.add_argument("--base", help="base checkpoint, if not the one the adapter names")
    parser.add_argument("--tasks", default="all", help="all, or a comma-separated list: " + ",".join(_TASKS))
    parser.add_argument("--data_root", type=Path, default=Path("data"), help="folder of the prepared data sets")
    parser.add_argument("--split", default="test", choices=["val", "test"])
    parser.add_argument("--target", choices=["iconqa", "coco"], help="the task that counts as Target")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--max_new_tokens", type=int, default=128)
    parser.add_argument("--okvqa_variant", choices=["authors", "official"], default="authors")
    parser.add_argument("--output_dir", type=Path, help="for results.json and predictions/ (default: runs/eval/MODEL)")


def _eval(options: argparse.Namespace) -> int:
    from llava_sculpt.evaluation.run import evaluate, load_tasks, tasks_of
    from llava_sculpt.evaluation.table import format_details, format_table
    from llava_sculpt.model.load import load_for_inference
    from llava_sculpt.records import write_json

    tasks = tasks_of(options.tasks)
    load_tasks(tasks, options.data_root, options.split)
    loaded = load_for_inference(options.model, base=options.base)
    folder = options.output_dir or Path("runs/eval") / Path(options.model).name
    results = evaluate(
        loaded.model,
        loaded.tokenizer,
        loaded.preprocessor,
        tasks,
        options.data_root,
        options.split,
        options.batch_size,
        folder,
        target=options.target,
        model_id=options.model,
        max_new_tokens=options.max_new_tokens,
        okvqa_variant=options.okvqa_variant,
        progress=sys.stderr.isatty(),
    )
    results["base"] = loaded.checkpoint.fingerprint()
    write_json(folder / "results.json", results)
    print(f"{format_table([(options.model, results)])}\n\n{format_details(results)}")
    print(f"\nresults: {folder / 'results.json'}")
    return 0


def _add_prepare(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", choices=_TASKS)
    parser.add_argument("--raw", type=Path, required=True, help="folder with the official files")
    parser.add_argument("--out", type=Path, required=True, help="prepared folder, e.g. data/iconqa")
    given = argparse.SUPPRESS  # absent means the data set's own default
    parser.add_argument("--samples", type=int, default=given, help="random training samples (default 10000)")
    parser.add_argument("--val_samples", type=int, default=given, help="random validation questions")
    parser.add_argument("--test_samples", type=int, default=given, help="random test questions")
    parser.add_argument("--seed", type=int, default=given)
    parser.add_argument("--answer_style", choices=["letter", "text"], default=given, help="iconqa only")
    parser.add_argument("--ocr_tokens", action=argparse.BooleanOptionalAction, default=given, help="textvqa only")
    parser.add_argument("--train_captions", choices=["karpathy", "official"], default=given, help="coco only")
    parser.add_argument("--test_prompt", default=given, help="coco only")
    parser.add_argument("--overwrite", action="store_true", default=given)


def _prepare(options: argparse.Namespace) -> int:
    from llava_sculpt.benchmarks import prepare_benchmark

    given = {k: v for k, v in vars(options).items() if k not in ("command", "train_flags", "name", "raw", "out")}
    manifest = prepare_benchmark(options.name, options.raw, options.out, **given)
    counts = ", ".join(f"{split} {facts['n']:,}" for split, facts in manifest["splits"].items())
    print(f"{options.out}: {counts}; {manifest['prompt_style']}; {manifest['license']}")
    return 0


def _add_inspect(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("adapter", type=Path, help="folder of a run or checkpoint")
    parser.add_argument("--json", action="store_true")


def _inspect(options: argparse.Namespace) -> int:
    from llava_sculpt.model.inspect import format_inspection, inspect_adapter

    found = inspect_adapter(options.adapter)
    print(json.dumps(found, indent=2) if options.json else format_inspection(found))
    return 0


def _add_convert(parser: argparse.ArgumentParser) -> None:
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND")
    for kind, source in (("checkpoint", "folder or Hub id"), ("adapter", "folder of a run, or one LLaVA wrote")):
        part = kinds.add_parser(kind, help=f"convert a{'n' * (kind == 'adapter')} {kind}", allow_abbrev=False)
        part.add_argument("source", help=source)
        part.add_argument("--to", choices=["hf", "original"], required=True, help="layout of the result")
        part.add_argument("--out", type=Path, required=True, help="new folder")
        if kind == "adapter":
            part.add_argument("--base", help="base checkpoint, if not the one the adapter names")


def _convert(options: argparse.Namespace) -> int:
    from llava_sculpt.model.convert import convert_adapter, convert_checkpoint

    if options.kind == "checkpoint":
        convert_checkpoint(options.source, options.to, options.out)
    else:
        convert_adapter(Path(options.source), options.to, options.out, options.base)
    print(options.out)
    return 0


def _add_merge(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("adapter", type=Path, help="folder of a run or checkpoint")
    parser.add_argument("--base", help="base checkpoint, if not the one the adapter names")
    parser.add_argument("--out", type=Path, required=True, help="new folder for the merged model")
    parser.add_argument("--dtype", choices=["bf16", "fp16", "fp32"], help="default: the base's")


def _merge(options: argparse.Namespace) -> int:
    from llava_sculpt.model.merge import format_merge, merge_adapter

    print(format_merge(merge_adapter(options.adapter, options.out, options.base, options.dtype)))
    return 0


def _add_export(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", type=Path, help="adapter folder; for --format dense a sparse file")
    parser.add_argument(
        "--format",
        choices=["sparse", "delta", "dense"],
        required=True,
        help="sparse: kept entries of A and B; delta: kept entries of BA; dense: a sparse file back to a folder",
    )
    parser.add_argument("--out", type=Path, required=True, help="new .safetensors file (dense: new folder)")
    parser.add_argument("--base", help="delta: base checkpoint, if not the one the adapter names")
    parser.add_argument("--dtype", choices=["bf16", "fp16", "fp32"], help="of the values; rounds them if shorter")


def _export(options: argparse.Namespace) -> int:
    from llava_sculpt.model.export import run_export

    print(run_export(options.source, options.format, options.out, options.base, options.dtype))
    return 0


def _add_sweep(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("grid", type=Path, help="YAML file: task, split, runs (configs/grids/)")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, each with one thread (default 2)")
    parser.add_argument("--out", type=Path, help="JSON file for the summary; a figure goes beside it")


def _sweep(options: argparse.Namespace) -> int:
    from llava_sculpt.experiments.sweep import sweep

    return sweep(options.grid, options.jobs, options.out)


_Command = tuple[str, Callable[[argparse.ArgumentParser], None], Callable[[argparse.Namespace], int]]
_COMMANDS: dict[str, _Command] = {
    "finetune": ("the main job: train, evaluate, table and figure", _add_finetune, _finetune),
    "train": ("fine-tune from one YAML", _add_train, _train),
    "plan": ("memory, steps and FLOPs of a training, before it", _add_plan, _plan),
    "eval": ("score a model on the prepared tasks", _add_eval, _eval),
    "prepare": ("official download -> training and question files", _add_prepare, _prepare),
    "convert": ("checkpoints and adapters between here and the original LLaVA", _add_convert, _convert),
    "merge": ("an adapter into its base model, weight by weight", _add_merge, _merge),
    "export": ("a sparse adapter, or its sparse delta, as one small file", _add_export, _export),
    "sweep": ("many runs of the tiny scale from one grid file", _add_sweep, _sweep),
    "inspect": ("densities of an adapter beside Theorem 3.1", _add_inspect, _inspect),
}

if __name__ == "__main__":
    sys.exit(main())
