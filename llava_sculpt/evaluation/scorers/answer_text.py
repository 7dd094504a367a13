"""Normalisation of short answers as the VQA evaluators do it, including what they do by accident.

Every rule here mirrors the official evaluators' observable behaviour; "fixing" one changes published scores.
"""

from __future__ import annotations

import re

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_DIGIT_COMMA_DIGIT = re.compile(r"\d,\d")
# The evaluators mean "no digit before and after", but their look-behind is mistyped as a look-ahead that is
# always true: only the digit behind the period counts ("3." loses it, "1.5" and ".5" keep it) ...
_PERIOD = re.compile(r"\.(?!\d)")
# ... and they pass a regex flag (value 32) where the number of replacements goes.
_MOST_PERIODS = 32

_NUMBERS = {word: str(n) for n, word in enumerate("zero one two three four five six seven eight nine ten".split())}
_NUMBERS["none"] = "0"
_ARTICLES = {"a", "an", "the"}

# The words whose apostrophe is restored. The evaluators list them with exactly one apostrophe left out, each
# possible one ("couldntve" with both left out is unknown to them).
_CONTRACTED = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd
he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've
needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've
somebody'll somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll
that's there'd there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've
weren't what'll what're what's what've when's where'd where's where've who'd who'd've who'll who's who've
why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're
you've
"""
_CONTRACTIONS = {
    word[:at] + word[at + 1 :]: word for word in _CONTRACTED.split() for at, sign in enumerate(word) if sign == "'"
} | {"somebody'd": "somebodyd"}  # the one entry that is the wrong way round


def flatten(text: str) -> str:
    """Line breaks and tabs become spaces; surrounding white space goes."""
    return text.replace("\n", " ").replace("\t", " ").strip()


def drop_punctuation(text: str) -> str:
    """The evaluators' punctuation step.

    A sign that touches a space anywhere in `text` is deleted, otherwise it becomes a space; if a digit,
    comma, digit occurs anywhere, all signs are deleted. Apostrophe, ":", "$", "%", "&", "#" stay. Periods:
    see `_PERIOD`.
    """
    delete_all = _DIGIT_COMMA_DIGIT.search(text) is not None
    result = text
    for sign in _PUNCTUATION:
        touches_space = f"{sign} " in text or f" {sign}" in text
        result = result.replace(sign, "" if delete_all or touches_space else " ")
    return _PERIOD.sub("", result, count=_MOST_PERIODS)


def normalise_words(text: str) -> str:
    """Lower case, number words to digits ("none" to "0"), articles out, contractions get their apostrophe."""
    words = [_NUMBERS.get(word, word) for word in text.lower().split()]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def normalise(text: str) -> str:
    """Punctuation step, then word step."""
    return normalise_words(drop_punctuation(text))
