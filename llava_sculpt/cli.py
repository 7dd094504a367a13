"""`llava-sculpt`: every job as a subcommand. Heavy imports wait until a subcommand needs them."""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llava_sculpt import __version__
from llava_sculpt.errors import UserError
from llava_sculpt.names import EDITS, LORASCULPT, METHODS, METRICS, SCALES, TARGETS, TASKS, TRAINED

_ANSWER_STYLES = ("letter", "answer_letter", "text")


def main(argv: list[str] | None = None) -> int:
    """Run one subcommand; returns the exit code (2 for bad input, 130 when interrupted)."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(prog="llava-sculpt", description="LoRASculpt for LLaVA-1.5.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (summary, add_arguments, _) in _COMMANDS.items():
        add_help = name != "train"  # its flags are the training configuration's, read and listed by `train.main`
        command = commands.add_parser(name, help=summary, description=summary, allow_abbrev=False, add_help=add_help)
        if arguments[:1] == [name]:  # flags of the others are not needed
            add_arguments(command)
    options, rest = parser.parse_known_args(arguments)
    if rest and options.command not in ("finetune", "plan", "train"):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    options.train_flags = rest
    options.arguments = arguments
    counts = Counter(word.partition("=")[0] for word in arguments if word.startswith("--"))
    once = [flag for flag in counts if not isinstance(getattr(options, flag[2:].replace("-", "_"), None), list)]
    try:
        if twice := sorted(flag for flag in once if counts[flag] > 1):
            raise UserError(f"{flag}: given twice" for flag in twice)
        return _COMMANDS[options.command][2](options)
    except UserError as error:
        for problem in error.problems:
            print(f"error: {problem}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _add_train(parser: argparse.ArgumentParser) -> None:
    pass


def _train(options: argparse.Namespace) -> int:
    from llava_sculpt.train.train import main as train

    return train(options.train_flags)


def _add_finetune(parser: argparse.ArgumentParser) -> None:
    # No positional: argparse would take the value of a flag that only training knows for it.
    parser.usage = "%(prog)s (TASK | --data FILE) [options] [flags of training]"
    _add_own(parser.add_argument_group("your own task, prepared as data/NAME (tiny: data/tiny/NAME)"))
    parser.add_argument("--scale", choices=SCALES, help="default: paper if this machine can run it")
    parser.add_argument("--method", choices=TRAINED, default=LORASCULPT)
    parser.add_argument("--rank", type=int, default=32, help="LoRA rank (paper: 16, 32, 64)")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--output_dir", help="default: runs/SCALE/TASK/METHOD_rRANK_seedSEED")
    parser.epilog = (
        f"TASK: {', '.join(TARGETS)}, or a task of your own that is prepared. "
        "Any flag of `llava-sculpt train --help` goes to training and wins over its YAML."
    )


def _finetune(options: argparse.Namespace) -> int:
    from llava_sculpt.experiments.finetune import finetune

    flags = options.train_flags
    task = flags.pop(0) if flags and not flags[0].startswith("-") else None
    if (task is None) == (options.data is None):
        raise UserError(f"finetune takes one TASK ({', '.join(TARGETS)}, your own) or --data TRAIN_JSON --images DIR")
    return finetune(
        task or _own_name(options),
        options.scale,
        options.method,
        options.rank,
        options.seed,
        options.output_dir,
        flags,
        options.data,
        **_own(options, *_OWN),
    )


_OWN = ("images", "test", "answers", "holdout", "metric", "overwrite")


def _add_own(parser: argparse._ActionsContainer, *, train: bool = True, name: bool = True) -> None:
    """The flags of a task of one's own; without `train` of one that is only scored."""
    what = "LLaVA's conversations, the last answer the gold one; or its question file"
    parser.add_argument("--data", type=Path, metavar="FILE", help="LLaVA's training JSON" if train else what)
    parser.add_argument("--images", type=Path, metavar="DIR", help="folder of the pictures (default: that of --data)")
    if train:
        parser.add_argument("--test", type=Path, metavar="FILE", help=what)
        parser.add_argument(
            "--holdout", type=float, help="without --test: share of the pictures held out (default 0.1)"
        )
    parser.add_argument("--answers", type=Path, metavar="FILE", help="gold answers of a question file, if not in it")
    parser.add_argument("--metric", choices=METRICS, help="default: exact, where the gold answers are short")
    if name:
        parser.add_argument("--name", help="of the task (default: from the name of FILE)")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace data prepared under that name from other files"
    )


def _own(options: argparse.Namespace, *keys: str) -> dict[str, Any]:
    """What was given of the flags of a task of one's own, without its name.

    Raises:
        UserError: any without --data.
    """
    given = {key: getattr(options, key, None) for key in (*keys, "name")}
    if options.data is None and (stray := [key for key, value in given.items() if value]):
        raise UserError(f"--{key}: belongs to --data FILE, which is not given" for key in stray)
    return {key: given[key] for key in keys}


def _own_name(options: argparse.Namespace) -> str:
    """--name, or what the data file is called: "charts" of charts.json and charts/train.json."""
    if options.name:
        return str(options.name)
    file: Path = options.data.resolve()
    return file.parent.name if file.stem in ("train", "data") else file.stem


def _add_plan(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--gpus", type=int, default=4, help="GPUs that train together (default 4)")
    parser.add_argument("--gpu_memory", type=float, default=24, help="of one GPU, in GB = 10^9 bytes (default 24)")
    parser.add_argument("--zero", type=int, choices=[2, 3], help="DeepSpeed ZeRO stage (default: the configuration's)")
    parser.add_argument("--json", action="store_true")
    parser.epilog = "Further flags: those of `llava-sculpt train --help`. No GPU, weights or data are needed."


def _plan(options: argparse.Namespace) -> int:
    from llava_sculpt.memory.plan import run_plan

    return run_plan(options.train_flags, options.gpus, options.gpu_memory, options.zero, as_json=options.json)


def _add_eval(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="base model, adapter folder or merged model")
    parser.add_argument("--base", help="base checkpoint, if not the one the adapter names")
    own = "your own by its name"
    parser.add_argument("--tasks", help=f"all (default), or a comma-separated list: {','.join(TASKS)}, {own}")
    _add_own(parser.add_argument_group("a task of your own, scored beside --tasks or alone"), train=False)
    parser.add_argument(
        "--data_root",
        type=Path,
        help="folder of the prepared data sets (default: data/tiny for data/tiny_llava and what was made from it, "
        "generated if it is not there; else data)",
    )
    parser.add_argument("--split", default="test", choices=["val", "test"])
    parser.add_argument("--target", help="the task that counts as Target (default: if there is only one)")
    parser.add_argument("--batch_size", type=int, help="default: 16 on a CPU, on a GPU what its free memory allows")
    parser.add_argument("--max_new_tokens", type=int, default=128)
    parser.add_argument(
        "--dtype",
        choices=["bf16", "fp16", "fp32"],
        help="default: fp32 on a CPU; on a GPU fp16, bf16 for a base in bf16",
    )
    parser.add_argument(
        "--exact",
        action="store_true",
        help="in 16 bits, near-ties one by one: no answer depends on the batch, but slow",
    )
    parser.add_argument("--okvqa_variant", choices=["authors", "official"], default="authors")
    parser.add_argument("--output_dir", type=Path, help="for results.json and predictions/ (default: runs/eval/MODEL)")
    parser.add_argument(
        "--gpus", type=int, help="processes, one per GPU (default: all visible; on CPU 1: they share it)"
    )
    parser.add_argument("--calibrate", action="store_true", help="compare LLaVA-1.5-7B with its published scores")
    parser.epilog = (
        "Also under torchrun: torchrun --nproc_per_node 4 -m llava_sculpt.cli eval ... "
        "Interrupted? The same command goes on; --gpus and --batch_size may differ and change no answer in fp32 and "
        "with --exact; else near-ties may."
    )


def _eval(options: argparse.Namespace) -> int:
    from llava_sculpt.artifacts.inference import load_for_inference
    from llava_sculpt.artifacts.merge import DTYPES
    from llava_sculpt.artifacts.model_card import write_model_card
    from llava_sculpt.artifacts.open import fetch_folder
    from llava_sculpt.evaluation import processes
    from llava_sculpt.evaluation.calibrate import check_calibration, compare
    from llava_sculpt.evaluation.compare import DATA_ROOTS
    from llava_sculpt.evaluation.own import prepare_own
    from llava_sculpt.evaluation.prepared import load_tasks, tasks_of
    from llava_sculpt.evaluation.run import choose_target, evaluate
    from llava_sculpt.evaluation.table import format_details, format_table, table_cells
    from llava_sculpt.experiments.tiny_data import find_data
    from llava_sculpt.model.checkpoint import find_base_checkpoint
    from llava_sculpt.progress import print_table

    numbers = {key: getattr(options, key) for key in ("gpus", "batch_size", "max_new_tokens")}
    problems = [f"--{key} must be at least 1, got {v}" for key, v in numbers.items() if v is not None and v < 1]
    if not Path(options.model).is_dir() and options.model.count("/") != 1:
        what = "a task, which --tasks takes" if options.model in TASKS else "no folder, nor OWNER/NAME on the Hub"
        problems.append(f"--model {options.model}: {what}")
    names: list[str] = []
    try:
        own = _own(options, "images", "answers", "metric", "overwrite")
        roots = [options.data_root] if options.data_root else DATA_ROOTS
        if options.tasks or options.data is None:
            names = tasks_of(options.tasks or "all", roots)
        if options.data is not None:
            names.append(_own_name(options))
            if options.split != "test":
                problems.append("--split val: --data is a test set")
        choose_target(names, options.target)
    except UserError as error:
        problems += error.problems
    if problems:
        raise UserError(problems)
    with processes.process_group():
        generate = any(name in TASKS for name in names)
        root = options.data_root or processes.from_first(
            lambda: find_data(options.model, options.base, generate=generate)
        )
        if options.data is not None:
            processes.from_first(lambda: prepare_own(root / names[-1], None, test=options.data, **own))
        tasks = load_tasks(names, root, options.split)
        if options.calibrate:
            styles = {task.name: task.prompt_style for task in tasks}
            known = find_base_checkpoint(str(fetch_folder(options.model, weights=False)), weights=False)
            check_calibration(known.config, options.model, options.split, styles)
        count = options.gpus or processes.gpu_count()
        if count > 1 and not processes.started():
            return processes.launch(count, main, options.arguments)
        if processes.rank() == 0:
            print(f"data: {root}", flush=True)
        loaded = load_for_inference(options.model, base=options.base, dtype=DTYPES.get(options.dtype), merge=True)
        folder = options.output_dir or Path("runs/eval") / _name_of_model(options.model)
        results = evaluate(
            loaded,
            tasks,
            folder,
            label=options.model,
            batch_size=options.batch_size,
            max_new_tokens=options.max_new_tokens,
            exact=options.exact,
            okvqa_variant=options.okvqa_variant,
            target=options.target,
        )
        if processes.rank() != 0:
            return 0
    table, details = format_table([(options.model, results)]), format_details(results)
    print_table(table_cells([(options.model, results)]), table)
    print(f"\n{details}\n\nresults: {folder / 'results.json'}")
    if loaded.adapter is not None and options.split == "test" and results["source"] is not None:
        write_model_card(loaded.adapter, results, f"{table}\n\n{details}")
    if not options.calibrate:
        return 0
    comparison, within = compare({name: entry["score"] for name, entry in results["tasks"].items()})
    print(f"\n{comparison}")
    return 0 if within else 1


def _name_of_model(model: str) -> str:
    """The name of its folder, for a checkpoint behind that of its run."""
    path = Path(model).absolute()
    return f"{path.parent.name}_{path.name}" if path.name.startswith("checkpoint-") else path.name


def _at_least_1(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return int(text)


def _add_ask(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="a run, a base or merged model, or one on the Hub")
    parser.add_argument("questions", nargs="+", metavar="QUESTION", help="every one is asked about every image")
    parser.add_argument(
        "--image", type=Path, action="append", default=[], help="repeat it for several; none: text only"
    )
    parser.add_argument("--base", help="base checkpoint, if not the one the adapter names")
    parser.add_argument("--batch_size", type=_at_least_1, help="questions at a time (default: as in eval)")
    parser.add_argument("--max_new_tokens", type=_at_least_1, default=128)
    parser.add_argument("--json", action="store_true", help='[{"image", "question", "answer"}, ...]')


def _ask(options: argparse.Namespace) -> int:
    from llava_sculpt.evaluation.terminal import ask

    ask(
        options.model,
        options.image,
        options.questions,
        base=options.base,
        batch_size=options.batch_size,
        max_new_tokens=options.max_new_tokens,
        as_json=options.json,
    )
    return 0


def _add_chat(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="a run, a base or merged model, or one on the Hub")
    parser.add_argument("--image", type=Path, help="what the conversation is about; none: text only")
    parser.add_argument("--base", help="base checkpoint, if not the one the adapter names")
    parser.add_argument("--max_new_tokens", type=_at_least_1, default=512, help="where an answer is cut off")
    parser.epilog = "Not on a terminal it reads a question a line and prints the answers."


def _chat(options: argparse.Namespace) -> int:
    from llava_sculpt.evaluation.terminal import chat

    chat(options.model, options.image, base=options.base, max_new_tokens=options.max_new_tokens)
    return 0


def _add_demo(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="a run, a base or merged model, or one on the Hub")
    parser.add_argument("--against", metavar="MODEL", help="the model beside it (default: the base of a run)")
    parser.add_argument("--base", help="base checkpoint, if not the one an adapter names")
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0: others can reach it (default: %(default)s)")
    parser.add_argument("--port", type=int, default=7860, help="default: %(default)s")
    parser.add_argument("--max_new_tokens", type=_at_least_1, default=512, help="where an answer is cut off")


def _demo(options: argparse.Namespace) -> int:
    from llava_sculpt.evaluation.demo import demo

    demo(
        options.model,
        options.against,
        base=options.base,
        host=options.host,
        port=options.port,
        max_new_tokens=options.max_new_tokens,
    )
    return 0


def _add_compare(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "folders",
        nargs="+",
        type=Path,
        metavar="FOLDER",
        help="what eval or finetune wrote (results.json, predictions/); the first is what the others are held beside",
    )
    parser.add_argument("--out", type=Path, default=Path("runs/compare.html"), help="page (default: runs/compare.html)")
    parser.add_argument(
        "--data_root", type=Path, help="folder of the prepared data sets (default: data/tiny or data, what was scored)"
    )


def _compare(options: argparse.Namespace) -> int:
    from llava_sculpt.evaluation.compare import DATA_ROOTS, compare, format_counts
    from llava_sculpt.evaluation.compare_page import write_page
    from llava_sculpt.evaluation.table import format_table

    if options.out.suffix.lower() not in (".html", ".htm") or options.out.is_dir():
        raise UserError(f"--out {options.out}: should be the name of an HTML file, e.g. compare.html")
    found = compare(options.folders, [options.data_root] if options.data_root else DATA_ROOTS)
    shown, total = write_page(found, options.out), len(found.items)
    print(f"{format_table(found.rows)}\n\n{format_counts(found)}\n", *found.notes, sep="\n")
    print(f"page: {options.out}" + (f" ({shown:,} of {total:,} questions)" if shown < total else ""))
    return 0


def _add_prepare(parser: argparse.ArgumentParser) -> None:
    from llava_sculpt.tasks import prepare_options

    names = parser.add_subparsers(dest="name", required=True, metavar="|".join([*TASKS, "own"]))
    summary = "your own conversations and pictures -> prepared folder; its name is the task's"
    own = names.add_parser("own", description=summary, allow_abbrev=False)
    own.add_argument("--out", type=Path, required=True, help="prepared folder, e.g. data/charts")
    _add_own(own, name=False)
    for name, task in TASKS.items():
        summary = f"{task.label}: official files -> prepared folder"
        part = names.add_parser(name, description=summary, allow_abbrev=False)
        part.add_argument(
            "--raw", type=Path, required=True, help=f"folder with the official files, e.g. data/raw/{name}"
        )
        part.add_argument("--out", type=Path, required=True, help=f"prepared folder, e.g. data/{name}")
        for flag, option in prepare_options(name).items():
            settings: dict[str, Any] = {"type": option.kind, "choices": option.choices}
            if option.kind is bool:
                settings = {"action": argparse.BooleanOptionalAction if option.default else "store_true"}
            shown = option.default is not None and option.default is not False
            text = f"{option.help} (default: {option.default})" if shown else option.help
            part.add_argument(f"--{flag}", default=option.default, help=text, **settings)


def _prepare(options: argparse.Namespace) -> int:
    from llava_sculpt.evaluation.own import prepare_own
    from llava_sculpt.tasks import prepare_benchmark, prepare_options
    from llava_sculpt.tasks.common import describe

    if options.name == "own":
        if options.data is None:
            raise UserError("prepare own: needs --data FILE")
        print(
            describe(
                options.out, prepare_own(options.out, options.data, **{key: getattr(options, key) for key in _OWN})
            )
        )
        return 0
    given = {key: getattr(options, key) for key in prepare_options(options.name)}
    manifest = prepare_benchmark(options.name, options.raw, options.out, **given)
    print(describe(options.out, manifest))
    for split, of in manifest["source_counts"].items():
        if of["official"] not in (None, of["found"]):
            found, official = f"{of['found']:,}", f"{of['official']:,}"
            print(f"note: {split}: the raw files hold {found}, the official release {official}", file=sys.stderr)
    return 0


def _add_score(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("benchmark", choices=TASKS)
    parser.add_argument("--predictions", type=Path, required=True, help="LLaVA's answers, or the official format")
    parser.add_argument("--annotations", type=Path, required=True, help="the benchmark's official annotation file")
    parser.add_argument("--questions", type=Path, help="question file: score these questions only")
    parser.add_argument(
        "--variant", choices=["authors", "official"], default="authors", help="evaluator, for okvqa and gqa"
    )
    parser.add_argument("--answer_style", choices=_ANSWER_STYLES, default="letter", help="iconqa's problems.json")
    parser.add_argument("--tokenizer", choices=["ptb", "python"], default="ptb", help="coco: ptb needs Java")
    parser.add_argument("--lenient", action="store_true", help="odd ids as in the official script, not an error")
    parser.add_argument("--per_item", type=Path, metavar="FILE", help="write each question's score as JSON lines")
    parser.add_argument("--json", action="store_true")


def _score(options: argparse.Namespace) -> int:
    from llava_sculpt.evaluation.score_files import format_score, score_files

    result = score_files(
        options.benchmark,
        options.predictions,
        options.annotations,
        questions=options.questions,
        variant=options.variant,
        lenient=options.lenient,
        per_item=options.per_item,
        answer_style=options.answer_style,
        tokenizer=options.tokenizer,
    )
    print(json.dumps(result, indent=2) if options.json else format_score(result))
    return 0


def _add_check_data(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("data", type=Path, metavar="TRAIN_JSON")
    parser.add_argument("--image_folder", type=Path, help="folder the records' image paths start from")
    parser.add_argument("--allow_outside", action="store_true", help="image paths may lead out of that folder")
    parser.add_argument("--model", required=True, help="base model: its tokenizer and config.json are enough")
    parser.add_argument("--model_max_length", type=int, default=2048)
    parser.add_argument("--samples", type=int, default=3, help="records to show as the model is trained on them")
    parser.add_argument("--json", action="store_true", help="with token ids (image -200) and labels of the samples")


def _check_data(options: argparse.Namespace) -> int:
    from llava_sculpt.artifacts.open import fetch_folder
    from llava_sculpt.data.check import check_data, format_check
    from llava_sculpt.data.tokenizer import LlavaTokenizer
    from llava_sculpt.model.checkpoint import find_base_checkpoint

    checkpoint = find_base_checkpoint(str(fetch_folder(options.model, weights=False)), weights=False)
    found = check_data(
        options.data,
        options.image_folder,
        LlavaTokenizer.from_dir(checkpoint.path),
        checkpoint.image_tokens,
        options.model_max_length,
        options.samples,
        allow_outside=options.allow_outside,
    )
    print(json.dumps(found) if options.json else format_check(found))
    return 0


def _add_inspect(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("adapter", type=Path, help="folder of a run or checkpoint")
    parser.add_argument("--json", action="store_true")


def _inspect(options: argparse.Namespace) -> int:
    from llava_sculpt.artifacts.inspect import format_inspection, inspect_adapter

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
    from llava_sculpt.artifacts.convert import convert_adapter, convert_checkpoint

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
    from llava_sculpt.artifacts.merge import format_merge, merge_adapter

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
    from llava_sculpt.artifacts.delta import export_delta
    from llava_sculpt.artifacts.merge import DTYPES
    from llava_sculpt.artifacts.sparse import export_sparse, import_sparse

    if options.base and options.format != "delta":
        raise UserError("--base: only for --format delta")
    if options.dtype and options.format == "dense":
        raise UserError("--dtype: not for --format dense, which gives back what the file holds")
    dtype = DTYPES.get(options.dtype)
    if options.format == "dense":
        import_sparse(options.source, options.out)
        print(f"{options.out}: the adapter folder, bit for bit what was exported")
    elif options.format == "delta":
        counts = export_delta(options.source, options.out, options.base, dtype)
        share = counts["support"] / counts["entries"]
        print(f"{options.out}: {options.out.stat().st_size:,} bytes, {share:.2%} of the adapted weights")
    else:
        sizes = export_sparse(options.source, options.out, dtype)
        smaller = sizes["dense_bf16"] / sizes["lora"]
        connector = f"; connector {sizes['connector']:,} bytes, whole" if sizes["connector"] else ""
        print(f"{options.out}: LoRA {sizes['lora']:,} bytes, {smaller:.2f}x smaller than dense bf16{connector}")
    return 0


def _add_edit(parser: argparse.ArgumentParser) -> None:
    from llava_sculpt.artifacts.edit import add_flags, find_edit

    methods = parser.add_subparsers(dest="edit", required=True, metavar="METHOD")
    for name in EDITS:
        summary = (find_edit(name).__doc__ or "").splitlines()[0]
        method = methods.add_parser(name, help=summary, description=summary, allow_abbrev=False)
        method.add_argument("--adapter", type=Path, required=True, help="folder of a run or checkpoint")
        method.add_argument("--out", type=Path, required=True, help="new folder for the result")
        add_flags(method, name)


def _edit(options: argparse.Namespace) -> int:
    from llava_sculpt.artifacts.edit import find_edit, settings_of

    find_edit(options.edit)(options.adapter, options.out, **settings_of(options.edit, vars(options)))
    print(f"{options.out}: {options.edit} of {options.adapter}")
    return 0


def _add_experiment(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("grids", nargs="+", metavar="GRID", help="name in configs/grids/ (table1, fig4, ...) or file")
    parser.add_argument("--scale", choices=SCALES, required=True)
    parser.add_argument("--seeds", type=int, default=1, help="runs of each setting, one seed each (default 1)")
    parser.add_argument("--jobs", type=int, help="runs at a time, one thread each (default: CPU cores; paper: 1)")
    parser.add_argument("--split", choices=["val", "test"], help="what to score on (default: the grid's, or test)")
    parser.add_argument("--dry_run", action="store_true", help="list what would be done, and how long it would take")
    parser.add_argument("--redo", action="store_true", help="forget earlier results and adapters of these runs first")


def _experiment(options: argparse.Namespace) -> int:
    from llava_sculpt.experiments.runner import experiment

    return experiment(
        options.grids,
        options.scale,
        seeds=options.seeds,
        jobs=options.jobs,
        split=options.split,
        dry_run=options.dry_run,
        redo=options.redo,
    )


def _add_report(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--scale", choices=SCALES, required=True)
    parser.add_argument("--out", type=Path, required=True, help="folder for report.html, report.md and the figures")


def _report(options: argparse.Namespace) -> int:
    from llava_sculpt.experiments.report import report

    return report(options.scale, options.out)


_Command = tuple[str, Callable[[argparse.ArgumentParser], None], Callable[[argparse.Namespace], int]]
_COMMANDS: dict[str, _Command] = {
    "finetune": ("the main job: train, evaluate, table and figure", _add_finetune, _finetune),
    "train": ("fine-tune from one YAML", _add_train, _train),
    "plan": ("memory, steps and FLOPs of a training, before it", _add_plan, _plan),
    "eval": ("score a model on the prepared tasks", _add_eval, _eval),
    "ask": ("questions about pictures, answered", _add_ask, _ask),
    "chat": ("a conversation about a picture, on the terminal", _add_chat, _chat),
    "demo": ("a web page on which two models answer side by side", _add_demo, _demo),
    "compare": (
        "what models forgot and learned: table, figure, and a page of pictures with answers",
        _add_compare,
        _compare,
    ),
    "prepare": ("official download -> training and question files", _add_prepare, _prepare),
    "convert": ("checkpoints and adapters between here and the original LLaVA", _add_convert, _convert),
    "merge": ("an adapter into its base model, weight by weight", _add_merge, _merge),
    "edit": (f"{', '.join(METHODS[name].label for name in EDITS)} on a trained adapter", _add_edit, _edit),
    "export": ("a sparse adapter, or its sparse delta, as one small file", _add_export, _export),
    "check-data": ("validate training data; show what is trained on", _add_check_data, _check_data),
    "score": ("a prediction file -> the official score", _add_score, _score),
    "experiment": ("the runs of the paper's tables and figures, from grids", _add_experiment, _experiment),
    "report": ("tables, figures and findings of the experiments", _add_report, _report),
    "inspect": ("densities of an adapter beside Theorem 3.1", _add_inspect, _inspect),
}

if __name__ == "__main__":
    sys.exit(main())
