"""What the tiny world knows: facts about the icons, and the words that can be written on signs and covers."""

from __future__ import annotations

# Question (the OKVQA-like task asks it in one of these forms) per kind of fact.
FACT_QUESTIONS: dict[str, tuple[str, ...]] = {
    "kind": ("What kind of thing is this?", "Which group does this belong to?"),
    "place": ("Where is this usually found?", "Where would you look for this?"),
    "food": ("What does this animal eat?",),
    "skill": ("What is this animal known for?",),
    "taste": ("How does this taste?",),
    "maker": ("Who makes or grows this?",),
    "power": ("What makes this move?",),
    "driver": ("Who steers this?",),
    "use": ("What is this used for?", "What do people do with this?"),
    "stuff": ("What is this made of?",),
    "time": ("When is this seen most?",),
    "look": ("What color is this usually?",),
}

_ANIMAL, _FOOD = ("kind", "place", "food", "skill"), ("kind", "place", "taste", "maker")
_VEHICLE, _TOOL, _NATURE = ("kind", "place", "power", "driver"), ("kind", "place", "use", "stuff"), (
    "kind", "place", "time", "look",
)  # fmt: skip


def _facts(names: tuple[str, ...], values: str) -> dict[str, str]:
    return dict(zip(names, values.split(), strict=True))


FACTS: dict[str, dict[str, str]] = {
    "dog": _facts(_ANIMAL, "animal house meat guarding"),
    "cat": _facts(_ANIMAL, "animal house mice hunting"),
    "fish": _facts(_ANIMAL, "animal sea worms swimming"),
    "bird": _facts(_ANIMAL, "animal nest seeds flying"),
    "frog": _facts(_ANIMAL, "animal pond flies jumping"),
    "bee": _facts(_ANIMAL, "animal hive nectar honey"),
    "pig": _facts(_ANIMAL, "animal farm corn mud"),
    "cow": _facts(_ANIMAL, "animal field grass milk"),
    "apple": _facts(_FOOD, "food orchard sweet farmer"),
    "banana": _facts(_FOOD, "food jungle soft farmer"),
    "pizza": _facts(_FOOD, "food restaurant salty cook"),
    "cake": _facts(_FOOD, "food bakery sweet baker"),
    "grapes": _facts(_FOOD, "food vineyard juicy farmer"),
    "carrot": _facts(_FOOD, "food garden fresh gardener"),
    "car": _facts(_VEHICLE, "vehicle road petrol driver"),
    "bus": _facts(_VEHICLE, "vehicle street diesel driver"),
    "train": _facts(_VEHICLE, "vehicle station electricity driver"),
    "boat": _facts(_VEHICLE, "vehicle sea wind sailor"),
    "plane": _facts(_VEHICLE, "vehicle airport jets pilot"),
    "bike": _facts(_VEHICLE, "vehicle path pedals rider"),
    "key": _facts(_TOOL, "tool door opening metal"),
    "clock": _facts(_TOOL, "tool bedroom waking metal"),
    "book": _facts(_TOOL, "tool library reading paper"),
    "phone": _facts(_TOOL, "tool pocket calling plastic"),
    "lamp": _facts(_TOOL, "tool ceiling lighting glass"),
    "umbrella": _facts(_TOOL, "tool rain shelter cloth"),
    "scissors": _facts(_TOOL, "tool desk cutting steel"),
    "hammer": _facts(_TOOL, "tool workshop building wood"),
    "tree": _facts(_NATURE, "nature forest summer green"),
    "flower": _facts(_NATURE, "nature garden spring yellow"),
    "moon": _facts(_NATURE, "nature sky night white"),
    "cloud": _facts(_NATURE, "nature sky autumn gray"),
}

# Words of 3 to 6 letters.
SIGN_WORDS = [
    "stop",
    "open",
    "exit",
    "shop",
    "cafe",
    "taxi",
    "hotel",
    "bank",
    "park",
    "zoo",
    "sale",
    "free",
    "push",
    "pull",
    "slow",
    "fast",
    "milk",
    "bread",
    "coffee",
    "tea",
    "pizza",
    "news",
    "toys",
    "post",
    "gas",
    "ice",
    "farm",
    "school",
    "beach",
    "north",
    "south",
    "east",
    "west",
    "left",
    "gate",
    "lane",
]
TITLE_WORDS = [
    "river",
    "storm",
    "dragon",
    "winter",
    "forest",
    "secret",
    "island",
    "shadow",
    "garden",
    "silver",
    "night",
    "dream",
    "light",
    "stone",
    "bridge",
    "mirror",
    "tower",
    "ghost",
    "magic",
    "desert",
    "ocean",
    "wolf",
    "crown",
    "flame",
]
AUTHORS = [
    "smith",
    "jones",
    "brown",
    "clark",
    "lewis",
    "walker",
    "young",
    "king",
    "hill",
    "green",
    "adams",
    "baker",
    "nelson",
    "carter",
    "turner",
    "ford",
]
# Genre of a book -> the icon on its cover.
GENRES = {
    "travel": "plane", "cooking": "cake", "nature": "tree", "pets": "dog", "crime": "key", "space": "moon",
    "history": "clock", "sports": "bike",
}  # fmt: skip
