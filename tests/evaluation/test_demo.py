"""The page's answers are those of `ask`, and what keeps it from being served is said at once.

The page itself needs Gradio, which the test environment has not (docs/ask.md): it was looked at in a browser.
"""

from __future__ import annotations

import socket
import sys
from pathlib import Path

import pytest
import torch

from llava_sculpt.artifacts.inference import Inference
from llava_sculpt.cli import main
from llava_sculpt.errors import UserError
from llava_sculpt.evaluation import demo
from llava_sculpt.evaluation.ask import Model, load
from tests.model.interop import make_adapter

QUESTION = "what is this ?"


@pytest.fixture(scope="module")
def adapter(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_adapter(tmp_path_factory.mktemp("adapter") / "run", base=checkpoint)


def test_the_base_beside_a_run_shares_its_weights(checkpoint: Path, adapter: Path) -> None:
    [(title, run), (base_title, base)] = demo.load_models(str(adapter), None, None)
    assert (title, base_title) == (str(adapter), f"{checkpoint} (base)")
    shared = {id(parameter) for parameter in run.loaded.model.parameters()}
    own = {name for name, parameter in base.loaded.model.named_parameters() if id(parameter) not in shared}
    assert own and all("multi_modal_projector" in name for name in own)  # the run trained its connector
    ids = torch.tensor([[1, 5, 6, 7]])
    for model, alone in ((run, load(adapter)), (base, load(checkpoint))):
        with torch.inference_mode():
            logits = [one.loaded.model(input_ids=ids).logits for one in (model, alone)]
        assert torch.equal(*logits)


def test_titles(checkpoint: Path, adapter: Path) -> None:
    assert [title for title, _ in demo.load_models(str(checkpoint), None, None)] == [str(checkpoint)]
    both = demo.load_models(str(checkpoint), str(adapter), None)
    assert [title for title, _ in both] == [str(checkpoint), str(adapter)]


def test_answers_come_one_model_after_the_other(world: Inference, pictures: Path, checkpoint: Path) -> None:
    models = [Model(world), load(checkpoint)]
    image = str(pictures / "1.png")
    seen = list(demo.answer(models, image, f" {QUESTION}\n", 6))
    expected = [model.ask(image, QUESTION, max_new_tokens=6) for model in models]
    assert seen[-1] == [f"{text}\n(cut off after 6 tokens)" for text in expected]
    first = [texts[0] for texts in seen if not texts[1]]
    assert len(first) > 2 and first[-1] == seen[-1][0] and all(map(first[-1].startswith, first))
    [*_, [without]] = demo.answer(models[:1], None, QUESTION, 6)
    assert without.startswith(models[0].ask(None, QUESTION, max_new_tokens=6))


def test_an_empty_answer_is_called_so(world: Inference, monkeypatch: pytest.MonkeyPatch) -> None:
    end = world.tokenizer.eos_id
    monkeypatch.setattr("llava_sculpt.evaluation.chat.Chat._next_token", lambda self, ids: end)
    assert list(demo.answer([Model(world)], None, QUESTION, 6))[-1] == ["(the answer is empty)"]


def test_bad_input_is_named_without_the_folder_of_uploads(world: Inference, pictures: Path, tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes((pictures / "0.png").read_bytes()[:40])
    (tmp_path / "page.eps").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    for name in ("broken.png", "page.eps"):
        with pytest.raises(UserError) as raised:
            next(demo.answer([Model(world)], str(tmp_path / name), "  ", 6))
        empty, problem = raised.value.problems
        assert empty == "the question is empty" and problem.startswith(f"{name}: the file is not an image")
        assert str(tmp_path) not in problem


def test_no_gradio(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        port = place.getsockname()[1]
    assert main(["demo", "nowhere", "--port", str(port)]) == 2
    assert 'demo: needs Gradio: pip install -e ".[demo]"' in capsys.readouterr().err


def test_nothing_can_listen_there(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert main(["demo", "nowhere", "--port", port]) == 2
        assert f"--port {port}: cannot be listened on: Address already in use" in capsys.readouterr().err
    for port in ("0", "70000"):
        assert main(["demo", "nowhere", "--port", port]) == 2
        assert capsys.readouterr().err == f"error: --port {port}: should be 1 to 65535\n"
