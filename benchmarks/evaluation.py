"""Questions per second of an evaluation beside the one-by-one loop that LLaVA's loaders use.

    python benchmarks/evaluation.py                       # tiny model and world, one thread and all
    python benchmarks/evaluation.py --batch_size 32 --json out.json
    python benchmarks/evaluation.py --random 7b           # on a GPU: LLaVA-1.5-7B with random fp16 weights

One by one: batch 1, the image opened and preprocessed inline, `model.generate`. Batched: `generate_answers`, as
`llava-sculpt eval` calls it. Both answer the same questions in one process, chunk by chunk in turn, so that the ratio
survives a noisy machine, and the answers are checked to be equal. Two sets of questions:

  distinct  questions about as many images: OKVQA, TextVQA and IconQA are (nearly) so
  source    questions per image as in the four Source test sets together: GQA asks 12,578 about 398 images, TextVQA
            5,000 about 3,166, OKVQA 5,046 about 5,033; the tiny questions are put to that many images

`--random` asks made-up questions about as many photographs of noise, each answered with the same number of tokens:
`short` 4, `caption` 16; of captions also what `--exact` and an adapter beside the weights cost. The batch size is the
one that evaluation chooses by the free memory. `--random tiny` is the same with data/tiny_llava, on any machine.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measurements import write_results
from PIL import Image
from transformers import LlavaConfig, LlavaForConditionalGeneration

from llava_sculpt.artifacts.inference import Inference, load_for_inference
from llava_sculpt.data.collator import left_pad
from llava_sculpt.data.conversation import encode_prompt
from llava_sculpt.data.images import ImagePreprocessor, load_rgb
from llava_sculpt.data.tokenizer import LlavaTokenizer
from llava_sculpt.evaluation.batch_size import batch_that_fits, free_bytes
from llava_sculpt.evaluation.decode import Decoder, image_token_count
from llava_sculpt.evaluation.generate import generate_answers
from llava_sculpt.evaluation.prepared import Task, load_tasks
from llava_sculpt.experiments.tiny_data import prepare_tiny_world
from llava_sculpt.memory.plan import read_checkpoint_config
from llava_sculpt.model.checkpoint import find_base_checkpoint
from llava_sculpt.model.lora import inject_lora

ROOT = Path(__file__).parents[1]
TINY = ROOT / "data/tiny_llava"
RANDOM_TOKENS = {"short": 4, "caption": 16}
# (task, questions per 1,000, images): the shares of the official test sets (OCR-VQA: the random 2,000).
SOURCE = (("gqa", 511, 16), ("textvqa", 203, 129), ("okvqa", 205, 204), ("ocrvqa", 81, 78))

Question = dict[str, Any]
Set = list[tuple[Path, list[Question]]]  # image folder, questions


def distinct(tasks: dict[str, Task], count: int) -> Set:
    """Equal parts of three tasks, an image to each question."""
    names = ("okvqa", "textvqa", "gqa")
    return [(tasks[name].image_folder, tasks[name].questions[: count // 3]) for name in names]


def source(tasks: dict[str, Task], count: int) -> Set:
    """The four tasks, with questions per image as in the official sets."""
    sets = []
    for name, share, images in SOURCE:
        task = tasks[name]
        asked = [task.questions[n % len(task.questions)] for n in range(share * count // 1000)]
        few = list(dict.fromkeys(q["image"] for q in task.questions))[: max(1, images * count // 1000)]
        sets.append((task.image_folder, [{**q, "image": few[n * len(few) // len(asked)]} for n, q in enumerate(asked)]))
    return sets


@torch.inference_mode()
def one_by_one(loaded: Inference, folder: Path, questions: list[Question], tokens: int = 128) -> list[str]:
    model: Any = loaded.model
    tokenizer, decoder = loaded.tokenizer, Decoder(model, loaded.tokenizer, tokens)
    answers = []
    for question in questions:
        pixels = loaded.preprocessor(load_rgb(folder / question["image"]))[None].to(decoder.device, decoder.dtype)
        prompt = encode_prompt(question["text"], tokenizer, has_image=True)
        marks = image_token_count(model.config)
        batch = left_pad([prompt], decoder.generation.pad_token_id, model.config.image_token_id, marks)
        inputs = {name: value.to(decoder.device) for name, value in batch.items()}
        output = model.generate(**inputs, pixel_values=pixels, generation_config=decoder.generation)
        new = output[0, inputs["input_ids"].shape[1] :].tolist()
        answers.append(tokenizer.decode(new[: (*new, tokenizer.eos_id).index(tokenizer.eos_id)]).strip())
    return answers


def batched(loaded: Inference, folder: Path, questions: list[Question], batch_size: int) -> list[str]:
    parts = (loaded.model, loaded.tokenizer, loaded.preprocessor)
    found: dict[int, str] = {}
    for answers in generate_answers(*parts, questions, folder, batch_size):
        found |= answers
    return [found[place] for place in range(len(questions))]


def seconds(call: Callable[[], list[str]]) -> tuple[float, list[str]]:
    start = time.perf_counter()
    answers = call()
    return time.perf_counter() - start, answers


def measure(loaded: Inference, sets: Set, batch_size: int, repeats: int) -> dict[str, Any]:
    ratios, single, together = [], [], []
    same = True
    for _ in range(repeats):
        times = [0.0, 0.0]
        for folder, questions in sets:
            alone, expected = seconds(lambda f=folder, q=questions: one_by_one(loaded, f, q))
            batch, found = seconds(lambda f=folder, q=questions: batched(loaded, f, q, batch_size))
            same &= found == expected
            times = [times[0] + alone, times[1] + batch]
        ratios.append(times[0] / times[1])
        single.append(times[0])
        together.append(times[1])
    count = sum(len(questions) for _, questions in sets)
    return {
        "questions": count,
        "one_by_one_per_s": count / statistics.median(single),
        "batched_per_s": count / statistics.median(together),
        "ratio": statistics.median(ratios),
        "same_answers": same,
    }


def cases(arguments: argparse.Namespace, device: torch.device) -> Iterator[dict[str, Any]]:
    prepare_tiny_world(ROOT / "data/tiny")
    tasks = {task.name: task for task in load_tasks(["gqa", "textvqa", "okvqa", "ocrvqa"], ROOT / "data/tiny", "test")}
    loaded = load_for_inference(str(TINY))
    every = torch.get_num_threads()
    for threads in sorted({1, every}) if device.type == "cpu" else [every]:
        torch.set_num_threads(threads)
        for name, choose in (("distinct", distinct), ("source", source)):
            warm_up = [(folder, questions[:8]) for folder, questions in choose(tasks, 1000)]
            measure(loaded, warm_up, arguments.batch_size, 1)
            result = measure(loaded, choose(tasks, arguments.questions), arguments.batch_size, arguments.repeats)
            yield {"case": name, "threads": threads, "batch_size": arguments.batch_size, **result}


def random_model(size: str, layers: int | None, folder: Path) -> Inference:
    """A LLaVA of that size with random fp16 weights that never ends an answer, and the tiny model's tokenizer."""
    config = read_checkpoint_config(f"llava-hf/llava-1.5-{size}-hf")
    if layers is not None:
        config["text_config"]["num_hidden_layers"] = layers
    config["pad_token_id"] = config["text_config"]["pad_token_id"] = config["image_token_index"] + 1
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float16)
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
            model = LlavaForConditionalGeneration(LlavaConfig.from_dict(config)).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(before)
    side = model.config.vision_config.image_size
    settings = json.loads((TINY / "preprocessor_config.json").read_text())
    settings |= {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    tokenizer = LlavaTokenizer.from_dir(TINY)
    return Inference(model, tokenizer, ImagePreprocessor.from_dir(folder), find_base_checkpoint(str(TINY)), None)


def random_cases(size: str, layers: int | None, questions: int, repeats: int) -> Iterator[dict[str, Any]]:
    """Questions per second of a random model, one case after another; `size`: 7b, 13b, or tiny."""
    folder = Path(tempfile.mkdtemp())
    try:
        loaded = load_for_inference(str(TINY)) if size == "tiny" else random_model(size, layers, folder)
        with torch.no_grad():  # an end with logit 0 is never the best of hundreds
            loaded.model.lm_head.weight[loaded.tokenizer.eos_id] = 0  # type: ignore[index,union-attr]
        rng = np.random.default_rng(0)
        asked: list[Question] = []
        for number in range(questions):
            Image.fromarray(rng.integers(0, 256, (480, 640, 3), dtype=np.uint8)).save(folder / f"{number}.jpg")
            asked.append({"text": f"What is number {number} in this picture ?", "image": f"{number}.jpg"})
        few = max(1, questions // 8)
        for case in ("short", "caption"):
            yield random_case(case, loaded, folder, asked, repeats)
        yield random_case("caption, exact", loaded, folder, asked[:few], repeats)
        inject_lora(loaded.model, r=32, lora_alpha=64, dropout=0.0, connector="frozen")  # into the model itself
        yield random_case("caption, LoRA not merged", loaded, folder, asked, repeats)
    finally:
        shutil.rmtree(folder)


def random_case(case: str, loaded: Inference, folder: Path, asked: list[Question], repeats: int) -> dict[str, Any]:
    tokens, exact = RANDOM_TOKENS[case.partition(",")[0]], case.endswith("exact")
    device, config = loaded.weight.device, loaded.model.config
    longest = max(len(encode_prompt(q["text"], loaded.tokenizer, True)) for q in asked)
    batch = 16
    if device.type == "cuda":
        longest += image_token_count(config) + tokens - 1
        batch = batch_that_fits(config, loaded.weight.dtype, longest, free_bytes(device))
        torch.cuda.reset_peak_memory_stats(device)

    def all_answers() -> list[str]:
        parts = (loaded.model, loaded.tokenizer, loaded.preprocessor)
        found: dict[int, str] = {}
        for answers in generate_answers(*parts, asked, folder, batch, tokens, exact):
            found |= answers
        return [found[place] for place in range(len(asked))]

    few = asked[: max(1, len(asked) // 16)]
    one_by_one(loaded, folder, few[:1], tokens)
    seconds(all_answers)  # warm-up
    alone = [len(few) / seconds(lambda: one_by_one(loaded, folder, few, tokens))[0] for _ in range(repeats)]
    together = [len(asked) / seconds(all_answers)[0] for _ in range(repeats)]
    per_s, single = statistics.median(together), statistics.median(alone)
    return {
        "case": case,
        "dtype": str(loaded.weight.dtype).removeprefix("torch."),
        "questions": len(asked),
        "new_tokens": tokens,
        "batch_size": min(batch, len(asked)),
        "per_s": per_s,
        "per_s_min": min(together),
        "per_s_max": max(together),
        "one_by_one_per_s": single,
        "ratio": per_s / single,
        "peak_gib": torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--questions", type=int, help="of each set (at most 900, default 900; with --random 128)")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--random", choices=["7b", "13b", "tiny"], help="random weights of that size, see above")
    parser.add_argument("--layers", type=int, help="with --random: of the language model, fewer than the real number")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results there")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if arguments.random:
        rows = []
        print(
            f"{'case':26}{'dtype':>9}{'batch':>7}{'one by one/s':>14}{'batched/s':>11}{'min':>8}{'max':>8}{'ratio':>8}"
        )
        for row in random_cases(arguments.random, arguments.layers, arguments.questions or 128, arguments.repeats):
            rows.append(row)
            print(
                f"{row['case']:26}{row['dtype']:>9}{row['batch_size']:7}{row['one_by_one_per_s']:14.1f}"
                f"{row['per_s']:11.1f}{row['per_s_min']:8.1f}{row['per_s_max']:8.1f}{row['ratio']:8.2f}",
                flush=True,
            )
        if arguments.json:
            write_results(arguments.json, rows, device, arguments.repeats)
        return
    arguments.questions = arguments.questions or 900
    print(f"{'case':10}{'threads':>8}{'batch':>7}{'one by one/s':>14}{'batched/s':>11}{'ratio':>8}  same answers")
    found = []
    for case in cases(arguments, device):
        found.append(case)
        print(
            f"{case['case']:10}{case['threads']:8}{case['batch_size']:7}{case['one_by_one_per_s']:14.1f}"
            f"{case['batched_per_s']:11.1f}{case['ratio']:8.2f}  {case['same_answers']}",
            flush=True,
        )
    if arguments.json:
        write_results(arguments.json, found, device, arguments.repeats)


if __name__ == "__main__":
    main()
