"""One evaluation by several processes, one per GPU: starting them, and who answers which question."""

from __future__ import annotations

import heapq
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.multiprocessing import ProcessExitedException, start_processes

from llava_sculpt.errors import UserError

T = TypeVar("T")
# The first process to finish waits for the last one, which may have hours to go.
_PATIENCE = timedelta(days=7)
# Questions about one image share its cache, so they stay together; but not so many that processes go idle.
_TOGETHER = 32


def started() -> bool:
    """Whether a launcher (torchrun, or `launch`) started this process as one of several."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def gpu_count() -> int:
    """Processes that evaluate by default: one for each visible GPU, one on a CPU."""
    return max(1, torch.cuda.device_count()) if torch.cuda.is_available() else 1


def rank() -> int:
    """Number of this process, 0 where there is one."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


@contextmanager
def process_group() -> Iterator[None]:
    """Join the other processes if a launcher started this one, with its own GPU where there are GPUs.

    Only small messages are exchanged, so it is gloo on GPUs as well.
    """
    if not started():
        yield
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group("gloo", timeout=_PATIENCE)
    try:
        yield
    finally:
        dist.destroy_process_group()


def from_first(make: Callable[[], T]) -> T:
    """What `make` returns in the first process, in all of them; the others wait for it.

    Raises:
        UserError: another process ended with an error.
    """
    if world_size() == 1:
        return make()
    box: list[Any] = [make() if rank() == 0 else None]
    try:
        dist.barrier()
        dist.broadcast_object_list(box)
    except RuntimeError as error:
        raise UserError("another process of this evaluation has ended: its message says why") from error
    return box[0]


def launch(processes: int, main: Callable[[list[str]], int], arguments: list[str]) -> int:
    """Run `main(arguments)` in that many processes; returns 0, or the exit code of the first that failed.

    Each gets a GPU; without any, they share the CPU cores. When one fails the others are ended.

    Raises:
        UserError: fewer GPUs than processes.
    """
    gpus = torch.cuda.device_count()
    if torch.cuda.is_available() and processes > gpus:
        raise UserError(f"--gpus {processes}: only {gpus} are visible")
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    try:
        start_processes(_child, (processes, store.port, main, arguments), nprocs=processes, start_method="spawn")
    except ProcessExitedException as error:
        return error.exit_code
    return 0


def _child(number: int, processes: int, port: int, main: Callable[[list[str]], int], arguments: list[str]) -> None:
    os.environ |= {
        "RANK": str(number),
        "LOCAL_RANK": str(number),
        "WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # the parent holds the store, as torchrun's agent does
    }
    if not torch.cuda.is_available() and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // processes))
    code = main(arguments)
    if code != 0:
        raise SystemExit(code)


def share_out(lengths: Sequence[int], images: Sequence[str | None], image_tokens: int, shares: int) -> list[list[int]]:
    """Places of the questions each of `shares` processes answers: every place once, nearly equal numbers of tokens.

    Args:
        lengths: tokens of each question's prompt, without its image.
        images: the image of each question.
        image_tokens: tokens an image takes, counted once for all questions about it that stay together.
    """
    groups: list[list[int]] = []
    open_group: dict[str, list[int]] = {}
    for place, image in enumerate(images):
        group = open_group.get(image) if image is not None else None
        if group is None or len(group) == _TOGETHER:
            group = []
            groups.append(group)
            if image is not None:
                open_group[image] = group
        group.append(place)
    costs = [
        sum(lengths[place] for place in group) + (image_tokens if images[group[0]] is not None else 0)
        for group in groups
    ]
    result: list[list[int]] = [[] for _ in range(shares)]
    # The most expensive first, each to the share that has least.
    loads = [(0, share) for share in range(shares)]
    for number in sorted(range(len(groups)), key=lambda number: -costs[number]):
        load, share = heapq.heappop(loads)
        result[share] += groups[number]
        heapq.heappush(loads, (load + costs[number], share))
    return result
