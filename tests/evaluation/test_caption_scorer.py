"""CIDEr: the own CIDEr-D against a plain reference and pycocoevalcap, and both tokenizer paths."""

from __future__ import annotations

import math
import random
import sys
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llava_sculpt.errors import UserError
from llava_sculpt.evaluation.scorers import caption, scorer_of
from llava_sculpt.evaluation.scorers.caption import ptb_tokens, tokenize
from llava_sculpt.evaluation.scorers.cider import cider_d
from llava_sculpt.evaluation.scorers.scorer import Pairs, Score

needs_ptb = pytest.mark.skipif(
    caption.ptb_obstacle() is not None, reason=f"needs the PTB tokenizer: {caption.ptb_obstacle()}"
)


def reference_cider_d(references: list[list[str]], candidates: list[str]) -> list[float]:
    """The definition with dense float64 vectors over all n-grams, slow and plain."""

    def counts(text: str, n: int) -> Counter:
        words = text.split()
        return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))

    scores = []
    for image, candidate in enumerate(candidates):
        per_n = []
        for n in range(1, 5):
            grams = sorted({g for texts in [*references, candidates] for t in texts for g in counts(t, n)})
            documents = np.array([sum(any(g in counts(t, n) for t in texts) for texts in references) for g in grams])
            idf = np.log(len(references)) - np.log(np.maximum(documents, 1))
            vector = np.array([counts(candidate, n)[g] for g in grams]) * idf
            values = []
            for text in references[image]:
                other = np.array([counts(text, n)[g] for g in grams]) * idf
                norm = np.linalg.norm(vector) * np.linalg.norm(other)
                cosine = np.minimum(vector, other) @ other / norm if norm > 0 else 0.0
                gap = max(len(candidate.split()) - 1, 0) - max(len(text.split()) - 1, 0)
                values.append(cosine * math.exp(-(gap**2) / 72))
            per_n.append(sum(values) / len(values))
        scores.append(10 * sum(per_n) / 4)
    return scores


def score_captions(references: list[list[str]], pairs: Pairs, tokenizer: str | None = None) -> Score:
    return scorer_of("coco").score(dict(enumerate(references)), pairs, "authors", tokenizer)


captions = st.lists(st.sampled_from("a cat dog sits on the mat".split()), max_size=7).map(" ".join)
worlds = st.integers(1, 5).flatmap(
    lambda n: st.tuples(
        st.lists(st.lists(captions, min_size=1, max_size=3), min_size=n, max_size=n),
        st.lists(captions, min_size=n, max_size=n),
    )
)


@settings(max_examples=50, deadline=None)
@given(worlds)
def test_cider_d_is_its_definition(world):
    references, candidates = world
    assert cider_d(references, candidates) == pytest.approx(reference_cider_d(references, candidates), abs=1e-9)


def test_cider_d_equals_pycocoevalcap():
    cider = pytest.importorskip("pycocoevalcap.cider.cider", reason="needs pycocoevalcap (make setup-dev)")
    rng = random.Random(0)
    for vocabulary in (2, 5, 30):
        references = [[random_caption(rng, vocabulary) for _ in range(rng.randint(1, 5))] for _ in range(20)]
        candidates = [random_caption(rng, vocabulary) for _ in range(20)]
        asked = {i: [text] for i, text in enumerate(candidates)}
        _, expected = cider.Cider().compute_score(dict(enumerate(references)), asked)
        assert cider_d(references, candidates) == pytest.approx(list(expected), abs=1e-12)


def random_caption(rng: random.Random, vocabulary: int) -> str:
    return " ".join(f"w{rng.randrange(vocabulary)}" for _ in range(rng.choice([0, 1, 2, 5, 12])))


def test_repeating_the_only_reference_scores_1000_and_foreign_words_0():
    references = [["a red bus on the road"], ["two dogs sleep in sun"], ["one blue kite flies high"]]
    assert cider_d(references, [texts[0] for texts in references]) == pytest.approx([10, 10, 10])
    assert cider_d(references, ["x y z"] * 3) == [0, 0, 0]


def test_a_single_image_scores_0_because_every_word_is_in_every_document():
    assert cider_d([["a b c d"]], ["a b c d"]) == [0]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A cat, a dog.", "a cat a dog"),
        ("It's the dog's T-shirt!", "it 's the dog 's t-shirt"),
        ("They don't know", "they do n't know"),
        ("1,000 people at 10:30", "1,000 people at 10:30"),
        ('a "stop" sign (red)', "a stop sign red"),
        (" ", ""),
    ],
)
def test_python_tokenizer(text, expected):
    assert tokenize(text) == expected


def test_without_java_the_metric_has_another_name(monkeypatch):
    monkeypatch.setenv("PATH", "")
    pytest.importorskip("pycocoevalcap", reason="needs pycocoevalcap (make setup-dev)")
    gold = [["a red bus"], ["two dogs sleep"]]
    score = score_captions(gold, [(0, "A red bus."), (1, "a cat")])
    assert score.metric == "CIDEr (not PTB)"
    assert "Java does not run" in score.variant
    assert score.n == 2
    assert score.per_item[0] > score.per_item[1]


def test_a_java_that_only_fails_counts_as_none(monkeypatch, tmp_path):
    pytest.importorskip("pycocoevalcap", reason="needs pycocoevalcap (make setup-dev)")
    (tmp_path / "java").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "java").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert caption.ptb_obstacle() == "Java does not run here"


def test_without_pycocoevalcap_the_own_cider_d_is_used(monkeypatch):
    monkeypatch.setitem(sys.modules, "pycocoevalcap", None)
    monkeypatch.setitem(sys.modules, "pycocoevalcap.tokenizer", None)
    score = score_captions([["a red bus"], ["two dogs sleep"]], [(0, "A red bus."), (1, "a cat")])
    assert score.metric == "CIDEr (not PTB)"
    assert "not installed" in score.variant


def test_an_image_without_a_reference_is_refused():
    with pytest.raises(UserError, match="no reference caption"):
        score_captions([[]], [(0, "a")])


def test_ids_must_fit():
    gold = [["a"], ["b"]]
    with pytest.raises(UserError):
        score_captions(gold, [(0, "a")])
    with pytest.raises(UserError):
        score_captions(gold, [(0, "a"), (1, "b"), (1, "c")])


@needs_ptb
def test_ptb_line_breaks_inside_captions_shift_nothing():
    references = [["a red bus", "the bus is red"], ["two dogs sleep"], ["one kite flies"], ["three boats on a lake"]]
    plain = ["a red bus", "two dogs sleep", "one kite", ""]
    score = score_captions(references, list(enumerate(plain)))
    assert score.metric == "CIDEr"
    breaks = "\n\r\x0b\x0c\u2028\u2029"
    broken = [plain[0].replace(" ", breaks), *plain[1:]]
    assert score_captions(references, list(enumerate(broken))).per_item == pytest.approx(score.per_item)
    by_python = score_captions(references, list(enumerate(plain)), tokenizer="python")
    assert by_python.score == pytest.approx(score.score)  # plain captions: both tokenizers agree


@needs_ptb
def test_ptb_output_that_lost_its_place_is_noticed(monkeypatch):
    monkeypatch.setattr(caption, "_LINE_BREAKS", caption.re.compile("\n"))
    with pytest.raises(RuntimeError, match="number of captions"):
        score_captions([["a red\u2028bus"], ["two dogs"]], [(0, "x"), (1, "y")])


@needs_ptb
def test_ptb_tokens_are_the_official_ones_to_the_last_sign():
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    captions = {
        1: ["A dog. :)", "", "a  man's hat"],
        7: ["so (happy) ;-)"],
        3: ["two\nlines"],
        4: [" "],
        5: ["ends :)"],
    }
    for last in ("ends :)", "http://x.y", "", " "):
        captions[5] = [last]
        official = PTBTokenizer().tokenize({i: [{"caption": text} for text in texts] for i, texts in captions.items()})
        assert ptb_tokens(captions) == official
