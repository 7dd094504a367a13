"""Commands killed, and two at once on one folder: the quickest here, the others with `make attack`."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.attack.kills import SHARES, Kills
from tests.attack.pairs import PAIRS, Pairs
from tests.attack.stage import Stage

QUICK = ("train", "merge", "convert checkpoint", "export sparse", "edit")
SLOWEST = ("experiment", "train on two", "experiment, experiment")


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    with Stage(tmp_path_factory.mktemp("stage")) as stage:
        yield stage


@pytest.fixture(scope="module")
def kills(stage: Stage) -> Kills:
    return Kills(stage, 0)


@pytest.fixture(scope="module")
def pairs(stage: Stage) -> Pairs:
    return Pairs(stage, 0)


@pytest.mark.parametrize("at_event", [True, False], ids=["event", "moment"])
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow]) for name in SHARES]
)
def test_killed(kills: Kills, name: str, at_event: bool) -> None:
    for number in range(1 if name in (*QUICK, *SLOWEST) else 3):
        what, problems = kills.kill(name, number, at_event)
        assert not problems, "\n".join([what, *problems])


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in ("merge, merge", "edit, edit") else [pytest.mark.slow])
        for name in PAIRS
        if name not in SLOWEST
    ],
)
def test_two_at_once(pairs: Pairs, name: str) -> None:
    what, problems = pairs.start(name, 0)
    assert not problems, "\n".join([what, *problems])
