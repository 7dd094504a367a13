"""Fixtures: a random LLaVA of a few thousand parameters in the real checkpoint layout, and a small training set."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from llava_sculpt.data.tokenizer import LlavaTokenizer
from llava_sculpt.names import TASKS
from llava_sculpt.tasks import prepare_benchmark
from llava_sculpt.tiny.world import write_raw_world
from tests.runs import Train

os.environ.setdefault("HF_HUB_OFFLINE", "1")
FIXTURES = Path(__file__).parent / "data" / "fixtures"
LONGEST = ["test_engines.py", "test_runner.py", "test_processes.py", "test_docs.py", "test_model_card.py"]

torch.set_num_threads(1)
# What takes seconds to import is imported where it is used: most tests of `make check` need none of it.


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--gpu", action="store_true", help="the fast tests marked gpu, on one GPU; all others use the CPU")
    parser.addoption("--complete", action="store_true", help="fail if a test is skipped that does not need a GPU")
    parser.addoption("--attack-seconds", type=float, default=3, help="for each test of tests/attack/ (default 3)")
    parser.addoption("--attack-from", type=int, default=0, help="number of the first attack: repeat a failed one")


def pytest_configure(config: pytest.Config) -> None:
    """Hide all GPUs, or all but one; nothing has asked for them yet. Undo a shell's `&`, which ignores ctrl-C."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if not config.option.gpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        return
    config.option.markexpr = "gpu and not slow"
    os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    if not torch.cuda.is_available():
        raise pytest.UsageError("--gpu: there is no GPU here")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What runs beside the original LLaVA package is slow, like the making of that package's environment.

    The longest files come first, so that two processes end together.
    """
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))
    for item in items:
        if "llava_python" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.slow)


def skip_reasons(config: pytest.Config) -> Counter[str]:
    skipped = config.pluginmanager.get_plugin("terminalreporter").stats.get("skipped", [])
    return Counter(report.longrepr[2].removeprefix("Skipped: ") for report in skipped)


def pytest_sessionfinish(session: pytest.Session) -> None:
    config = session.config
    if config.option.complete and not hasattr(config, "workerinput"):  # pytest-xdist's workers report elsewhere
        wanted = [reason for reason in skip_reasons(config) if not reason.startswith("needs a GPU")]
        session.exitstatus = pytest.ExitCode.TESTS_FAILED if wanted else session.exitstatus


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Two lines: how many attacks were tried; what was skipped, and why."""
    reports = [report for found in terminalreporter.stats.values() for report in found]
    tries = sum(n for report in reports for key, n in getattr(report, "user_properties", ()) if key == "tries")
    if tries:
        terminalreporter.write_line(f"attacks tried: {tries:,}")
    reasons = skip_reasons(terminalreporter.config)
    if reasons:
        line = "skipped: " + "; ".join(f"{count} {reason}" for reason, count in sorted(reasons.items()))
        terminalreporter.write_line(line, yellow=True)


def make_checkpoint(folder: Path, seed: int = 0) -> Path:
    """A random base checkpoint: 16 px images in 4 tokens, d = 64, two LLM layers."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    folder.mkdir(parents=True)
    for name in ("tokenizer.model", "preprocessor_config.json"):
        shutil.copy(FIXTURES / name, folder / name)
    preprocessor = json.loads((folder / "preprocessor_config.json").read_text())
    preprocessor["size"] = {"shortest_edge": 16}
    preprocessor["crop_size"] = {"height": 16, "width": 16}
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    vocabulary = LlavaTokenizer.from_dir(folder).vocab_size
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=16,
            patch_size=8,
        ),
        text_config=LlamaConfig(
            vocab_size=-(-(vocabulary + 2) // 64) * 64,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=512,
            tie_word_embeddings=False,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=vocabulary + 1,
        ),
        image_token_id=vocabulary,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    torch.manual_seed(seed)
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("base") / "llava")


@pytest.fixture(scope="session")
def training_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_training_data(tmp_path_factory.mktemp("training_data") / "data")


def make_training_data(folder: Path) -> Path:
    """Folder with train.json (24 samples, one in four without an image) and images/."""
    (folder / "images").mkdir(parents=True)
    rng = np.random.default_rng(0)
    records = []
    for index in range(24):
        record: dict[str, object] = {
            "id": f"s{index}",
            "conversations": [
                {"from": "human", "value": f"What is number {index}?" + " Tell me." * (index % 3)},
                {"from": "gpt", "value": f"number {index * 7 % 10}"},
            ],
        }
        if index % 4:
            name = f"{index}.png"
            Image.fromarray(rng.integers(0, 256, (12 + index, 20, 3), dtype=np.uint8)).save(folder / "images" / name)
            record["image"] = name
            record["conversations"][0]["value"] = "<image>\n" + record["conversations"][0]["value"]  # type: ignore[index]
        records.append(record)
    (folder / "train.json").write_text(json.dumps(records))
    return folder


@pytest.fixture(scope="session")
def flags(checkpoint: Path, training_data: Path) -> dict[str, str]:
    return make_flags(checkpoint, training_data)


def make_flags(checkpoint: Path, training_data: Path) -> dict[str, str]:
    """A run of 18 optimizer steps (6 an epoch, batch 4) whose masks are made before step 5."""
    return {
        "model_name_or_path": str(checkpoint),
        "data_path": str(training_data / "train.json"),
        "image_folder": str(training_data / "images"),
        "lora_r": "8",
        "per_device_train_batch_size": "4",
        "learning_rate": "5e-3",
        "mm_projector_lr": "1e-3",
        "sculpt_alpha": "0.1",
        "sculpt_warmup_steps": "5",
        "logging_steps": "1",
        "save_steps": "100",
        "disable_tqdm": "True",
    }


@pytest.fixture(scope="session")
def train(flags: dict[str, str]) -> Train:
    """`train(output_dir, lora_r=4, ...)` runs the training entry point in this process and returns its exit code."""
    from llava_sculpt.train.train import main as train_main

    def run(output_dir: Path, **overrides: object) -> int:
        given = {**flags, "output_dir": str(output_dir), **{k: str(v) for k, v in overrides.items()}}
        return train_main([word for key, value in given.items() for word in (f"--{key}", value)])

    return run


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_data(tmp_path_factory.mktemp("world") / "tiny")


def make_tiny_data(root: Path) -> Path:
    """The tiny world with 24 training samples and 3 validation questions for each task."""
    from llava_sculpt.experiments.tiny_data import _code_hash

    write_raw_world(root, 0)
    for name, task in TASKS.items():
        prepare_benchmark(name, root / "raw" / name, root / name, samples=24, val_samples=3, **task.tiny_options)
    (root / "world.json").write_text(json.dumps({"seed": 0, "code": _code_hash()}))
    return root
