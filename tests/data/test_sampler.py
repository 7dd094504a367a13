"""The order of samples, as properties over random sets of lengths."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llava_sculpt.data.sampler import ModalityLengthSampler

lengths_lists = st.lists(st.integers(-300, 300).filter(bool), min_size=1, max_size=120)
sizes = st.integers(1, 9)
seeds = st.integers(0, 2**31)


def order(lengths: list[int], batch_size: int, world_size: int, seed: int, epoch: int = 0) -> list[int]:
    sampler = ModalityLengthSampler(lengths, batch_size, world_size, seed)
    sampler.set_epoch(epoch)
    return list(sampler)


@given(lengths_lists, sizes, sizes, seeds, st.integers(0, 5))
def test_every_epoch_visits_every_sample_once(
    lengths: list[int], batch_size: int, world_size: int, seed: int, epoch: int
) -> None:
    assert sorted(order(lengths, batch_size, world_size, seed, epoch)) == list(range(len(lengths)))
    assert len(ModalityLengthSampler(lengths, batch_size, world_size, seed)) == len(lengths)


@given(lengths_lists, sizes, sizes, seeds)
def test_steps_have_one_modality_except_for_the_leftovers(
    lengths: list[int], batch_size: int, world_size: int, seed: int
) -> None:
    visited = [lengths[i] for i in order(lengths, batch_size, world_size, seed)]
    step = batch_size * world_size
    pure = sum(length > 0 for length in lengths) // step + sum(length < 0 for length in lengths) // step
    for start in range(0, pure * step, step):
        megabatch = visited[start : start + step]
        assert len({length > 0 for length in megabatch}) == 1
        assert [abs(length) for length in megabatch] == sorted(map(abs, megabatch), reverse=True)
    leftovers = [length > 0 for length in visited[pure * step :]]
    assert leftovers == sorted(leftovers, reverse=True)  # images first: the modalities meet in one place only


@given(lengths_lists, st.integers(1, 4), st.integers(1, 4), seeds)
def test_the_split_of_a_step_does_not_change_the_order(
    lengths: list[int], batch_size: int, world_size: int, seed: int
) -> None:
    assert order(lengths, batch_size, world_size, seed) == order(lengths, batch_size * world_size, 1, seed)


@given(lengths_lists, seeds, st.integers(0, 3))
def test_a_resumed_run_sees_the_same_order(lengths: list[int], seed: int, epoch: int) -> None:
    running = ModalityLengthSampler(lengths, 2, 2, seed)
    for earlier in range(epoch):
        running.set_epoch(earlier)
        list(running)
    torch.manual_seed(seed % 1000)  # the global generator plays no part
    running.set_epoch(epoch)
    assert list(running) == order(lengths, 2, 2, seed, epoch)


def test_epochs_and_seeds_differ() -> None:
    lengths = list(range(1, 101))
    orders = [order(lengths, 4, 1, seed, epoch) for seed in range(4) for epoch in range(4)]
    assert len({tuple(o) for o in orders}) == 16


def test_each_place_in_the_epoch_is_equally_likely() -> None:
    lengths = [5] * 6
    first = [order(lengths, 2, 1, seed)[0] for seed in range(600)]
    assert all(60 < first.count(i) < 145 for i in range(6))


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="length 0"):
        ModalityLengthSampler([3, 0], 1, 1, 0)
    with pytest.raises(ValueError, match="at least 1"):
        ModalityLengthSampler([3], 0, 1, 0)
