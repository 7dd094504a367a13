"""Every command of the documentation, run at tiny scale in a copy of the repository's tree.

`PLACEHOLDERS` says what stands for a name of the reader's, `RULES` what is added to each kind of command and what must
come of it; a command that no rule knows fails. At the scale of the paper a command runs up to the point where a GPU,
weights or a download are missing, and must say so.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from PIL import Image

from llava_sculpt.cli import main
from tests.runs import BIN, ROOT, free_port

DOCUMENTS = ["README.md", "CONTRIBUTING.md", "data/README.md"]
DOCUMENTS += sorted(f"docs/{file.name}" for file in (ROOT / "docs").glob("*.md"))


@dataclass(frozen=True)
class Rule:
    """What becomes of a command.

    Attributes:
        command: regular expression for its beginning; the first rule that fits counts.
        add: words put after it, so that it is short.
        code: its exit code.
        says: regular expression that its output must have.
        slow: run by `make test-slow`.
        instead: it is not run, because of this; where it is run instead is asserted by `WHERE`.
    """

    command: str
    add: str = ""
    code: int = 0
    says: str = ""
    slow: bool = False
    instead: str = ""


# Where a command is run that is not run here: file and a text in it.
WHERE = {
    "continuous integration": (".ci/run", "finetune_iconqa.sh"),
    "two launchers": ("tests/train/test_engines.py", "def test_two_launchers_make_one_run"),
    "the original package": ("tests/llava_patch/test_training.py", '"deepspeed"'),
    "a terminal": ("tests/evaluation/test_ask.py", "def test_a_conversation_on_a_terminal"),
    "set-up": (".ci/run", "make test-all"),
    "the notebook": ("docs/quickstart.ipynb", "--method lora"),
}
NOT_HERE = "not run: it downloads a program or weights, or is another program"
SHORT = "--max_steps 2 --sculpt_warmup_steps 1 --disable_tqdm true"
SMALL = "--samples 24 --val_samples 3"
# The paper's YAMLs with the tiny model on a CPU: every path in them is read.
ON_CPU = f"--model_name_or_path data/tiny_llava --bf16 false --tf32 false --dataloader_num_workers 0 {SHORT}"
PAPER = "neither a folder nor a model|hf download"

RULES = [
    Rule(r"make (check|setup|test|test-all)\b", instead="set-up"),
    Rule(r"bash scripts/finetune_iconqa.sh$", instead="continuous integration"),
    Rule(r"bash scripts/finetune_iconqa.sh --method lora$", instead="the notebook"),
    Rule(r"bash scripts/finetune_\w+.sh .*--scale paper", code=2, says="cannot run here(.|\n)*CUDA GPU"),
    Rule(r"bash scripts/finetune_\w+.sh", add=f"--scale tiny {SHORT}", says="Source", slow=True),
    Rule(r"bash scripts/(table|fig)\w+.sh --scale tiny", add="--dry_run", says=r"\d+ trainings"),
    Rule(r"bash eval/\w+.sh", add="--split val", says="gqa|iconqa|GQA|IconQA", slow=True),
    Rule(r"(\.venv[\w-]*/bin/)?(pip|hf|accelerate) .*(install|download|lmms_eval)", instead=NOT_HERE),
    Rule(r"python3 -m venv", instead=NOT_HERE),
    Rule(r"(transformers|vllm) serve|python (llava_surgery|convert)_\w+.py|llama-mtmd-cli", instead=NOT_HERE),
    Rule(r"deepspeed .*llava_patch", instead="the original package"),
    Rule(r"(torchrun|deepspeed) .*--node_rank", instead="two launchers"),
    Rule(r"(torchrun|deepspeed|accelerate) ", add=ON_CPU, slow=True, says="engine: .*2 process"),
    Rule(r"llava-sculpt eval --calibrate", code=2, says=f"not prepared|{PAPER}"),
    Rule(r"python scripts/draw_charts.py", says="500 pictures", slow=True),
    Rule(r"llava-sculpt prepare own", says="train 900", slow=True),
    Rule(r"llava-sculpt prepare .*--train_captions official", add=f"{SMALL} --overwrite"),
    Rule(r"llava-sculpt prepare", add=SMALL),
    Rule(r"llava-sculpt check-data", says="samples|records"),
    Rule(r"llava-sculpt train", add=f"--output_dir runs/again {SHORT}"),
    Rule(r"llava-sculpt plan", says="GB"),
    Rule(r"llava-sculpt eval .*--data ", says="all_charts: accuracy", slow=True),
    Rule(r"llava-sculpt eval", add="--split val --batch_size 32", says="IconQA|iconqa"),
    Rule(r"llava-sculpt ask .*--json", says=r'"image": "y.png",\n.*How many are there.*\n.*answer'),
    Rule(r"llava-sculpt ask runs/tiny/charts", slow=True),
    Rule(r"llava-sculpt ask"),
    Rule(r"llava-sculpt chat", instead="a terminal"),
    # It serves until it is stopped: only as far as the port.
    Rule(r"llava-sculpt demo", add="--port 70000", code=2, says="--port 70000: should be"),
    Rule(r"llava-sculpt compare runs/tiny", instead="the notebook"),
    Rule(r"llava-sculpt compare BASE RUN", code=2, says="BASE: folder not found"),
    Rule(r"llava-sculpt compare", says="forgotten (.|\n)*page: "),
    Rule(r"llava-sculpt score", says="100"),
    Rule(r"llava-sculpt edit"),
    Rule(r"llava-sculpt experiment", add="--dry_run", says=r"\d+ trainings"),
    Rule(r"llava-sculpt report", slow=True),
    Rule(r"llava-sculpt inspect", says=r"total \(\d+ modules\)"),
    Rule(r"llava-sculpt (merge|export|convert)"),
]
# What stands for a name of the reader's, in this order.
PLACEHOLDERS = [
    (r"^\.venv/bin/(llava-sculpt|python)", r"\1"),
    (r"\{(\w+)(,\w+)+\}", r"\1"),  # {a,b} and a|b: the first
    (r"(?<=[\w/])(\|[\w/.]+)+", ""),
    (r"[\[\]]", ""),  # [--optional VALUE]: given
    (r"--key value( \.\.\.)?", "--seed 1"),
    (r"\b(prepare|raw/|data/) ?NAME", r"\1 gqa"),
    (r"/ gqa", "/gqa"),
    (r"score NAME", "score okvqa"),
    (r"--predictions \S+ --annotations \S+", "--predictions answers.jsonl --annotations gold.json"),
    (r"(prepare (\w+)) --raw DIR --out DIR", r"\1 --raw data/raw/\2 --out data/\2"),
    (r"(check-data) \S+ --image_folder \S+", r"\1 data/iconqa/train.json --image_folder data/raw/iconqa/iconqa_data"),
    (r"(check-data .*|eval )--model (MODEL|M|llava-hf\S+)$", r"\1--model data/tiny_llava"),
    (r"--config FILE.yaml", "--config configs/tiny/iconqa_sculpt.yaml"),
    (r"(export .*)--out FILE", r"\1--out out/{number}.safetensors"),
    (r"--out DIR", "--out out/{number}"),
    (r"(convert \w+) SRC --to hf", r"\1 models/llava-tiny --to hf"),
    (r"(convert checkpoint) liuhaotian\S+", r"\1 models/llava-tiny"),
    (r"(--to hf --base) llava-hf\S+", r"\1 data/tiny_llava"),
    (r"--base M\b", "--base data/tiny_llava"),
    (r"\b(DIR|MODEL|(?<=ask )runs/tiny/iconqa/\w+)\b", "runs/mine"),
    (r"(--num_gpus|--nproc_per_node|--num_processes) 4", r"\1 2"),
    (r"(eval .*)--gpus 4", r"\1--gpus 1"),
    (r"^((?:deepspeed|torchrun|accelerate) .*?)(?: --output_dir \S+)?$", r"\1 --output_dir out/{number}"),
]


def commands_of(document: str) -> list[str]:
    """The commands of its bash blocks and of its table of commands, each on one line, without comments."""
    text = (ROOT / document).read_text(encoding="utf-8")
    blocks = re.findall(r"^```bash\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    cells = re.findall(r"^\| `((?:llava-sculpt|bash|make) [^`]*)` \|", text, re.MULTILINE)
    lines += [cell.replace("\\|", "|") for cell in cells]
    commands = [part.strip() for line in lines for part in re.sub(r"(^|\s)#.*", "", line).split("&&")]
    return [" ".join(command.split()) for command in commands if command]


def filled_in(command: str) -> str:
    """The command with the reader's names put in."""
    for pattern, replacement in PLACEHOLDERS:
        command = re.sub(pattern, replacement, command)
    return command


# By document, without what an earlier one has.
COMMANDS: dict[str, list[str]] = {document: [] for document in DOCUMENTS}
for document in DOCUMENTS:
    known = {filled_in(command) for commands in COMMANDS.values() for command in commands}
    COMMANDS[document] += [
        command for command in dict.fromkeys(commands_of(document)) if filled_in(command) not in known
    ]


def rule_of(command: str) -> Rule:
    return next((rule for rule in RULES if re.match(rule.command, filled_in(command))), None) or pytest.fail(
        f"no rule for this command of the documentation: {command}"
    )


@pytest.fixture(scope="module")
def tree(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The repository with the tiny world also where the real data sets are put, and one short run, runs/mine."""
    tree = tmp_path_factory.mktemp("docs") / "tree"
    for name in ("configs", "scripts", "eval", "results"):
        shutil.copytree(ROOT / name, tree / name)
    (tree / "data").mkdir()
    for name in ("llava_sculpt", "data/tiny_llava"):
        (tree / name).symlink_to(ROOT / name)
    (tree / "data" / "tiny").symlink_to(tiny_data)
    shutil.copytree(tiny_data / "raw", tree / "data" / "raw", copy_function=os.link)
    (tree / "answers.jsonl").write_text(json.dumps({"question_id": 1, "answer": "dog"}))
    for name in ("x.png", "y.png"):
        Image.new("RGB", (40, 30), (200, 30, 30)).save(tree / name)
    answers = [{"answer_id": n, "answer": "dog"} for n in range(1, 11)]
    gold = {"question_id": 1, "image_id": 1, "answers": answers}
    (tree / "gold.json").write_text(json.dumps({"annotations": [gold]}))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tree)
        flags = ["--config", "configs/tiny/iconqa_sculpt.yaml", "--output_dir", "runs/mine", *SHORT.split()]
        assert main(["train", *flags]) == 0
        for name in ("iconqa", "coco"):
            assert main(["prepare", name, "--raw", f"data/raw/{name}", "--out", f"data/{name}", *SMALL.split()]) == 0
        assert main(["convert", "checkpoint", "data/tiny_llava", "--to", "original", "--out", "models/llava-tiny"]) == 0
    return tree


def run(words: list[str], tree: Path, capfd: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Exit code and output: this package's commands in this process, others in one of their own."""
    if words[0] == "llava-sculpt":
        try:
            code = main(words[1:])
        except SystemExit as end:
            code = int(end.code or 0)
        captured = capfd.readouterr()
        return code, captured.out + captured.err
    environment = {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    if words[0] in ("deepspeed", "torchrun", "accelerate"):
        port = "--main_process_port" if words[0] == "accelerate" else "--master_port"
        at = 2 if words[0] == "accelerate" else 1
        words = [*words[:at], port, str(free_port()), *words[at:]]
    done = subprocess.run(words, cwd=tree, env=environment, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


def problem_of(command: str, number: str, tree: Path, capfd: pytest.CaptureFixture[str]) -> str | None:
    """What is wrong with a command; None if it does what its rule says."""
    rule = rule_of(command)
    if rule.instead == NOT_HERE:
        return None
    if rule.instead:
        file, text = WHERE[rule.instead]
        return None if text in (ROOT / file).read_text() else f"{command}\n    is no longer in {file}"
    given = f"{filled_in(command).replace('{number}', number)} {rule.add}"
    code, output = run(shlex.split(given), tree, capfd)
    if code == rule.code and re.search(rule.says, output) and "Traceback" not in output:
        return None
    wanted = f"exit code {rule.code}" + (f" and output with {rule.says!r}" if rule.says else "")
    return f"{command}\n    run as: {given}\n    wanted: {wanted}\n    exit code {code}: {output.strip()[-1500:]}"


def check(document: str, slow: bool, tree: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Run the document's commands in their order and fail with all their problems."""
    commands = [command for command in COMMANDS[document] if rule_of(command).slow == slow]
    name = Path(document).stem
    problems = [problem_of(command, f"{name}{n}", tree, capfd) for n, command in enumerate(commands)]
    found = [problem for problem in problems if problem]
    assert not found, "\n\n".join(found)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_commands(
    document: str, tree: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tree)
    check(document, False, tree, capfd)


@pytest.mark.slow
@pytest.mark.parametrize("document", DOCUMENTS)
def test_slow_commands(
    document: str, tree: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tree)
    check(document, True, tree, capfd)


@pytest.mark.slow
def test_notebook(tree: Path) -> None:
    """Its cells in one script, with shorter training: plain Python, so that Jupyter is not needed."""
    cells = json.loads((ROOT / "docs" / "quickstart.ipynb").read_text(encoding="utf-8"))["cells"]
    code = "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    assert code.count("--num_train_epochs 1") == 2
    (tree / "notebook.py").write_text(code.replace("--num_train_epochs 1", "--max_steps 2 --disable_tqdm true"))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg"}
    done = subprocess.run(
        [sys.executable, "notebook.py"], cwd=tree, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-3000:]
    for said in (r"LoRASculpt.*\(this run\)", r"page: .*compare.html", r"questions were forgotten", r"sculpt: \w+"):
        assert re.search(said, done.stdout), said


def test_every_rule_is_needed() -> None:
    used = [rule_of(command) for commands in COMMANDS.values() for command in commands]
    assert not [rule.command for rule in RULES if rule not in used]


def test_make_targets_of_the_documentation_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for document in DOCUMENTS:
        for target in re.findall(r"`make ([a-z-]+)", (ROOT / document).read_text(encoding="utf-8")):
            assert target in targets, f"{document}: make {target}"
