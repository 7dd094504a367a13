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

_FIELDS = {
    "animal": "kind place food skill",
    "food": "kind place taste maker",
    "vehicle": "kind place power driver",
    "tool": "kind place use stuff",
    "nature": "kind place time look",
}
# Icon, kind, and its further facts in the order of the kind's fields.
_TABLE = """
dog animal house meat guarding
cat animal house mice hunting
fish animal sea worms swimming
bird animal nest seeds flying
frog animal pond flies jumping
bee animal hive nectar honey
pig animal farm corn mud
cow animal field grass milk
apple food orchard sweet farmer
banana food jungle soft farmer
pizza food restaurant salty cook
cake food bakery sweet baker
grapes food vineyard juicy farmer
carrot food garden fresh gardener
car vehicle road petrol driver
bus vehicle street diesel driver
train vehicle station electricity driver
boat vehicle sea wind sailor
plane vehicle airport jets pilot
bike vehicle path pedals rider
key tool door opening metal
clock tool bedroom waking metal
book tool library reading paper
phone tool pocket calling plastic
lamp tool ceiling lighting glass
umbrella tool rain shelter cloth
scissors tool desk cutting steel
hammer tool workshop building wood
tree nature forest summer green
flower nature garden spring yellow
moon nature sky night white
cloud nature sky autumn gray
"""
FACTS: dict[str, dict[str, str]] = {
    name: dict(zip(_FIELDS[facts[0]].split(), facts, strict=True))
    for name, *facts in map(str.split, _TABLE.strip().splitlines())
}

# Words of 3 to 6 letters.
SIGN_WORDS = """
stop open exit shop cafe taxi hotel bank park zoo sale free push pull slow fast milk bread coffee tea pizza
news toys post gas ice farm school beach north south east west left gate lane
""".split()
TITLE_WORDS = """
river storm dragon winter forest secret island shadow garden silver night dream light stone bridge mirror
tower ghost magic desert ocean wolf crown flame
""".split()
AUTHORS = "smith jones brown clark lewis walker young king hill green adams baker nelson carter turner ford".split()
# Genre of a book -> the icon on its cover.
GENRES = {
    "travel": "plane", "cooking": "cake", "nature": "tree", "pets": "dog", "crime": "key", "space": "moon",
    "history": "clock", "sports": "bike",
}  # fmt: skip
