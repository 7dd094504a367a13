"""CIDEr-D of tokenized captions (Vedantam et al., CVPR 2015), for machines without pycocoevalcap.

Agrees with pycocoevalcap's `Cider` (tested), including its choice of lengths: the length of a caption is its
number of bigrams.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

_LARGEST_N = 4
_SIGMA = 6.0
_Grams = Counter[tuple[str, ...]]


def cider_d(references: Sequence[Sequence[str]], candidates: Sequence[str]) -> list[float]:
    """CIDEr-D of every candidate, on the scale 0 .. 10 of the original definition.

    `references[i]` are the reference captions of image i and `candidates[i]` its caption, all as tokens
    joined by spaces. The document frequencies come from these references, the number of documents is the
    number of images.
    """
    grams = [[_grams(text) for text in texts] for texts in references]
    documents = Counter(gram for texts in grams for gram in set().union(*texts))
    log_images = math.log(len(references))

    def weighted(counts: _Grams) -> list[dict[tuple[str, ...], float]]:
        by_n: list[dict[tuple[str, ...], float]] = [{} for _ in range(_LARGEST_N)]
        for gram, count in counts.items():
            by_n[len(gram) - 1][gram] = count * (log_images - math.log(max(1, documents[gram])))
        return by_n

    scores = []
    for texts, candidate in zip(grams, candidates, strict=True):
        own = _grams(candidate)
        vectors = weighted(own)
        total = sum(_similarity(vectors, weighted(text), _length(own) - _length(text)) for text in texts)
        scores.append(10 * total / len(texts))
    return scores


def _grams(text: str) -> _Grams:
    words = text.split()
    return Counter(tuple(words[at : at + n]) for n in range(1, _LARGEST_N + 1) for at in range(len(words) - n + 1))


def _length(counts: _Grams) -> int:
    return sum(count for gram, count in counts.items() if len(gram) == 2)


def _similarity(
    candidate: list[dict[tuple[str, ...], float]],
    reference: list[dict[tuple[str, ...], float]],
    difference: int,
) -> float:
    """Mean over n of the clipped cosine similarity, with the Gaussian penalty on the difference in length."""
    total = 0.0
    for ours, theirs in zip(candidate, reference, strict=True):
        norms = math.hypot(*ours.values()) * math.hypot(*theirs.values())
        if norms:
            total += sum(min(v, theirs.get(g, 0.0)) * theirs.get(g, 0.0) for g, v in ours.items()) / norms
    return total / _LARGEST_N * math.exp(-(difference**2) / (2 * _SIGMA**2))
