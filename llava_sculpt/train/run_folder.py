"""A run on disk: run.json says what it is, checkpoints are complete or not there, and a folder holds one run only."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from llava_sculpt.errors import UserError
from llava_sculpt.model.files import RUN_FILE
from llava_sculpt.model.whole import read_run
from llava_sculpt.records import write_json

SAVING = ".saving"  # where a checkpoint is written before it is published
COMPLETE = "complete.json"  # written last: names and sizes of everything in the checkpoint


def publish_checkpoint(output_dir: Path, step: int, keep: int | None) -> None:
    """Move the checkpoint of `step` from `.saving` to its place in one rename, then drop the oldest beyond `keep`."""
    name = f"{PREFIX_CHECKPOINT_DIR}-{step}"
    aside, target = output_dir / SAVING / name, output_dir / name
    sizes = {str(f.relative_to(aside)): f.stat().st_size for f in sorted(aside.rglob("*")) if f.is_file()}
    write_json(aside / COMPLETE, sizes)
    if target.exists():  # a damaged one that a resume has passed over
        shutil.rmtree(target)
    os.replace(aside, target)
    aside.parent.rmdir()
    if keep is not None and keep > 0:
        for old in checkpoints(output_dir)[:-keep]:
            shutil.rmtree(old)


def checkpoints(output_dir: Path) -> list[Path]:
    """Published checkpoints, oldest first."""
    found = [p for p in output_dir.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if p.name.rpartition("-")[2].isdigit()]
    return sorted(found, key=checkpoint_step)


def checkpoint_step(checkpoint: Path) -> int:
    """The number of finished optimizer steps in a checkpoint, from its folder's name."""
    return int(checkpoint.name.rpartition("-")[2])


def last_checkpoint(output_dir: Path) -> Path | None:
    """The newest checkpoint to continue from, None if there is none yet.

    Raises:
        UserError: it was changed after it was written (files missing or of other size).
    """
    found = checkpoints(output_dir)
    if not found:
        return None
    newest = found[-1]
    marker = newest / COMPLETE
    if not marker.is_file():
        raise UserError(f"{newest}: not a complete checkpoint ({COMPLETE} is missing); delete the folder")
    expected = json.loads(marker.read_text(encoding="utf-8"))
    wrong = [n for n, size in expected.items() if not (newest / n).is_file() or (newest / n).stat().st_size != size]
    if wrong:
        raise UserError(
            f"{newest}: damaged: {', '.join(wrong)} missing or truncated since it was written; "
            "delete the folder to continue from an earlier state"
        )
    return newest


def open_run(output_dir: Path, record: dict[str, Any]) -> str:
    """Claim a folder for a run. A run without a checkpoint holds nothing: another may take its place.

    Args:
        record: first content of run.json; `record["identity"]` holds, flat, everything that decides the result.

    Returns:
        "new", "unfinished" (the same run: continue it) or "finished" (the same run, done).

    Raises:
        UserError: the folder holds another run or other files, or cannot be written.
    """
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        probe = output_dir / SAVING
        probe.mkdir(exist_ok=True)
        shutil.rmtree(probe)  # with it whatever a kill left there
    except OSError as error:
        raise UserError(f"output_dir: cannot write in {output_dir}: {error.strerror}") from error
    earlier = read_run(output_dir)
    if not earlier and any(output_dir.iterdir()):
        raise UserError(f"output_dir: {output_dir} is not empty and holds no run; choose another folder")
    finished = earlier.get("status") == "finished"
    if not finished and not checkpoints(output_dir):  # also a run that failed before its first one
        write_json(output_dir / RUN_FILE, {**record, "status": "running"})
        return "new"
    there, here = earlier.get("identity", {}), json.loads(json.dumps(record["identity"], default=str))
    # Fields that another version recorded and this one does not count make no difference.
    differences = [
        f"{key}: {there.get(key)} there, {value} now" for key, value in sorted(here.items()) if there.get(key) != value
    ]
    if differences:
        raise UserError(
            f"output_dir: {output_dir} holds another run ({'; '.join(differences[:6])}); choose another folder"
        )
    return "finished" if finished else "unfinished"
