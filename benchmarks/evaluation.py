"""Questions per second of an evaluation beside the one-by-one loop that LLaVA's loaders use.

    python benchmarks/evaluation.py                       # tiny model and world, one thread and all
    python benchmarks/evaluation.py --batch_size 32 --json out.json

One by one: batch 1, the image opened and preprocessed inline, `model.generate`. Batched: `generate_answers`, as
`llava-sculpt eval` calls it. Both answer the same questions in one process, chunk by chunk in turn, so that the ratio
survives a noisy machine, and the answers are checked to be equal. Two sets of questions:

  distinct  questions about as many images: OKVQA, TextVQA and IconQA are (nearly) so
  source    questions per image as in the four Source test sets together: GQA asks 12,578 about 398 images, TextVQA
            5,000 about 3,166, OKVQA 5,046 about 5,033; the tiny questions are put to that many images
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from measurements import write_results

from llava_sculpt.artifacts.inference import Inference, load_for_inference
from llava_sculpt.data.collator import left_pad
from llava_sculpt.data.conversation import encode_prompt
from llava_sculpt.data.images import load_rgb
from llava_sculpt.evaluation.decode import Decoder, image_token_count
from llava_sculpt.evaluation.generate import generate_answers
from llava_sculpt.evaluation.prepared import Task, load_tasks
from llava_sculpt.experiments.tiny_data import prepare_tiny_world

ROOT = Path(__file__).parents[1]
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
def one_by_one(loaded: Inference, folder: Path, questions: list[Question]) -> list[str]:
    model: Any = loaded.model
    tokenizer, decoder = loaded.tokenizer, Decoder(model, loaded.tokenizer, 128)
    answers = []
    for question in questions:
        pixels = loaded.preprocessor(load_rgb(folder / question["image"]))[None].to(decoder.device, decoder.dtype)
        prompt = encode_prompt(question["text"], tokenizer, has_image=True)
        tokens = image_token_count(model.config)
        batch = left_pad([prompt], decoder.generation.pad_token_id, model.config.image_token_id, tokens)
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
    loaded = load_for_inference(str(ROOT / "data/tiny_llava"))
    every = torch.get_num_threads()
    for threads in sorted({1, every}) if device.type == "cpu" else [every]:
        torch.set_num_threads(threads)
        for name, choose in (("distinct", distinct), ("source", source)):
            warm_up = [(folder, questions[:8]) for folder, questions in choose(tasks, 1000)]
            measure(loaded, warm_up, arguments.batch_size, 1)
            result = measure(loaded, choose(tasks, arguments.questions), arguments.batch_size, arguments.repeats)
            yield {"case": name, "threads": threads, "batch_size": arguments.batch_size, **result}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--questions", type=int, default=900, help="of each set (at most 900, default 900)")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results there")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
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
