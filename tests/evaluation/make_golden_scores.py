"""Make golden_scores.json: nasty predictions and what the official evaluators' own code gives for each of them.

The official code is no part of this repository. It is read from a folder OFFICIAL that holds

    llava/eval/{vqa,vqa_eval,m4c_evaluator,eval_textvqa,eval_ocrvqa}.py   the authors' release (LiangJian24/LoRASculpt,
                                                              llava/eval/); m4c_evaluator and eval_textvqa are LLaVA's
    vqa_official.py    GT-Vision-Lab/VQA PythonEvaluationTools/vqaEvaluation/vqaEval.py, tabs expanded, through 2to3
    eval_gqa.py        GQA's eval.py from its web site (also in PKU-YuanGroup/Video-LLaVA, videollava/eval/)

and needs tqdm, pycocoevalcap and Java:

    python tests/evaluation/make_golden_scores.py OFFICIAL [--items 120] [--seed 0] [--out FILE]
    python tests/evaluation/make_golden_scores.py OFFICIAL --items 5000 --seed 7 --compare

The file (default: golden_scores.json beside this script) has, for each benchmark, "annotations" and "predictions" in
the official formats and "scores" by item. With --compare nothing is written: the scores of `llava-sculpt score` on the
same files are compared item by item, and every difference is printed.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import random
import runpy
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

HERE = Path(__file__).resolve().parent
Case = dict[str, Any]

WORDS = """
a an the A The AN two Two ten none None zero eleven dog dogs dog's Dog fire truck t-shirt T-Shirt u.s.a. U.S. 3 3.5 .5
5. 1,000 1,00,0 1,,2 10:30 $5 50% #1 & rock'n'roll dont don't DONT couldnt've couldn'tve wouldnt im Im Ive Id've lets
let's somebody'd somebodyd've yall'd've 'ow'sat ow's'at maam oclock isnt whats what's shes she's hes stop, stop; (stop)
[stop] {x} a/b a / b x=y + - _ - < > @ ` ! ? ... . .. , ,, ; é É İ ß SS ſ K ﬁ 中文 日本 ٣ ٣,٤ ½ 😀
\u00a0 \u200b \u2028 \u3000
\x1c \x85 non-stop half-past 4, ,4 4,5 yes no Yes. NO.. yes... maybe the.cat a.b .a b. 1.000.000 0 00 -1 +1
""".replace("\n", " ").split(" ")
WORDS = [word for word in WORDS if word]
GLUE = [" "] * 12 + ["  ", "\n", "\t", "", "-", ",", ", ", "/", ".", ". ", "\r", " ,"]


def nasty(rng: random.Random, most: int = 4) -> str:
    """Zero to `most` odd words, oddly joined."""
    text = ""
    for _ in range(rng.choice([0, 1, 1, 1, 1, 2, 2, 3, most])):
        text += rng.choice(WORDS) + rng.choice(GLUE)
    return rng.choice([text, text.strip(), text.lower(), text.upper(), "." * 40 + text, text + "."])[: 60 * most]


def near(rng: random.Random, gold: str) -> str:
    """`gold`, or something that an evaluator might or might not take for it."""
    changes: list[Callable[[str], str]] = [
        lambda t: t,
        str.lower,
        str.upper,
        str.title,
        lambda t: t + ".",
        lambda t: t + "..",
        lambda t: " " + t,
        lambda t: t + "\n",
        lambda t: "the " + t,
        lambda t: t.replace("-", " "),
        lambda t: t.replace(",", ""),
        lambda t: t.replace(".", ""),
        lambda t: t.replace("'", ""),
        lambda t: t.replace("two", "2").replace("none", "0"),
        lambda t: t.replace(" ", "  "),
        lambda t: t.replace("/", " ").replace(";", ""),
        str.casefold,
    ]
    return rng.choice(changes)(gold)


def annotators(rng: random.Random) -> tuple[str, list[str]]:
    """A prediction and ten answers: a favourite and its neighbours, some others; sometimes unanimous."""
    favourite, other = nasty(rng), nasty(rng)
    if rng.random() < 0.25:
        answers = [favourite] * 10
    else:
        agreeing = rng.randrange(11)
        answers = [rng.choice([favourite, near(rng, favourite)]) for _ in range(agreeing)]
        answers += [rng.choice([other, near(rng, other), nasty(rng)]) for _ in range(10 - agreeing)]
    rng.shuffle(answers)
    return near(rng, rng.choice([favourite, favourite, other])), answers


def make_okvqa(rng: random.Random, items: int) -> Case:
    """Ten answers a question; some records occur twice in one question, which the evaluators count once."""
    annotations, predictions = [], []
    for number in range(items):
        prediction, texts = annotators(rng)
        answers = [
            {"answer_id": i, "raw_answer": text, "answer_confidence": "yes", "answer": text}
            for i, text in enumerate(texts, 1)
        ]
        if rng.random() < 0.1:
            answers[1] = dict(answers[0])
        key = {"question_id": 10 * number + 5, "image_id": number}
        annotations.append({**key, "question_type": "other", "answer_type": "other", "answers": answers})
        predictions.append({"question_id": key["question_id"], "prompt": "?", "text": prediction})
        if rng.random() < 0.05:  # the last of duplicates wins
            predictions.insert(0, {**predictions[-1], "text": nasty(rng)})
    return {"annotations": {"annotations": annotations}, "predictions": predictions}


def make_textvqa(rng: random.Random, items: int) -> Case:
    """Predictions as LLaVA writes them, with the image id as question id; duplicates count each."""
    data, predictions = [], []
    for number in range(items):
        prediction, answers = annotators(rng)
        image_id, question = f"{number // 2:016x}", f"What Is {number}?"
        data.append({"question_id": number, "image_id": image_id, "question": question, "answers": answers})
        prompt = f"{question}\nAnswer the question using a single word or phrase."
        if number % 3:
            prompt = prompt.replace("\n", "\nReference OCR token: A, b\n")
        predictions.append({"question_id": image_id, "prompt": prompt, "text": prediction})
        if rng.random() < 0.05:
            predictions.append({**predictions[-1], "text": nasty(rng)})
    return {"annotations": {"data": data}, "predictions": predictions}


def make_gqa(rng: random.Random, items: int) -> Case:
    """Some unbalanced questions, with and without a prediction; duplicates, of which the last counts; unknown ids."""
    gold: dict[str, Any] = {}
    predictions = []
    for number in range(items):
        answer = rng.choice([nasty(rng).lower().strip(), nasty(rng).strip()]) or "yes"
        balanced = rng.random() < 0.9
        gold[f"{number:06d}"] = {
            "imageId": f"n{number}",
            "question": " ".join(["w"] * (number + 1)),  # its length names the question in the evaluator's output
            "answer": answer,
            "isBalanced": balanced,
            "groups": {"global": "g", "local": None},
            "types": {"structural": rng.choice(["query", "verify", "choose"]), "semantic": "obj", "detailed": "d"},
            "semantic": [],
        }
        prediction = {"question_id": f"{number:06d}", "prompt": "?", "text": near(rng, answer)}
        if balanced or rng.random() < 0.5:
            predictions.append(prediction)
        if rng.random() < 0.05:
            predictions.insert(0, {**prediction, "text": nasty(rng)})
    predictions.append({"question_id": "unknown", "prompt": "?", "text": "yes"})
    return {"annotations": gold, "predictions": predictions}


def make_exact(rng: random.Random, items: int) -> Case:
    """OCR-VQA and IconQA: the authors' question files hold the answers."""
    lines = [{"question_id": f"b{n}_0", "answer": nasty(rng).strip() or "x"} for n in range(items)]
    predictions = [{"question_id": r["question_id"], "prompt": "?", "text": near(rng, r["answer"])} for r in lines]
    return {"annotations": lines, "predictions": predictions}


def make_coco(rng: random.Random, items: int) -> Case:
    """Captions without the line breaks that make the official tokenizer lose its place."""

    def caption() -> str:
        words = [rng.choice([*WORDS, "man", "red", "bus", "on", "street"]) for _ in range(rng.randrange(12))]
        text = rng.choice([" ", " ", ", "]).join(words)
        return "".join(" " if c in "\n\r\x0b\x0c\x1c\x85\u2028\u2029" else c for c in text)

    annotations = [{"id": i, "image_id": i // 3, "caption": caption()} for i in range(3 * items)]
    predictions = []
    for image in range(items):
        reference = annotations[3 * image + rng.randrange(3)]["caption"]
        predictions.append({"image_id": image, "caption": rng.choice([reference, near(rng, reference), caption()])})
    return {
        "annotations": {"images": [{"id": i} for i in range(items)], "annotations": annotations},
        "predictions": predictions,
    }


def official_okvqa(case: Case, evaluator: Any) -> dict[str, float]:
    gold = {r["question_id"]: r for r in json.loads(json.dumps(case["annotations"]))["annotations"]}
    answered = {p["question_id"]: {"answer": p["text"]} for p in case["predictions"]}
    vqa = SimpleNamespace(qa=gold, getQuesIds=lambda: list(gold))
    run = evaluator(vqa, SimpleNamespace(qa=answered), n=12)
    with contextlib.redirect_stdout(io.StringIO()):
        run.evaluate()
    return {**{str(k): v for k, v in run.evalQA.items()}, "all": run.accuracy["overall"]}


def official_textvqa(case: Case) -> dict[str, float]:
    from llava.eval.eval_textvqa import prompt_processor
    from llava.eval.m4c_evaluator import TextVQAAccuracyEvaluator

    known = {(r["image_id"], r["question"].lower()): r for r in case["annotations"]["data"]}
    evaluator = TextVQAAccuracyEvaluator()
    entries, scores = [], {}
    for prediction in case["predictions"]:
        record = known[prediction["question_id"], prompt_processor(prediction["prompt"])]
        entries.append({"pred_answer": prediction["text"], "gt_answers": record["answers"]})
        name, copies = str(record["question_id"]), 1
        while name in scores:
            copies += 1
            name = f"{record['question_id']}#{copies}"
        with contextlib.redirect_stderr(io.StringIO()):
            scores[name] = 100 * evaluator.eval_pred_list(entries[-1:])
    with contextlib.redirect_stderr(io.StringIO()):
        return {**scores, "all": 100.0 * evaluator.eval_pred_list(entries)}


def official_gqa(case: Case, script: Path, convert: bool) -> dict[str, float]:
    """`convert`: with LLaVA's conversion (scripts/convert_gqa_for_eval.py) in front of GQA's script."""
    converted = [
        {"questionId": p["question_id"], "prediction": p["text"].rstrip(".").lower() if convert else p["text"]}
        for p in case["predictions"]
    ]
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "q.json").write_text(json.dumps(case["annotations"]))
        (Path(folder) / "p.json").write_text(json.dumps(converted))
        before = sys.argv
        sys.argv = [str(script), "--questions", f"{folder}/q.json", "--predictions", f"{folder}/p.json"]
        try:
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                scores = runpy.run_path(str(script))["scores"]
        finally:
            sys.argv = before
    ids = list(case["annotations"])
    found = {ids[length - 1]: score for length, (score, _) in scores["accuracyPerLength"].items()}
    return {**found, **{kind: scores[kind] for kind in ("binary", "open")}, "all": scores["accuracy"]}


def official_exact(case: Case) -> dict[str, float]:
    from llava.eval import eval_ocrvqa

    eval_ocrvqa.args = None
    eval_ocrvqa.get_args = lambda: SimpleNamespace(output_dir=None, summary_output_dir=None)
    gold = {r["question_id"]: r for r in case["annotations"]}
    scores = {}
    with tempfile.TemporaryDirectory() as folder:
        eval_ocrvqa.args = SimpleNamespace(output_dir=folder, summary_output_dir=None)

        def run(predictions: list[Any], lines: list[Any]) -> float:
            (Path(folder) / "q.jsonl").write_text("".join(json.dumps(r) + "\n" for r in lines))
            (Path(folder) / "p.jsonl").write_text("".join(json.dumps(p) + "\n" for p in predictions))
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed):
                eval_ocrvqa.eval_single(f"{folder}/q.jsonl", f"{folder}/p.jsonl")
            return float(printed.getvalue().split("Accuracy: ")[1].split("%")[0])

        for prediction in case["predictions"]:
            scores[prediction["question_id"]] = run([prediction], [gold[prediction["question_id"]]])
        return {**scores, "all": run(case["predictions"], case["annotations"])}  # printed with two decimals


def official_coco(case: Case) -> dict[str, float]:
    """As COCOEvalCap does it, without the metrics that download something."""
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    images = [image["id"] for image in case["annotations"]["images"]]
    gold = {i: [a for a in case["annotations"]["annotations"] if a["image_id"] == i] for i in images}
    own = {i: [p for p in case["predictions"] if p["image_id"] == i] for i in images}
    score, scores = Cider().compute_score(PTBTokenizer().tokenize(gold), PTBTokenizer().tokenize(own))
    return {**{str(i): 100 * float(s) for i, s in zip(images, scores, strict=True)}, "all": 100 * float(score)}


def run_all(official: Path, items: int, seed: int) -> dict[str, Case]:
    """Cases of all benchmarks with the official scores."""
    sys.path.insert(0, str(official))
    from llava.eval.vqa_eval import VQAEval as Authors
    from vqa_official import VQAEval as Official

    golden: dict[str, Case] = {}
    for name, make in (
        ("okvqa", make_okvqa),
        ("textvqa", make_textvqa),
        ("gqa", make_gqa),
        ("ocrvqa", make_exact),
        ("coco", make_coco),
    ):
        case = golden[name] = make(random.Random(f"{name}/{seed}"), min(items, 1500) if name == "gqa" else items)
        if name == "okvqa":
            case["scores"] = {
                "authors": official_okvqa(case, Authors),
                "official": official_okvqa(case, Official),
            }
        elif name == "gqa":
            script = official / "eval_gqa.py"
            case["scores"] = {
                "authors": official_gqa(case, script, convert=True),
                "official": official_gqa(case, script, convert=False),
            }
        else:
            one = {"textvqa": official_textvqa, "ocrvqa": official_exact, "coco": official_coco}[name]
            case["scores"] = {"authors": one(case)}
    return golden


def differences(name: str, case: Case, folder: Path) -> list[str]:
    """Where `score_files`, lenient as the official scripts are, gives anything else."""
    from llava_sculpt.evaluation.score_files import score_files

    (folder / "gold.json").write_text(json.dumps(case["annotations"]))
    (folder / "own.json").write_text(json.dumps(case["predictions"]))
    found = []
    for variant, official in case["scores"].items():
        per_item = folder / "items.jsonl"
        result = score_files(
            name, folder / "own.json", folder / "gold.json", variant=variant, lenient=True, per_item=per_item
        )
        ours = {str(r["question_id"]): r["score"] for r in map(json.loads, per_item.read_text().splitlines())}
        ours |= {"all": result["score"], **{k: result[k] for k in ("binary", "open") if k in result}}
        decimals = 2 if name == "ocrvqa" else 9
        found += [
            f"{name}, {variant}, {item}: official {official.get(item)}, ours {ours.get(item)}"
            for item in official.keys() | ours.keys()
            if item not in official or item not in ours or abs(official[item] - round(ours[item], decimals)) > 1e-9
        ]
    return found


def main() -> int:
    """See the top of the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("official", type=Path)
    parser.add_argument("--items", type=int, default=120)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=HERE / "golden_scores.json")
    parser.add_argument("--compare", action="store_true")
    options = parser.parse_args()
    golden = run_all(options.official.resolve(), options.items, options.seed)
    if not options.compare:
        options.out.write_text(json.dumps(golden, indent=0) + "\n")
        return 0
    wrong = []
    for name, case in golden.items():
        with tempfile.TemporaryDirectory() as folder:
            found = differences(name, case, Path(folder))
        compared = sum(len(scores) for scores in case["scores"].values())
        right = {variant: round(scores["all"], 2) for variant, scores in case["scores"].items()}
        print(f"{name}: {compared} scores compared, {len(found)} differ; official: {right}")
        wrong += found
    print("\n".join(wrong[:20]))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
