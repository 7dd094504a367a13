"""The command `demo`: a web page on which one model or two answer questions about a picture (Gradio)."""

from __future__ import annotations

import html
import os
import socket
import tempfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_sculpt.data.conversation import question_problems
from llava_sculpt.data.image_check import image_problem
from llava_sculpt.errors import UserError, first_line

if TYPE_CHECKING:
    from llava_sculpt.evaluation.ask import Model

EXAMPLES = (
    "Describe this image in one sentence.",
    "What colors are in this image?",
    "Is there any text in this image?",
    "What is this?\nAnswer the question using a single word or phrase.",
)
# Gradio's page asks the internet for a script, and its other scripts may; a browser that is told so loads nothing from
# elsewhere, and shows the page in no other site's frame.
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self' data: blob:; worker-src 'self' blob:; "
    "frame-ancestors 'none'"
)
_LARGEST_FILE = "50mb"
_WAITING = 16  # questions; whoever comes then is told to come later


def demo(model: str, against: str | None, *, base: str | None, host: str, port: int, max_new_tokens: int) -> None:
    """Serve the page until ctrl-C.

    Args:
        against: the model beside it (default: the base of a run; nothing beside a model that is none).
        base: base checkpoint, if not the one that a run names.

    Raises:
        UserError: Gradio is missing, the port is taken, or a model cannot be loaded.
    """
    _check_address(host, port)
    with tempfile.TemporaryDirectory(prefix="llava_sculpt_demo_") as uploads:
        # Gradio reads these when it is imported. Pictures of visitors are gone when the demo is.
        os.environ |= {"GRADIO_TEMP_DIR": uploads, "GRADIO_ANALYTICS_ENABLED": "False"}
        gradio = _import_gradio()
        page = build_page(gradio, load_models(model, against, base), max_new_tokens)
        from starlette.middleware import Middleware

        try:
            page.launch(
                server_name=host,
                server_port=port,
                share=False,
                quiet=True,
                ssr_mode=False,
                run_history=False,
                footer_links=[],
                prevent_thread_lock=True,
                max_file_size=_LARGEST_FILE,
                app_kwargs={"middleware": [Middleware(_Policy)]},
            )
            print(f"http://{host}:{port} (ctrl-C ends it)", flush=True)
            threading.Event().wait()
        except OSError as error:
            raise UserError(f"--port {port}: {first_line(error)}") from error


def load_models(model: str, against: str | None, base: str | None) -> list[tuple[str, Model]]:
    """The models of the page with their titles; beside a run stands its base, unless `against` names another model.

    Raises:
        UserError: as `load`.
    """
    from llava_sculpt.evaluation.ask import load
    from llava_sculpt.model.adapter import base_of

    first = load(model, base)
    if against is not None:
        return [(model, first), (against, load(against, base, beside=first))]
    if first.loaded.adapter is None:
        return [(model, first)]
    name = base_of(first.loaded.adapter, base)
    return [(model, first), (f"{name} (base)", load(name, beside=first))]


def answer(models: Sequence[Model], image: str | None, question: str, max_new_tokens: int) -> Iterator[list[str]]:
    """The models' answers so far, one list after another: a model begins when the one before it has ended.

    Args:
        image: a file, or None for a question without a picture.

    Raises:
        UserError: bad input, before any model says anything; the image by the name of its file alone.
    """
    problems = question_problems(question.strip())
    if image is not None and (problem := image_problem(image)):
        name = Path(image).name  # of the visitor's file; the folder is ours
        problems.append(f"{name}: {problem.replace(image, name)}")
    if problems:
        raise UserError(problems)
    talks = [model.chat(image, max_new_tokens=max_new_tokens) for model in models]
    streams = [talk.stream(question) for talk in talks]
    texts = ["" for _ in talks]
    for place, pieces in enumerate(streams):
        for piece in pieces:
            texts[place] += piece
            yield list(texts)
        if note := talks[place].note:
            texts[place] = f"{texts[place]}\n({note.removesuffix(': this turn is not kept')})".strip()
        yield list(texts)


def build_page(gradio: Any, models: Sequence[tuple[str, Model]], max_new_tokens: int) -> Any:
    """The page, a `gradio.Blocks`: one question at a time, those that wait in a queue."""

    def respond(image: str | None, question: str) -> Iterator[list[str]]:
        yield ["" for _ in models]
        try:
            yield from answer([model for _, model in models], image, question, max_new_tokens)
        except UserError as error:
            message = html.escape("\n".join(error.problems))  # the page takes it for HTML
            gradio.Warning(message, duration=None)

    with gradio.Blocks(title="llava_sculpt", analytics_enabled=False) as page:
        with gradio.Row():
            with gradio.Column(scale=1, min_width=320):
                image = gradio.Image(sources=["upload", "clipboard"], label="Picture", height=280)
                # Gradio's own opens whatever Pillow knows, turns the picture and writes it anew.
                image.preprocess = lambda uploaded: uploaded and uploaded.path
                question = gradio.Textbox(label="Question", lines=2)
                button = gradio.Button("Ask", variant="primary")
            with gradio.Column(scale=2, min_width=320), gradio.Row():
                answers = [gradio.Textbox(label=name, lines=8, interactive=False) for name, _ in models]
        gradio.Examples([[text] for text in EXAMPLES], [question], label="Example questions")
        gradio.on([button.click, question.submit], respond, [image, question], answers, concurrency_limit=1)
    return page.queue(max_size=_WAITING)


class _Policy:
    """ASGI middleware that sends POLICY with every answer."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def send_with_policy(message: Any) -> None:
            if message["type"] == "http.response.start":
                headers = [*message.get("headers", ()), (b"content-security-policy", POLICY.encode())]
                message = {**message, "headers": headers}
            await send(message)

        await self.app(scope, receive, send_with_policy)


def _import_gradio() -> Any:
    try:
        import gradio
    except ImportError as error:
        raise UserError(f'demo: needs Gradio: pip install -e ".[demo]" ({first_line(error)})') from error
    return gradio


def _check_address(host: str, port: int) -> None:
    """Before a model is loaded for nothing.

    Raises:
        UserError: nothing can listen there.
    """
    if not 0 < port < 2**16:
        raise UserError(f"--port {port}: should be 1 to 65535")
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as place:
            place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            place.bind(address)
    except OSError as error:
        raise UserError(f"--host {host} --port {port}: cannot be listened on: {error.strerror}") from error
