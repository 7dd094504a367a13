"""Drawing the scenes of every task and split; no scene comes twice."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import TypeVar

from llava_sculpt.tiny.scenes import Scene
from llava_sculpt.tiny.sources import QA, SOURCES
from llava_sculpt.tiny.targets import Choice, coco, iconqa

# Images per split.
ICONQA_SIZES = {"train": 2000, "val": 200, "test": 400}
COCO_SIZES = {"train": 2000, "val": 200, "test": 300}
SOURCE_SIZES = {
    "okvqa": {"val": 200, "test": 300},
    "ocrvqa": {"val": 100, "test": 150},  # two questions each
    "gqa": {"val": 200, "test": 300},
    "textvqa": {"val": 200, "test": 300},
}

_Asked = TypeVar("_Asked")


@dataclass(frozen=True)
class World:
    """All samples of the tiny world by task and split: pictures with what is asked or said about them."""

    iconqa: dict[str, list[tuple[Scene, Choice]]]
    coco: dict[str, list[tuple[Scene, list[str]]]]
    sources: dict[str, dict[str, list[tuple[Scene, list[QA]]]]]


def draw_world(seed: int, seen: set[Scene] | None = None) -> World:
    """The world of one seed. All its scenes differ; they are added to `seen` and none is taken from there."""
    seen = set() if seen is None else seen
    return World(
        iconqa={s: _draw(iconqa, f"{seed}/iconqa/{s}", n, seen) for s, n in ICONQA_SIZES.items()},
        coco={s: _draw(coco, f"{seed}/coco/{s}", n, seen) for s, n in COCO_SIZES.items()},
        sources={
            name: {s: _draw(make, f"{seed}/{name}/{s}", n, seen) for s, n in SOURCE_SIZES[name].items()}
            for name, make in SOURCES.items()
        },
    )


def draw_pretraining(seed: int, counts: dict[str, int]) -> dict[str, list[tuple[Scene, list[QA]]]]:
    """`counts[task]` pictures of each Source task for pretraining, none of them in the world of this seed."""
    seen: set[Scene] = set()
    draw_world(seed, seen)
    return {name: _draw(SOURCES[name], f"{seed}/{name}/pretraining", n, seen) for name, n in counts.items()}


def _draw(
    make: Callable[[Random], tuple[Scene, _Asked]], stream: str, count: int, seen: set[Scene]
) -> list[tuple[Scene, _Asked]]:
    rng = Random(stream)
    drawn: list[tuple[Scene, _Asked]] = []
    while len(drawn) < count:
        sample = make(rng)
        if sample[0] not in seen:
            seen.add(sample[0])
            drawn.append(sample)
    return drawn
