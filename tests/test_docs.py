"""The reference of options is what the config classes say, links lead somewhere, and the site builds."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import yaml

import varshare_rl

PROJECT = Path(varshare_rl.__file__).resolve().parent.parent
DOCS = PROJECT / "docs"


@pytest.fixture(scope="module")
def generate() -> ModuleType:
    """The script that writes the page."""
    spec = importlib.util.spec_from_file_location("generate", DOCS / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    import sys

    sys.modules["generate"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_configuration_md_is_up_to_date(generate: ModuleType) -> None:
    written = (DOCS / "configuration.md").read_text(encoding="utf-8")
    assert written == generate.page(), "renew it with python docs/generate.py"


def test_every_option_has_a_sentence(generate: ModuleType) -> None:
    rows = [line for line in generate.page().splitlines() if line.startswith("| `")]
    assert len(rows) > 150
    silent = [row for row in rows if row.split(" | ")[-1].strip(" |") == ""]
    assert silent == []


def test_links_lead_somewhere() -> None:
    pages = [*PROJECT.glob("*.md"), *DOCS.rglob("*.md"), *PROJECT.glob("experiments/**/README.md")]
    links = {
        (page, link)
        for page in pages
        for link in re.findall(
            r"\]\(([^)\s:#]+)(?=[)#])", re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)
        )
    }
    assert len(links) > 100
    assert [(str(page), link) for page, link in links if not (page.parent / link).exists()] == []


def test_every_page_is_in_the_navigation() -> None:
    text = (PROJECT / "mkdocs.yml").read_text(encoding="utf-8")
    pages = {str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md") if page.parent.name != "decisions"}
    assert pages - set(re.findall(r": (\S+\.md)$", text, re.MULTILINE)) == set()


def test_every_study_is_listed() -> None:
    listed = re.findall(
        r"^\| \[(\w+)\]\(\1/README.md\)", (PROJECT / "experiments/README.md").read_text(), re.MULTILINE
    )
    assert sorted(listed) == sorted(page.parent.name for page in PROJECT.glob("experiments/*/README.md"))


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs")
    site = tmp_path / "site"
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(site)],
        cwd=PROJECT, env={**os.environ, "PYTHONPATH": str(PROJECT), "NO_MKDOCS_2_WARNING": "true"},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    home = (site / "index.html").read_text(encoding="utf-8")
    assert 'href="method.html"' in home
    assert 'href="sharing/index.html"' in (site / "experiments/index.html").read_text(encoding="utf-8")
    assert (site / "experiments" / "sharing" / "nats.png").stat().st_size > 1000
    reference = (site / "api.html").read_text(encoding="utf-8")
    assert 'id="varshare_rl.api.Agent.predict"' in reference
    assert ":class:" not in reference


def test_the_citation_is_of_this_version() -> None:
    citation = yaml.safe_load((PROJECT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["cff-version"] == "1.2.0"
    assert citation["version"] == varshare_rl.__version__
    assert citation["license"] == "MIT"
    assert {"title", "authors", "message"} <= set(citation)


@pytest.mark.parametrize("name", ["Dockerfile", "Dockerfile.cuda"])
def test_images_are_made_of_files_that_are_there(name: str) -> None:
    """And that .dockerignore lets through."""
    let_through = {
        line[1:] for line in (PROJECT / ".dockerignore").read_text().splitlines() if line.startswith("!")
    }
    copied = re.findall(r"^COPY (?!--)(.+) \S+$", (PROJECT / name).read_text(), re.MULTILINE)
    files = {file for line in copied for file in line.split()}
    assert "varshare_rl" in files
    assert files <= let_through
    assert all((PROJECT / file).exists() for file in files)
