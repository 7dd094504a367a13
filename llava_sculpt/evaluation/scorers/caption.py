"""CIDEr of captions: with the Penn Treebank tokenizer (Java) where it can run, else under another name.

The published number needs the Stanford PTB tokenizer that pycocoevalcap brings, hence Java. Without one of
them a small Python tokenizer is used and the metric is called "CIDEr (not PTB)": close on plain captions, not
comparable with published values.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from llava_sculpt.errors import UserError
from llava_sculpt.evaluation.scorers.cider import cider_d
from llava_sculpt.evaluation.scorers.score import QuestionId, Score, match_predictions, mean

# The Java tokenizer starts a new line at each of these. pycocoevalcap replaces only "\n"; any other would
# shift all later captions to the wrong image without a word.
_LINE_BREAKS = re.compile("[\n\r\x0b\x0c\u2028\u2029]")
_SENTINEL = "endofcaptions"


def score_captions(
    gold: dict[str, Any], predictions: Iterable[tuple[QuestionId, str]], tokenizer: str | None = None
) -> Score:
    """CIDEr-D x 100 over the images of `gold` {"images": [{"id"}], "annotations": [{"image_id", "caption"}]}.

    Question ids are image ids. `tokenizer` "ptb" or "python"; None takes "ptb" if it can run here (`ptb_obstacle`).
    Raises UserError on missing, duplicate or unknown ids, or an image without a reference, and RuntimeError if the
    Java tokenizer fails.
    """
    references: dict[QuestionId, list[str]] = {image["id"]: [] for image in gold["images"]}
    for annotation in gold["annotations"]:
        references.setdefault(annotation["image_id"], []).append(annotation["caption"])
    bare = [image_id for image_id, given in references.items() if not given]
    if bare:
        raise UserError(f"coco: {len(bare)} images have no reference caption, the first: {bare[0]}")
    texts = match_predictions(predictions, references, "coco")
    obstacle = ptb_obstacle() if tokenizer is None else None
    if tokenizer == "ptb" or (tokenizer is None and obstacle is None):
        metric, variant = "CIDEr", "PTB tokenizer, pycocoevalcap"
        cider, scores = _pycocoevalcap_scores(references, texts)
    else:
        metric, variant = "CIDEr (not PTB)", "Python tokenizer" + (f": {obstacle}" if obstacle else "")
        scores = cider_d(
            [[tokenize(text) for text in given] for given in references.values()],
            [tokenize(texts[image_id]) for image_id in references],
        )
        cider = mean(scores)
    per_item = {image_id: 100 * score for image_id, score in zip(references, scores, strict=True)}
    return Score(100 * cider, len(per_item), metric, variant, per_item)


def ptb_obstacle() -> str | None:
    """Why the PTB tokenizer cannot run here (one phrase), or None if it can."""
    try:
        from pycocoevalcap.tokenizer import ptbtokenizer
    except ImportError:
        return "pycocoevalcap is not installed"
    # Running it is the test: macOS has a `java` that only says that there is none.
    try:
        subprocess.run(["java", "-version"], capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "Java does not run here"
    if not os.access(Path(ptbtokenizer.__file__).parent, os.W_OK):  # it writes its temporary files beside itself
        return "pycocoevalcap's folder is not writable"
    return None


def _pycocoevalcap_scores(
    references: dict[QuestionId, list[str]], texts: dict[QuestionId, str]
) -> tuple[float, list[float]]:
    from pycocoevalcap.cider.cider import Cider

    gold_tokens = _ptb_tokens(references)
    own_tokens = _ptb_tokens({image_id: [texts[image_id]] for image_id in references})
    cider, scores = Cider().compute_score(gold_tokens, own_tokens)
    return float(cider), [float(score) for score in scores]


def _ptb_tokens(captions: dict[QuestionId, list[str]]) -> dict[QuestionId, list[str]]:
    """Tokenize by the Java tool, sure that every caption came back at its place."""
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    asked: dict[QuestionId, list[dict[str, str]]] = {
        image_id: [{"caption": _LINE_BREAKS.sub(" ", text)} for text in given] for image_id, given in captions.items()
    }
    asked[_SENTINEL] = [{"caption": _SENTINEL}]
    tokens: dict[QuestionId, list[str]] = PTBTokenizer().tokenize(asked)
    # The last line is known: any line too many or too few before it moves it.
    if tokens.pop(_SENTINEL, None) != [_SENTINEL] or any(len(tokens[i]) != len(captions[i]) for i in captions):
        raise RuntimeError("the PTB tokenizer returned another number of captions than it was given")
    return tokens


_TOKEN = re.compile(
    r"""\d+(?:[.,:/]\d+)*      # numbers with inner signs: 1,000  3.5  10:30
    |   \w+?(?=n't\b)|n't\b    # do n't
    |   '(?:s|m|d|ll|re|ve)\b  # it 's, they 've
    |   \w+(?:[-&.]\w+)*       # words, also with hyphens: t-shirt
    |   [^\w\s]                # any other sign, one by one""",
    re.VERBOSE,
)
# What pycocoevalcap drops after PTB, plus the plain signs that PTB would have renamed to one of those.
_DROPPED = set("“”‘’'`.?!,:-;\"(){}[]")


def tokenize(caption: str) -> str:
    """A small stand-in for the PTB tokenizer: lower case, contractions split, punctuation dropped."""
    return " ".join(token for token in _TOKEN.findall(caption.lower()) if token not in _DROPPED)
