"""Asking: the answers are those of `eval`; a conversation is read as in training, and only once."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from llava_sculpt.artifacts.inference import Inference
from llava_sculpt.cli import main
from llava_sculpt.data.collator import expand_image
from llava_sculpt.data.conversation import encode_record
from llava_sculpt.data.images import load_rgb
from llava_sculpt.errors import UserError
from llava_sculpt.evaluation import ask as ask_module
from llava_sculpt.evaluation import generate, terminal
from llava_sculpt.evaluation.ask import Model
from llava_sculpt.evaluation.chat import Chat
from llava_sculpt.evaluation.prepared import load_tasks
from llava_sculpt.evaluation.run import evaluate
from tests.evaluation.conftest import PrepareTask
from tests.runs import ROOT

TURNS = ("what is this ?", "which colour has it ?", "how many\nare there ?", "  and behind it ?")


@pytest.fixture(scope="module")
def model(world: Inference) -> Model:
    return Model(world)


def test_ask_gives_the_answers_of_eval(model: Model, pictures: Path, prepare_task: PrepareTask, tmp_path: Path) -> None:
    gold = [{"question_id": n, "answer": "A"} for n in range(7)]
    prepare_task("iconqa", gold, list(range(7)))
    [task] = load_tasks(["iconqa"], tmp_path / "data", "test")
    evaluate(model.loaded, [task], tmp_path / "out", label="m", batch_size=3, max_new_tokens=8)
    lines = (tmp_path / "out" / "predictions" / "iconqa.jsonl").read_text().splitlines()
    expected = [json.loads(line)["text"] for line in lines]
    files = [pictures / question["image"] for question in task.questions]
    texts = [question["text"] for question in task.questions]
    assert len(set(expected)) > 3
    assert [model.ask(f, t, max_new_tokens=8) for f, t in zip(files, texts, strict=True)] == expected
    assert model.ask(files, texts, batch_size=2, max_new_tokens=8) == expected
    assert model.ask([Image.open(file) for file in files], texts, max_new_tokens=8) == expected


def test_lists_and_single_values(model: Model, pictures: Path) -> None:
    first, second = str(pictures / "0.png"), load_rgb(pictures / "1.png").convert("RGBA")
    alone = [model.ask(picture, text, max_new_tokens=8) for picture in (first, second, None) for text in TURNS[:2]]
    assert len(set(alone)) > 3
    pairs: list[Any] = [first, first, second, second, None, None]
    assert model.ask(pairs, list(TURNS[:2]) * 3, max_new_tokens=8) == alone
    assert model.ask(first, list(TURNS[:2]), max_new_tokens=8) == alone[:2]
    assert model.ask([first, second, None], TURNS[0], max_new_tokens=8) == alone[::2]
    assert model.ask([], []) == []


@pytest.mark.parametrize(
    ("image", "question", "says"),
    [
        ("no.png", "what ?", "no.png: the image is missing"),
        (None, " ", "empty"),
        (None, ["a", "<image> b"], "'<image> b' holds <image>"),
        (None, "a </s> b", "</s> occurs"),
        (None, "a ASSISTANT: b", "' ASSISTANT: ' occurs"),
        (None, "a \udcff", "half of a surrogate"),
        (None, "word " * 600, "context of 512 tokens"),
        ([None, None], ["a", "b", "c"], "2 images and 3 questions"),
    ],
)
def test_bad_questions_are_named(model: Model, image: Any, question: Any, says: str) -> None:
    with pytest.raises(UserError, match=says):
        model.ask(image, question)


def test_a_damaged_picture_that_pillow_has_opened(model: Model, tmp_path: Path) -> None:
    file = tmp_path / "cut.png"
    Image.effect_noise((64, 64), 90).save(file)
    file.write_bytes(file.read_bytes()[:2000])
    with pytest.raises(UserError, match=r"cut\.png"):
        model.ask(Image.open(file), "what ?")


def test_numbers_below_one(model: Model) -> None:
    with pytest.raises(UserError, match="batch_size must be at least 1, got 0"):
        model.ask(None, "what ?", batch_size=0)
    with pytest.raises(UserError, match="max_new_tokens must be at least 1"):
        model.chat(max_new_tokens=0)


def record_of(talk: Chat) -> dict[str, Any]:
    """The conversation as a training record."""
    turns = [
        {"from": who, "value": text} for pair in talk.rounds for who, text in zip(("human", "gpt"), pair, strict=True)
    ]
    if talk.pixels is None:
        return {"conversations": turns}
    turns[0]["value"] = f"<image>\n{turns[0]['value']}"
    return {"image": "x.png", "conversations": turns}


def training_ids(talk: Chat) -> list[int]:
    ids, _ = encode_record(record_of(talk), talk.loaded.tokenizer)
    checkpoint = talk.loaded.checkpoint
    return expand_image(ids, [checkpoint.image_token_id] * checkpoint.image_tokens, ids)


class Spy:
    """What a conversation feeds the model, call by call, and every prompt as a whole."""

    def __init__(self, talk: Chat, monkeypatch: pytest.MonkeyPatch) -> None:
        self.fed: list[int] = []
        self.images = 0
        self.prompts: list[list[int]] = []
        forward, next_token = talk.llava.forward, talk._next_token

        def counted(**inputs: Any) -> Any:
            self.fed.append(inputs["input_ids"].shape[1])
            self.images += "pixel_values" in inputs
            return forward(**inputs)

        def noted(ids: list[int]) -> int:
            self.prompts.append(list(ids))
            return next_token(ids)

        monkeypatch.setattr(talk.llava, "forward", counted)
        monkeypatch.setattr(talk, "_next_token", noted)


@torch.inference_mode()
def plainly(talk: Chat, ids: list[int], steps: int) -> str:
    """Greedy decoding without a cache."""
    said: list[int] = []
    pixels = {} if talk.pixels is None else {"pixel_values": talk.pixels}
    while len(said) < steps:
        logits = talk.llava(input_ids=torch.tensor([ids + said]), use_cache=False, **pixels).logits[0, -1]
        said.append(int(logits[: talk.loaded.tokenizer.vocab_size].argmax()))
        if said[-1] == talk.loaded.tokenizer.eos_id:
            return talk.loaded.tokenizer.decode(said[:-1]).strip()
    return talk.loaded.tokenizer.decode(said).strip()


@pytest.mark.parametrize("image", ["0.png", None])
def test_every_turn_is_read_as_in_training(
    model: Model, pictures: Path, image: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    talk = model.chat(image and pictures / image, max_new_tokens=6)
    for number, question in enumerate(TURNS):
        with monkeypatch.context() as patch:
            spy = Spy(talk, patch)
            answer = talk.ask(question)
        assert len(talk.rounds) == number + 1 and talk.rounds[-1] == (question.strip(), answer)
        whole, prompt = training_ids(talk), spy.prompts[0]
        assert whole[: len(prompt)] == prompt
        assert talk.loaded.tokenizer.decode(whole[len(prompt) :]).strip() == answer
        assert answer == plainly(talk, prompt, 6)
    assert len({answer for _, answer in talk.rounds}) > 2
    if image:
        assert talk.rounds[0][1] == model.ask(pictures / image, TURNS[0], max_new_tokens=6)


def test_a_turn_reads_neither_the_picture_nor_earlier_turns(
    model: Model, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    talk = model.chat(pictures / "1.png", max_new_tokens=5)
    spy = Spy(talk, monkeypatch)
    asked: list[int] = []
    before: list[int] = []
    for number, question in enumerate(TURNS):
        spy.fed.clear(), spy.prompts.clear()
        talk.ask(question)
        first, *steps = spy.fed
        prompt = spy.prompts[0]
        assert all(count == 1 for count in steps)
        # What the model said is read again from where the text has other tokens than the model chose.
        assert first == len(prompt) - common(before, prompt)
        assert spy.images == 1
        assert not number or first <= len(prompt) - len(asked)
        asked, before = prompt, spy.prompts[-1]


def common(a: list[int], b: list[int]) -> int:
    return next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def scripted(monkeypatch: pytest.MonkeyPatch, talk: Chat, *answers: list[int]) -> None:
    """The model says these tokens and then the end."""
    script = iter([token for answer in answers for token in [*answer, talk.loaded.tokenizer.eos_id]])
    monkeypatch.setattr(talk, "_next_token", lambda ids: next(script))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=200)
@given(data=st.data())
def test_pieces_are_whole_characters_and_together_the_answer(
    model: Model, data: st.DataObject, monkeypatch: pytest.MonkeyPatch
) -> None:
    talk = model.chat(max_new_tokens=100)
    tokenizer = talk.loaded.tokenizer
    text = data.draw(st.text(st.sampled_from("ab é€😀\n▁ ."), max_size=12))
    said = tokenizer.encode(text) + data.draw(st.lists(st.integers(3, tokenizer.vocab_size - 1), max_size=8))
    with monkeypatch.context() as patch:
        scripted(patch, talk, said)
        pieces = list(talk.stream("what ?"))
    assert "".join(pieces) == tokenizer.decode(said).strip()
    assert all(pieces)
    if "\ufffd" not in tokenizer.decode(said):
        assert not any("\ufffd" in piece for piece in pieces)


def test_a_character_of_several_bytes_comes_when_it_is_whole(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    talk = model.chat()
    tokens = talk.loaded.tokenizer.encode("a 😀 b")
    assert len(tokens) > 6  # the small vocabulary writes it in bytes
    scripted(monkeypatch, talk, tokens)
    assert [piece.strip() for piece in talk.stream("what ?")] == ["a", "😀", "b"]


def test_an_interrupted_answer_stays_in_the_conversation(
    model: Model, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    talk = model.chat(pictures / "2.png", max_new_tokens=6)
    talk.ask(TURNS[0])
    layer = talk.llava.model.language_model.layers[1]
    calls: list[int] = []

    def interrupted(*_: Any, **__: Any) -> None:
        calls.append(1)
        if len(calls) == 3:  # the first layer's cache has grown, the second's has not
            raise KeyboardInterrupt

    hook = layer.register_forward_pre_hook(interrupted)
    with pytest.raises(KeyboardInterrupt):
        talk.ask(TURNS[1])
    hook.remove()
    assert len(talk.rounds) == 2 and talk.rounds[1][1] and talk.note == "interrupted"
    for question in TURNS[2:]:
        with monkeypatch.context() as patch:
            spy = Spy(talk, patch)
            answer = talk.ask(question)
        assert spy.images == 0
        assert answer == plainly(talk, spy.prompts[0], 6)
        assert training_ids(talk)[: len(spy.prompts[0])] == spy.prompts[0]


def test_interrupted_while_the_picture_is_read(model: Model, pictures: Path) -> None:
    expected = model.chat(pictures / "2.png", max_new_tokens=6).ask(TURNS[0])
    talk = model.chat(pictures / "2.png", max_new_tokens=6)

    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    hook = talk.llava.model.language_model.layers[1].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        talk.ask(TURNS[1])
    hook.remove()
    assert talk.rounds == [] and talk.note == "interrupted; the answer is empty: this turn is not kept"
    assert talk.ask(TURNS[0]) == expected


def test_whoever_stops_listening_has_heard_the_answer(model: Model) -> None:
    talk = model.chat()
    with closing(talk.stream(TURNS[0])) as pieces:
        heard = next(pieces)
    assert talk.rounds == [(TURNS[0], heard)]


def test_answers_that_no_record_could_hold_are_not_kept(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    talk = model.chat()
    tokenizer = talk.loaded.tokenizer
    spelled = [token for letter in "</s>" for token in tokenizer.encode(f"a{letter}")[1:] if letter != "a"]
    scripted(monkeypatch, talk, [], [tokenizer.encode("x")[0], *spelled], tokenizer.encode("a dog"))
    assert talk.ask("what ?") == "" and talk.note == "the answer is empty: this turn is not kept"
    assert (
        "</s>" in talk.ask("what ?")
        and talk.note == "the answer holds a mark of the conversation: this turn is not kept"
    )
    assert talk.ask("what ?") == "a dog" and talk.note is None
    assert talk.rounds == [("what ?", "a dog")]


def test_the_end_of_the_context(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    talk = model.chat(max_new_tokens=10_000)
    monkeypatch.setattr(talk, "_next_token", lambda ids: 20)
    talk.ask("what ?")
    assert talk.note == "cut off: the model's context of 512 tokens is full"
    with pytest.raises(UserError, match="the conversation so far, begin a new one"):
        talk.ask("and now ?")
    assert len(talk.rounds) == 1
    short = model.chat(max_new_tokens=3)
    monkeypatch.setattr(short, "_next_token", lambda ids: 20)
    short.ask("what ?")
    assert short.note == "cut off after 3 tokens"


# The commands.


@pytest.fixture
def commands(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """`ask` and `chat` use the model with clear decisions, without loading it."""
    monkeypatch.setattr(ask_module, "load_for_inference", lambda path, **_: model.loaded)


@pytest.mark.usefixtures("commands")
def test_ask_prints_answers(model: Model, pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files, short = [str(pictures / name) for name in ("0.png", "1.png")], ["--max_new_tokens", "8"]
    expected = [model.ask(file, text, max_new_tokens=8) for file in files for text in ("what is\nthis ?", "why ?")]
    images = ["--image", files[0], "--image", files[1]]
    assert main(["ask", "m", "--image", files[0], *short, "why ?"]) == 0
    assert capsys.readouterr().out == f"{expected[1]}\n"
    assert main(["ask", "m", *images, *short, "--batch_size", "3", "what is\nthis ?", "why ?"]) == 0
    listing = capsys.readouterr().out
    for part in (
        f"{files[0]}\n  Q: what is\n     this ?\n  A: ",
        f"\n{files[1]}\n  Q: what is",
        f"\n  A: {expected[3]}",
    ):
        assert part in listing
    assert main(["ask", "m", *images, *short, "--json", "what is\nthis ?", "why ?"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [entry["answer"] for entry in found] == expected
    assert [entry["image"] for entry in found] == [files[0], files[0], files[1], files[1]]
    assert main(["ask", "m", *short, "why ?", "--json"]) == 0
    only = model.ask(None, "why ?", max_new_tokens=8)
    assert json.loads(capsys.readouterr().out) == [{"image": None, "question": "why ?", "answer": only}]


def test_bad_input_is_named_before_the_model_is_looked_at(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ask_module, "load_for_inference", None)
    (tmp_path / "broken.png").write_bytes((pictures / "0.png").read_bytes()[:40])
    words = ["--image", str(tmp_path / "no.png"), "--image", str(tmp_path / "broken.png"), "", "a <image>", "fine ?"]
    assert main(["ask", "nowhere", *words]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 4 and all(line.startswith("error: ") for line in lines)
    assert "no.png: the image is missing" in lines[0] and "broken.png" in lines[1]
    assert "question is empty" in lines[2] and "<image>" in lines[3]
    assert main(["chat", "nowhere", "--image", str(tmp_path / "no.png")]) == 2
    assert "no.png: the image is missing" in capsys.readouterr().err
    for command in (["ask", "m", "a", "--max_new_tokens", "0"], ["chat", "m", "--max_new_tokens", "0"]):
        with pytest.raises(SystemExit) as end:
            main(command)
        assert end.value.code == 2 and "at least 1, got 0" in capsys.readouterr().err


def test_no_model(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["ask", str(tmp_path / "none"), "what ?"]) == 2
    assert capsys.readouterr().err == f"error: no such folder: {tmp_path / 'none'}\n"


@pytest.mark.usefixtures("commands")
def test_chat_in_a_pipe(
    model: Model, pictures: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def said(*lines: str, code: int = 0) -> tuple[str, str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        words = ["--image", str(pictures / "0.png"), "--max_new_tokens", "5"]
        assert main(["chat", "m", *words]) == code
        captured = capsys.readouterr()
        return captured.out, captured.err

    first, second = (model.chat(pictures / name, max_new_tokens=5) for name in ("0.png", "1.png"))
    one, two = first.ask(TURNS[0]), first.ask(TURNS[1])
    assert said(TURNS[0], "", TURNS[1])[0] == f"{one}\n{two}\n"
    assert said(TURNS[0], "/reset", TURNS[0], TURNS[1])[0] == f"{one}\n{one}\n{two}\n"
    assert said(TURNS[0], f"/image '{pictures / '1.png'}'", TURNS[0])[0] == f"{one}\n{second.ask(TURNS[0])}\n"
    assert said(TURNS[0], "/quit", TURNS[1])[0] == f"{one}\n"
    out, errors = said(TURNS[0], "/image no.png", TURNS[1], code=2)
    assert out == f"{one}\n" and "no.png: the image is missing" in errors
    assert "commands are /image PATH" in said("/images", code=2)[1]
    assert "commands are /image PATH" in said("/image", code=2)[1]
    assert "</s>" in said("a </s>", code=2)[1]


def test_ctrl_c_ends_an_answer_and_on_a_terminal_no_more(
    model: Model, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    talk = model.chat()
    dog = talk.loaded.tokenizer.encode("a dog")

    def interrupted(ids: list[int]) -> int:
        if script:
            return script.pop(0)
        raise KeyboardInterrupt

    monkeypatch.setattr(talk, "_next_token", interrupted)
    script = list(dog)
    terminal._answer(talk, "what ?", interactive=True)
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("a dog\n", "(interrupted)\n")
    script = list(dog)
    with pytest.raises(KeyboardInterrupt):
        terminal._answer(talk, "what ?", interactive=False)
    assert talk.rounds == [("what ?", "a dog")] * 2


def test_a_conversation_on_a_terminal(checkpoint: Path, pictures: Path) -> None:
    """Prompt, streamed answer, errors that do not end it, ctrl-C at the prompt and ctrl-D: in a process of its own."""
    control, far_end = pty.openpty()
    words = ["-m", "llava_sculpt.cli", "chat", str(checkpoint), "--image", str(pictures / "0.png")]
    process = subprocess.Popen(
        [sys.executable, *words, "--max_new_tokens", "20"],
        stdin=far_end,
        stdout=far_end,
        stderr=far_end,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "TERM": "dumb"},
        start_new_session=True,
    )
    os.close(far_end)
    seen = ""

    def wait_for(text: str, seconds: float = 120) -> None:
        nonlocal seen
        end = time.monotonic() + seconds
        while text not in seen:
            assert time.monotonic() < end and process.poll() is None, seen
            if select.select([control], [], [], 1)[0]:
                seen += os.read(control, 4096).decode(errors="replace")
        seen = seen.partition(text)[2]

    try:
        wait_for("> ")
        os.write(control, b"/image no.png\n")
        wait_for("no.png: the image is missing")
        wait_for("> ")
        # One that comes between the prompt and Python's waiting for a line shows only at the next key: press again.
        for _ in range(20):
            process.send_signal(signal.SIGINT)
            if select.select([control], [], [], 5)[0]:
                break
        wait_for("> ")
        os.write(control, b"what is this ?\n")
        wait_for("what is this ?")
        wait_for("> ")
        os.write(control, b"\x04")
        assert process.wait(60) == 0
    finally:
        process.kill()
        os.close(control)


def test_the_documented_lines(
    checkpoint: Path,
    pictures: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    [block] = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs" / "ask.md").read_text(), re.DOTALL | re.MULTILINE)
    for name, source in (("x.png", "0.png"), ("y.png", "1.png")):
        shutil.copy(pictures / source, tmp_path / name)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "mine").symlink_to(checkpoint)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(block.replace("512", "8"), names)
    assert isinstance(names["answer"], str) and len(names["answers"]) == 2 and names["answer"] == names["answers"][0]
    assert capsys.readouterr().out.endswith(f"{names['talk'].rounds}\n")


def test_one_image_is_read_once(model: Model, pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Any] = []
    seen: list[Any] = []
    pixels = model.loaded.preprocessor(load_rgb(pictures / "0.png"))
    monkeypatch.setattr(generate, "load_rgb", lambda path: read.append(path) or load_rgb(path))
    model.ask(pictures / "0.png", list(TURNS), max_new_tokens=1)
    assert len(read) == 1
    picture = Image.open(pictures / "0.png")
    monkeypatch.setattr(type(model.loaded.preprocessor), "__call__", lambda _, image: seen.append(image) or pixels)
    model.ask([picture] * 4, list(TURNS), max_new_tokens=1)
    assert len(seen) == 1
