"""What the site has from outside docs/: README as its home, the examples, and results with their figures.

Links are written for the repository; here they lead to the same things on the site.
"""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath
from posixpath import normpath, relpath

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

PROJECT = Path(__file__).resolve().parent.parent
#: Pages of the repository by their place on the site.
PAGES = {
    "index.md": "README.md", "CONTRIBUTING.md": "CONTRIBUTING.md", "CHANGELOG.md": "CHANGELOG.md",
    "experiments/README.md": "experiments/README.md",
}  # fmt: skip
#: Endings of files beside a result's page that are on the site too.
FIGURES = (".png", ".csv", ".json")
LINK = re.compile(r"\[([^\]]*)\]\(([^)\s:#]+)(#[^)\s]*)?\)")
ROLE = re.compile(r":(?:func|class|meth|mod|attr):(?=<code>)|(?<=<code>)~[\w.]*\.(?=\w+</code>)")
FENCE = re.compile(r"(^```.*?^```)", re.DOTALL | re.MULTILINE)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """List every result and every decision in the navigation."""
    assert config.nav is not None
    for section in config.nav:
        for name, entries in section.items():
            if isinstance(entries, list):
                section[name] = [entry for entry in entries if is_page(*entry.values())]
        if "Results" in section:
            section["Results"] = ["experiments/README.md", *(str(path.relative_to(PROJECT)) for path in results())]
        if "Decisions" in section:
            notes = sorted((PROJECT / "docs" / "decisions").glob("0*.md"))
            section["Decisions"] = ["decisions/README.md", *(f"decisions/{path.name}" for path in notes)]
    return config


def is_page(place: str) -> bool:
    """Return False for a page of the navigation that is not written yet."""
    return place in PAGES or (PROJECT / repository_path(place)).is_file()


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add what is not in docs/."""
    for target, source in PAGES.items():
        files.append(File.generated(config, target, abs_src_path=str(PROJECT / source)))
    for path in results():
        for file in (path, *(f for f in path.parent.rglob("*") if f.suffix in FIGURES)):
            files.append(File.generated(config, str(file.relative_to(PROJECT)), abs_src_path=str(file)))
    files.append(File.generated(config, "examples/index.md", content=examples()))
    return files


def results() -> list[Path]:
    """Return the pages of results."""
    return sorted((PROJECT / "experiments").glob("*/README.md"))


def title(page: Path) -> str:
    """Return the heading of a page."""
    return page.read_text(encoding="utf-8").split("\n", 1)[0].removeprefix("# ").strip()


def examples() -> str:
    """Return a page with the example scripts."""
    parts = ["# Examples\n"]
    for path in sorted((PROJECT / "examples").glob("*.py")):
        parts.append(f"## {path.name}\n\n```python\n{path.read_text(encoding='utf-8')}```\n")
    return "\n".join(parts)


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Have links of the repository lead to places of the site; links to what is not on it become their text."""
    here, source = PurePosixPath(page.file.src_uri).parent, repository_path(page.file.src_uri).parent

    def lead(match: re.Match[str]) -> str:
        text, link, anchor = match.groups()
        target = normpath(str(source / link))
        candidates = [site_path(target) + end for end in ("", "/README.md", "/index.md")]
        found = next((name for name in candidates if files.get_file_from_path(name)), None)
        if found is not None:
            text = title(PROJECT / target) if text == target and target.endswith(".md") else text
            return f"[{text}]({relpath(found, str(here))}{anchor or ''})"
        return text if (PROJECT / target).exists() else match[0]  # mkdocs warns of what is nowhere

    if page.is_homepage:
        page.meta["hide"] = ["navigation"]
    parts = FENCE.split(markdown)
    return "".join(part if part.startswith("```") else LINK.sub(lead, part) for part in parts)


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Take the roles of docstrings (``:class:`Agent```) for plain code."""
    return ROLE.sub("", html)


def repository_path(place: str) -> PurePosixPath:
    """Return the path in the repository of a place on the site."""
    outside = place.startswith(("experiments/", "examples/"))
    return PurePosixPath(PAGES.get(place, place if outside else f"docs/{place}"))


def site_path(path: str) -> str:
    """Return the place on the site of a path in the repository."""
    path = "examples" if path.startswith("examples/") else path
    back = {source: place for place, source in PAGES.items()}
    return back.get(path, path.removeprefix("docs/"))
