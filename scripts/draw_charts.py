"""Draw charts with questions, as an example of one's own data: python scripts/draw_charts.py FOLDER.

Writes FOLDER/charts.json (LLaVA's training format) and FOLDER/images/: 500 pictures made by matplotlib, each with two
questions, what kind of chart it is and what colour it has.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

from matplotlib.figure import Figure

KINDS = ("bar", "line", "pie", "scatter")
COLOURS = ("red", "green", "blue", "black")
COUNT = 500


def draw(kind: str, colour: str, rng: random.Random, file: Path) -> None:
    """One chart of random numbers."""
    figure = Figure(figsize=(2.24, 2.24), dpi=100)
    axes = figure.add_axes((0.05, 0.05, 0.9, 0.9))
    axes.axis("off")
    values = [rng.uniform(1, 5) for _ in range(rng.randint(3, 6))]
    places = range(len(values))
    if kind == "bar":
        axes.bar(places, values, color=colour)
    elif kind == "line":
        axes.plot(places, values, color=colour, linewidth=4)
    elif kind == "pie":
        axes.pie(values, colors=[colour], wedgeprops={"edgecolor": "white", "linewidth": 3})
    else:
        axes.scatter(places, values, color=colour, s=120)
    figure.savefig(file)


def main(folder: Path) -> None:
    """Write the data set."""
    rng = random.Random(0)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    records = []
    for number in range(COUNT):
        kind, colour, name = rng.choice(KINDS), rng.choice(COLOURS), f"{number:03}.png"
        draw(kind, colour, rng, folder / "images" / name)
        for asked, answer in (("What kind of chart is this?", kind), ("What colour is the chart?", colour)):
            turns = [{"from": "human", "value": f"<image>\n{asked}"}, {"from": "gpt", "value": answer}]
            records.append({"id": f"{number:03}_{answer}", "image": name, "conversations": turns})
    (folder / "charts.json").write_text(json.dumps(records, indent=1), encoding="utf-8")
    print(f"{folder / 'charts.json'}: {len(records)} records, {COUNT} pictures in {folder / 'images'}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
