"""CIDEr of captions: with the Penn Treebank tokenizer (Java) where it can run, else under another name.

The published number needs the Stanford PTB tokenizer that pycocoevalcap brings, hence Java. Without one of
them a small Python tokenizer is used and the metric is called "CIDEr (not PTB)": close on plain captions, not
comparable with published values.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

from llava_sculpt.errors import UserError
from llava_sculpt.evaluation.scorers.cider import cider_d
from llava_sculpt.evaluation.scorers.scorer import Gold, Pairs, Score, Scorer, Seen, match_predictions, mean
from llava_sculpt.tasks.common import load_json, records_of
from llava_sculpt.tasks.problems import Problems

# The Java tokenizer starts a new line at each of these. pycocoevalcap replaces only "\n"; any other would
# shift all later captions to the wrong image without a word.
_LINE_BREAKS = re.compile("[\n\r\x0b\x0c\u2028\u2029]")


class Captions(Scorer):
    """CIDEr-D x 100. Gold: the reference captions of an image; question ids are image ids."""

    fields = (("image_id", "caption"), ("question_id", "text"))
    right_from = None

    def read_gold(self, path: Path, problems: Problems, seen: Seen, answer_style: str) -> Gold:
        """{"images": [{"id"}], "annotations": [{"image_id", "caption"}]}, or the test split of Karpathy's file."""
        content = load_json(path, dict)
        gold: Gold = {}
        karpathy = "annotations" not in content
        for number, record in enumerate(records_of(content, "images", path)):
            where = f"image {number}"
            image_id = problems.identifier(record, "cocoid" if karpathy else "id", path, where, seen)
            captions: list[Any] = []
            if karpathy:
                split = problems.value(record, "split", str, path, where)
                sentences = problems.value(record, "sentences", list, path, where) or ()
                if split != "test":
                    continue
                for position, sentence in enumerate(sentences):
                    captions.append(problems.value(sentence, "raw", str, path, f"{where}, sentence {position}"))
            if image_id is not None:
                gold[image_id] = captions
        if karpathy and not gold:
            problems.add(path, "", "no images of split 'test'")
        for number, record in enumerate([] if karpathy else records_of(content, "annotations", path)):
            where = f"annotation {number}"
            image_id = problems.identifier(record, "image_id", path, where)
            # A reference may be empty: it is one, and the official tokenizer takes it.
            text = record.get("caption") if isinstance(record, dict) else ""
            if not isinstance(text, str):
                problems.add(path, where, "needs a text under 'caption'")
            elif image_id is not None and image_id not in gold:
                problems.add(path, where, f"image_id {image_id} is not among the images")
            elif image_id is not None:
                gold[image_id].append(text)
        return gold

    def gold_texts(self, answers: Any) -> list[str]:
        return list(answers)

    def lenient(self, gold: Gold, pairs: Pairs) -> tuple[Gold, Pairs]:
        """The official script fails without exactly one caption for each image."""
        return gold, pairs

    def score(self, gold: Gold, pairs: Pairs, variant: str, tokenizer: str | None) -> Score:
        """See `Scorer.score`; also raises RuntimeError if the Java tokenizer fails."""
        bare = [image_id for image_id, references in gold.items() if not references]
        if bare:
            raise UserError(f"{self.task}: {len(bare)} images have no reference caption, the first: {bare[0]}")
        texts = match_predictions(pairs, gold, self.task)
        obstacle = ptb_obstacle() if tokenizer is None else None
        if tokenizer == "ptb" or (tokenizer is None and obstacle is None):
            metric, note = "CIDEr", "PTB tokenizer, pycocoevalcap"
            from pycocoevalcap.cider.cider import Cider

            own = {image_id: [texts[image_id]] for image_id in gold}
            cider, scores = Cider().compute_score(ptb_tokens(gold), ptb_tokens(own))
        else:
            metric, note = "CIDEr (not PTB)", "Python tokenizer" + (f": {obstacle}" if obstacle else "")
            references = [[tokenize(text) for text in given] for given in gold.values()]
            scores = cider_d(references, [tokenize(texts[image_id]) for image_id in gold])
            cider = mean(scores)
        per_item = {image_id: 100 * float(score) for image_id, score in zip(gold, scores, strict=True)}
        return Score(100 * float(cider), len(per_item), metric, note, per_item)


def ptb_obstacle() -> str | None:
    """Why the PTB tokenizer cannot run here (one phrase), or None if it can."""
    try:
        from pycocoevalcap.tokenizer import ptbtokenizer  # noqa: F401
    except ImportError:
        return "pycocoevalcap is not installed"
    # Running it is the test: macOS has a `java` that only says that there is none.
    try:
        subprocess.run(["java", "-version"], capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "Java does not run here"
    return None


def ptb_tokens(captions: Gold) -> Gold:
    """The captions as pycocoevalcap's `PTBTokenizer.tokenize` returns them, sure that each came back at its place.

    Runs the same program on the same text; but pycocoevalcap deals the lines out without counting them.

    Raises:
        RuntimeError: Java failed, or returned another number of lines than it was given.
    """
    from pycocoevalcap.tokenizer import ptbtokenizer

    given = [_LINE_BREAKS.sub(" ", text) for texts in captions.values() for text in texts]
    with NamedTemporaryFile(suffix=".txt") as file:
        file.write("\n".join(given).encode())
        file.flush()
        jar = Path(ptbtokenizer.__file__).with_name(ptbtokenizer.STANFORD_CORENLP_3_4_1_JAR)
        program = ["edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase", file.name]
        done = subprocess.run(["java", "-cp", str(jar), *program], capture_output=True, check=False)
    lines = done.stdout.decode().split("\n")
    if done.returncode != 0 or len(lines) != len(given):
        reason = done.stderr.decode(errors="replace").strip().splitlines()[-1:]
        raise RuntimeError(
            f"the PTB tokenizer returned another number of captions than it was given: {len(lines)} of {len(given)} "
            f"(exit code {done.returncode}{''.join(f', {line}' for line in reason)})"
        )
    tokens = (" ".join(w for w in line.rstrip().split(" ") if w not in ptbtokenizer.PUNCTUATIONS) for line in lines)
    return {image_id: [next(tokens) for _ in texts] for image_id, texts in captions.items()}


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
