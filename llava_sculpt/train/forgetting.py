"""How much a training forgets, without any benchmark: general questions about its own pictures, base against tuned.

At the start the untouched base answers one question about each of N training pictures. While the model trains, the same
answers are scored by teacher forcing, and compared with the base's own distributions:

    forgetting_kl       mean over the answers' tokens (</s> included) of KL(base || tuned) = sum p log(p / q), in nats,
                        over the tokenizer's vocabulary
    forgetting_changed  share of answers in which the tuned model's best token is another one than the base's anywhere,
                        so that it would answer otherwise

The base is the model itself, its adapter switched off and its connector put back. docs/forgetting.md says how well both
follow the loss on real benchmarks.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from typing_extensions import TypedDict

from llava_sculpt.data.collator import TrainCollator, left_pad
from llava_sculpt.data.conversation import encode_prompt
from llava_sculpt.data.dataset import LlavaDataset
from llava_sculpt.data.images import load_rgb
from llava_sculpt.model.greedy import greedy_config
from llava_sculpt.model.lora import connector_weights
from llava_sculpt.records import read_checked
from llava_sculpt.train.console import say
from llava_sculpt.train.zero import everyones, gather_working_copies, write_working_copies

if TYPE_CHECKING:
    from llava_sculpt.train.trainer import LLaVATrainer

_SHORT = "\nAnswer the question using a single word or phrase."  # LLaVA-1.5's suffix for short answers
PROMPTS = (
    "Describe the image.",
    f"How many things are there?{_SHORT}",
    "What colors are in the picture?",
    f"What is written in the picture?{_SHORT}",
    "Where is the largest thing in the picture?",
    f"What color is the largest thing?{_SHORT}",
    "Is there any text in the picture, and what does it say?",
    f"What is on the left?{_SHORT}",
)
MAX_NEW_TOKENS = 32
MEASUREMENTS = 10
CURVE = ("step", "forgetting_kl", "forgetting_changed")
_SEED = 0  # of the choice of pictures: the same ones whatever the training's seed


@dataclass(frozen=True)
class _Batch:
    """B questions with the base's answers, of at most w tokens. All on the CPU.

    Attributes:
        inputs: of the model's forward: the prompts (padded on the left), each with its answer less the last token.
        is_answer: bool (B, w), False behind the end of an answer, and for one that does not count.
        base: float32 (t, V): the base's log-probabilities where `is_answer` is True, row by row.
    """

    inputs: dict[str, torch.Tensor]
    is_answer: torch.Tensor
    base: torch.Tensor


class ForgettingProbe(TrainerCallback):
    """Measures `forgetting_kl` and `forgetting_changed` and puts them into the Trainer's log.

    Measured after the optimizer steps ceil(k steps / 10), k = 1 ... 10, the last step among them. At step 0 both are 0
    by construction. A resumed run asks the base again, and measures at the same steps.

    Training is left as it is: weights, gradients, random numbers and modes. One measurement is a forward pass over N
    samples, without gradients, in batches of the training's size, shared between the processes. On the CPU are kept
    the pictures and at most N x 32 x V float32 log-probabilities (N = 32 and LLaVA-1.5-7B: 43 MB and 131 MB).

    Args:
        trainer: before its training begins. The connector's weights are those of the base.
        dataset: the training data. collator: its own.
        pictures: N; fewer where the data has fewer.
    """

    def __init__(self, trainer: LLaVATrainer, dataset: LlavaDataset, collator: TrainCollator, pictures: int) -> None:
        self.trainer, self._dataset, self._collator, self._wanted = trainer, dataset, collator, pictures
        self._names = probe_pictures(dataset.records, pictures)
        self._connector = {
            name: parameter for name, parameter in connector_weights(trainer.model).items() if parameter.requires_grad
        }
        self._base_connector = self._copy_of_connector(torch.device("cpu"))
        self._batches: list[_Batch] = []

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step >= state.max_steps:
            return
        if state.is_world_process_zero and len(self._names) < self._wanted:
            say(f"forgetting_probe: {len(self._names)} pictures, not {self._wanted}: the training data has no more")
        size, processes = args.per_device_train_batch_size, args.world_size
        # Under ZeRO-3 the processes compute every forward together: each has as many batches.
        own = range(args.process_index, math.ceil(len(self._names) / processes) * processes, processes)
        with self._evaluating(), self._as_base():
            self._batches = [self._ask(own[start : start + size]) for start in range(0, len(own), size)]

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step in measuring_steps(state.max_steps):
            due = control.should_log  # which logging resets
            self.trainer.log(self.measure())
            control.should_log = due

    def measure(self) -> dict[str, float]:
        """Both measures of the model as it is now. Collective."""
        divergence, tokens, changed = 0.0, 0, 0
        with self._evaluating():
            for batch in self._batches:
                tuned = self._log_probabilities(batch.inputs, batch.is_answer)
                base = batch.base.to(tuned.device)
                divergence += float((base.exp() * (base - tuned)).sum(dtype=torch.float64))
                answer_of = batch.is_answer.nonzero()[:, 0]
                changed += len(answer_of[(base.argmax(-1) != tuned.argmax(-1)).cpu()].unique())
                tokens += len(base)
        divergence, tokens, changed = map(sum, zip(*everyones((divergence, tokens, changed)), strict=True))
        return {"forgetting_kl": divergence / tokens, "forgetting_changed": changed / len(self._names)}

    def _ask(self, numbers: Sequence[int]) -> _Batch:
        """Let the model as it is now answer the questions of these numbers; those from N on do not count.

        Collective under ZeRO-3.
        """
        dataset, fill = self._dataset, self._collator
        tokenizer, names = dataset.tokenizer, [self._names[n % len(self._names)] for n in numbers]
        prompts = [encode_prompt(PROMPTS[n % len(PROMPTS)], tokenizer, True) for n in numbers]
        inputs = left_pad(prompts, fill.pad_token_id, fill.image_token_id, fill.image_tokens)
        inputs["pixel_values"] = torch.stack([dataset.preprocessor(load_rgb(dataset.image_folder / n)) for n in names])
        llava: Any = self.trainer.model
        generation = greedy_config(llava.config, tokenizer, MAX_NEW_TOKENS)
        said = llava.generate(**self.trainer._prepare_inputs(inputs), generation_config=generation)
        answers: list[list[int]] = said[:, inputs["input_ids"].shape[1] :].tolist()
        answers = [a[: a.index(tokenizer.eos_id) + 1] if tokenizer.eos_id in a else a for a in answers]
        width = max(map(len, answers))
        padded = torch.tensor([answer + [fill.pad_token_id] * (width - len(answer)) for answer in answers])
        lengths = [len(answer) * (n < len(self._names)) for n, answer in zip(numbers, answers, strict=True)]
        is_answer = torch.arange(width)[None] < torch.tensor(lengths)[:, None]
        inputs["input_ids"] = torch.cat([inputs["input_ids"], padded[:, :-1]], dim=1)
        inputs["attention_mask"] = torch.cat([inputs["attention_mask"], is_answer[:, :-1].long()], dim=1)
        inputs["position_ids"] = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
        return _Batch(inputs, is_answer, self._log_probabilities(inputs, is_answer).cpu())

    def _log_probabilities(self, inputs: Mapping[str, torch.Tensor], is_answer: torch.Tensor) -> torch.Tensor:
        """Float32 (t, V) of the t answer tokens, row by row, on the model's device."""
        model: Any = self.trainer.model
        given = self.trainer._prepare_inputs(dict(inputs))
        logits = model(**given, use_cache=False, logits_to_keep=is_answer.shape[1]).logits
        answered = logits[is_answer.to(logits.device)][:, : self._dataset.tokenizer.vocab_size]
        return answered.float().log_softmax(-1)

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        model = self.trainer.model
        was_training = model.training
        model.eval()
        try:
            with torch.no_grad(), self.trainer.compute_loss_context_manager():
                yield
        finally:
            model.train(was_training)

    @contextmanager
    def _as_base(self) -> Iterator[None]:
        """Inside, the model is the untouched base. Collective under ZeRO-3."""
        tuned = self._copy_of_connector()
        write_working_copies(self._connector, self._base_connector)
        try:
            with self.trainer.model.disable_adapter():
                yield
        finally:
            write_working_copies(self._connector, tuned)

    def _copy_of_connector(self, device: torch.device | None = None) -> dict[str, torch.Tensor]:
        copies = gather_working_copies(self._connector.items())
        return {name: copy.to(device or copy.device, copy=True) for name, copy in copies.items()}


def probe_pictures(records: Sequence[Mapping[str, Any]], count: int) -> list[str]:
    """`count` different images of a training file, or all if there are fewer; the same ones in any order of records."""
    names = sorted({record["image"] for record in records if "image" in record})
    return random.Random(_SEED).sample(names, min(count, len(names)))


def measuring_steps(steps: int) -> set[int]:
    """After which of `steps` optimizer steps is measured: about ten, evenly spaced, the last among them."""
    return {math.ceil(k * steps / MEASUREMENTS) for k in range(1, MEASUREMENTS + 1)}


class _TrainerState(TypedDict):
    log_history: list[dict[str, float]]


def forgetting_curve(folder: Path) -> dict[str, list[float]]:
    """What a run's probe has measured: `step`, `forgetting_kl`, `forgetting_changed`, a list each; {} without a probe.

    Args:
        folder: a run, or one of its checkpoints.

    Raises:
        UserError: trainer_state.json is missing or damaged.
    """
    history = read_checked(folder / TRAINER_STATE_NAME, _TrainerState)["log_history"]
    logs = [entry for entry in history if CURVE[1] in entry]
    return {key: [entry[key] for entry in logs] for key in CURVE} if logs else {}
