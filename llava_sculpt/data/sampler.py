"""The order of an epoch: random, with samples of one modality and similar length grouped."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler


class ModalityLengthSampler(Sampler[int]):
    """LLaVA's order by modality and length, as a function of ``(seed, epoch)`` alone.

    ``lengths`` are ``LlavaDataset.modality_lengths``: negative for samples without an image. Samples are drawn
    into megabatches of ``batch_size * world_size``, each of one modality, in random order; the leftovers of both
    modalities come last. With ``batch_size`` = per-device batch x gradient accumulation a megabatch is one
    optimizer step, however it is split. Inside one the longest come first, so that the micro-batches of the processes
    have similar lengths.

    Unlike LLaVA's, it draws from a generator of its own (the state of torch's global one does not matter, nor
    does a resume), and does not mix the last megabatches of the two modalities when both are full.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, world_size: int, seed: int) -> None:
        """ValueError if a length is 0 or a size is below 1."""
        if batch_size < 1 or world_size < 1:
            raise ValueError(f"batch_size {batch_size} and world_size {world_size} must be at least 1")
        if not all(lengths):
            raise ValueError("a sample of length 0 has no modality")
        self.lengths = list(lengths)
        self.megabatch = batch_size * world_size
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order the next iteration gives."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator()
        # One draw of the seed's own stream per epoch, so that (seed, epoch + 1) is not (seed + 1, epoch).
        generator.manual_seed(self.seed)
        for _ in range(self.epoch + 1):
            epoch_seed = int(torch.randint(2**62, (1,), generator=generator))
        generator.manual_seed(epoch_seed)
        full: list[list[int]] = []
        rest: list[int] = []
        for sign in (1, -1):
            members = [i for i, length in enumerate(self.lengths) if length * sign > 0]
            order = [members[i] for i in torch.randperm(len(members), generator=generator).tolist()]
            whole = len(order) - len(order) % self.megabatch
            for start in range(0, whole, self.megabatch):
                full.append(self._longest_first(order[start : start + self.megabatch]))
            rest += self._longest_first(order[whole:])
        for i in torch.randperm(len(full), generator=generator).tolist():
            yield from full[i]
        yield from rest

    def _longest_first(self, indices: list[int]) -> list[int]:
        return sorted(indices, key=lambda i: abs(self.lengths[i]), reverse=True)
