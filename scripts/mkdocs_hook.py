"""What the site has beside docs/: the report, pages of the repository that docs/ links to, and a run's forgetting.html.

A link out of docs/ to one of these goes to its place in the site; to any other file of the repository it becomes the
file's name, since no address of the repository is written down here. A link to a file that does not exist stays, and
`strict` fails on it.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
REPORT = "results/tiny/report"
# Files of the repository and where they stand in the site.
PLACES = {"data/README.md": "data_sets.md", "CONTRIBUTING.md": "contributing.md", f"{REPORT}/report.md": "results.md"}
PLACES |= {f"{REPORT}/{file.name}": f"report/{file.name}" for file in (ROOT / REPORT).glob("*") if file.suffix != ".md"}
FORGETTING = "runs/tiny/iconqa/sculpt_r32_seed42/forgetting.html"
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)#\s]+)(#[^)\s]*)?\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the files of `PLACES`, and the page of forgotten answers where the tiny run has been made."""
    if (ROOT / FORGETTING).is_file():
        PLACES[FORGETTING] = "report/forgetting.html"
    for source, place in PLACES.items():
        if files.get_file_from_path(place) is None:
            files.append(File.generated(config, place, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Lead links that leave docs/ to the site's own pages; the results page links the HTML pages."""
    here = {place: source for source, place in PLACES.items()}.get(page.file.src_uri, f"docs/{page.file.src_uri}")

    def led(match: re.Match[str]) -> str:
        image, text, target, anchor = match.groups(default="")
        if "://" in target or target.startswith("mailto:"):
            return match[0]
        path = os.path.normpath(os.path.join(os.path.dirname(here), target))
        place = PLACES.get(path, path.removeprefix("docs/") if path.startswith("docs/") else "")
        if place:
            return f"{image}[{text}]({os.path.relpath(place, os.path.dirname(page.file.src_uri) or '.')}{anchor})"
        return (text if text.startswith("`") else f"{text} (`{path}`)") if (ROOT / path).exists() else match[0]

    markdown = LINK.sub(led, markdown)
    if page.file.src_uri == "results.md":
        links = "[The same as one HTML page](report/report.html)"
        if FORGETTING in PLACES:
            links += " · [what one tiny run forgot and learned](report/forgetting.html)"
        title, _, rest = markdown.partition("\n")
        markdown = f"{title}\n\n{links}\n{rest}"
    return markdown
