"""A run on disk: run.json says what it is, checkpoints are whole or not there, one process at a time works in it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Ge
from safetensors import SafetensorError
from transformers import TrainerState
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from typing_extensions import TypedDict

from llava_sculpt.errors import UserError
from llava_sculpt.locks import folder_lock, is_leftover
from llava_sculpt.model.files import ADAPTER_FILE, COMPLETE_FILE, RUN_FILE
from llava_sculpt.model.whole import ARTIFACTS, check_files, check_whole, read_complete, read_run
from llava_sculpt.records import file_sha256, read_checked, write_json
from llava_sculpt.train.zero import everyones

SAVING = ".saving"  # where a checkpoint is written before it is published


class _State(TypedDict):
    """What decides of a checkpoint's trainer_state.json how a run goes on."""

    global_step: Annotated[int, Ge(1)]
    epoch: float
    log_history: list[dict[str, Any]]
    stateful_callbacks: dict[str, Any]


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose files were, when it was opened, those that had been written.

    Attributes:
        files: size in bytes and time of the last change in ns, by relative name.
    """

    path: Path
    files: dict[str, tuple[int, int]]

    @property
    def step(self) -> int:
        """The number of finished optimizer steps."""
        return _step(self.path)

    def check_unchanged(self) -> None:
        """Called behind the loading, which skips files that are not there: what was loaded is what was verified.

        Raises:
            UserError: a file has vanished or changed since the checkpoint was opened.
        """
        now = _stamps(self.path)
        changed = [name for name, stamp in self.files.items() if now.get(name) != stamp]
        if changed:
            raise UserError(f"{self.path}: {', '.join(changed[:6])} changed or vanished while it was loaded")


@dataclass(frozen=True)
class OpenRun:
    """A run folder that is this process's, or its first process's.

    Attributes:
        finished: the same run is there, done and whole.
        checkpoint: to continue from; None at the start.
        split: of the run so far: per-device batch, accumulation steps, processes.
    """

    finished: bool
    checkpoint: Checkpoint | None = None
    split: tuple[Any, Any, Any] | None = None


@contextmanager
def saving(folder: str | Path, what: str) -> Iterator[None]:
    """Around what writes into a run folder.

    Raises:
        UserError: it could not be written (disk full, no permission); what is published already is untouched.
    """
    try:
        yield
    # torch.save and safetensors report a full disk as RuntimeError and SafetensorError.
    except (OSError, RuntimeError, SafetensorError) as error:
        raise UserError(
            f"{folder}: could not save {what}: {error}. "
            "Make room or fix the permissions and run the same command again: it continues from the last checkpoint"
        ) from error


def publish_checkpoint(output_dir: Path, step: int, keep: int | None) -> None:
    """Move the checkpoint of `step` from `.saving` to its place in one rename, then drop the oldest beyond `keep`."""
    name = f"{PREFIX_CHECKPOINT_DIR}-{step}"
    aside, target = output_dir / SAVING / name, output_dir / name
    write_json(aside / COMPLETE_FILE, {name: file_sha256(aside / name) for name in _stamps(aside)})
    if target.exists():  # a damaged one that a resume has passed over
        _drop(target)
    os.replace(aside, target)
    if keep is not None and keep > 0:
        for old in _checkpoints(output_dir)[:-keep]:
            _drop(old)
    aside.parent.rmdir()


def _drop(checkpoint: Path) -> None:
    """Delete a checkpoint so that a kill leaves none of which half is gone."""
    doomed = checkpoint.parent / SAVING / f"{checkpoint.name}.old"
    os.replace(checkpoint, doomed)
    shutil.rmtree(doomed)


def _checkpoints(output_dir: Path) -> list[Path]:
    """Published checkpoints, oldest first."""
    found = [p for p in output_dir.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if p.name.rpartition("-")[2].isdecimal()]
    return sorted(found, key=_step)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def _stamps(checkpoint: Path) -> dict[str, tuple[int, int]]:
    """The files of a checkpoint less `complete.json` and hidden ones: size and time of the last change."""
    stats = {str(f.relative_to(checkpoint)): f.stat() for f in sorted(checkpoint.rglob("[!.]*")) if f.is_file()}
    return {name: (stat.st_size, stat.st_mtime_ns) for name, stat in stats.items() if name != COMPLETE_FILE}


def open_checkpoint_of(output_dir: Path) -> Checkpoint | None:
    """The newest checkpoint, every file of it hashed and compared; None if there is none yet.

    Raises:
        UserError: it is not what was written: files missing, changed or added, or its state is of another step.
    """
    found = _checkpoints(output_dir)
    if not found:
        return None
    newest = found[-1]
    remedy = "delete the folder to continue from an earlier state"
    if not (newest / COMPLETE_FILE).is_file():
        raise UserError(f"{newest}: not a complete checkpoint ({COMPLETE_FILE} is missing); {remedy}")
    recorded = read_complete(newest)
    files = _stamps(newest)
    wrong = [f"{name} is missing" for name in _needed(recorded) - recorded.keys() | recorded.keys() - files.keys()]
    wrong += [f"{name} was not written with it" for name in files.keys() - recorded.keys()]
    wrong = sorted(wrong) or [problem.removeprefix(f"{newest}/") for problem in check_files(newest, recorded)]
    if wrong:
        raise UserError(f"{newest}: damaged: {'; '.join(wrong[:6])}; {remedy}")
    state_file = newest / TRAINER_STATE_NAME
    state = read_checked(state_file, _State)
    try:
        TrainerState.load_from_json(str(state_file))
    except (TypeError, ValueError) as error:
        raise UserError(f"{state_file}: not a state of the Trainer ({error}); {remedy}") from error
    if state["global_step"] != _step(newest):
        raise UserError(f"{state_file}: global_step: {state['global_step']} in {newest.name}; {remedy}")
    return Checkpoint(newest, files)


def _needed(names: Any) -> set[str]:
    """What every checkpoint holds, and the loading would skip in silence if it were not there."""
    by_deepspeed = any(name.startswith("global_step") for name in names)
    return {ADAPTER_FILE, TRAINER_STATE_NAME} | (set() if by_deepspeed else {OPTIMIZER_NAME, SCHEDULER_NAME})


@contextmanager
def open_run(output_dir: Path, record: dict[str, Any], claims: bool = True) -> Iterator[OpenRun]:
    """Inside, the folder is this run's alone. A run without a checkpoint holds nothing: another may take its place.

    Args:
        record: first content of run.json; `record["identity"]` holds, flat, everything that decides the result, and
            `record["inputs"]` hashes of further files that do.
        claims: whether this process claims and checks the folder; of several processes those that save do, and all
            get the outcome. Collective.

    Raises:
        UserError: another process is at work there; the folder holds another run, other files, a damaged checkpoint or
            a finished run that is not whole; or it cannot be written. Where others claim it, without a message.
    """
    with ExitStack() as held:
        mine: OpenRun | UserError | None = None
        if claims:
            try:
                held.enter_context(folder_lock(output_dir))
                mine = _open(output_dir, record)
            except UserError as error:
                mine = error
            except OSError as error:
                mine = UserError(f"{output_dir}: cannot be used: {error}")
        outcomes = everyones(mine)
        if any(isinstance(outcome, UserError) for outcome in outcomes):
            raise mine if isinstance(mine, UserError) else UserError([])
        yield next(outcome for outcome in (mine, *outcomes) if isinstance(outcome, OpenRun))


def _open(output_dir: Path, record: dict[str, Any]) -> OpenRun:
    aside = output_dir / SAVING
    if aside.is_dir():  # left by a kill
        shutil.rmtree(aside)
    earlier = read_run(output_dir)
    if not earlier and not all(is_leftover(file) for file in output_dir.iterdir()):
        raise UserError(f"output_dir: {output_dir} is not empty and holds no run; choose another folder")
    finished = earlier.get("status") == "finished"
    if not finished and not _checkpoints(output_dir):  # also a run that failed before its first one
        _forget_results(output_dir)
        write_json(output_dir / RUN_FILE, {**record, "status": "running"})
        return OpenRun(finished=False)
    _check_same(output_dir, earlier, record)
    if finished:
        try:
            check_whole(output_dir)
        except UserError as error:
            remedy = f"{output_dir}: the finished run is damaged; train it anew in another folder"
            raise UserError([*error.problems, remedy]) from error
        return OpenRun(finished=True)
    checkpoint = open_checkpoint_of(output_dir)
    _forget_results(output_dir)
    config = earlier.get("config", {})
    split = (
        config.get("per_device_train_batch_size"),
        config.get("gradient_accumulation_steps"),
        earlier.get("world_size"),
    )
    return OpenRun(finished=False, checkpoint=checkpoint, split=split)


def _forget_results(output_dir: Path) -> None:
    """Delete what a final save that did not come to its end has left."""
    for name in (*ARTIFACTS, TRAINER_STATE_NAME):
        (output_dir / name).unlink(missing_ok=True)


def _check_same(output_dir: Path, earlier: dict[str, Any], record: dict[str, Any]) -> None:
    """Refuse to go on with another run, or with inputs that have changed (older versions did not record those)."""
    there, here = earlier.get("identity", {}), json.loads(json.dumps(record["identity"], default=str))
    # Fields that another version recorded and this one does not count make no difference.
    differences = [
        f"{key}: {there.get(key)} there, {value} now" for key, value in sorted(here.items()) if there.get(key) != value
    ]
    if differences:
        raise UserError(
            f"output_dir: {output_dir} holds another run ({'; '.join(differences[:6])}); choose another folder"
        )
    inputs = earlier.get("inputs", {})
    changed = [name for name, digest in record["inputs"].items() if inputs.get(name, digest) != digest]
    if changed:
        raise UserError(
            f"{output_dir}: {' and '.join(changed)} changed since the run began: put back what was there, or choose "
            "another output_dir"
        )
