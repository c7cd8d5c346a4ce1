"""The documentation is true where a script can tell: links, code, the README's example, the API page."""

import ast
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SRC = ROOT / "src" / "flash_moe_mlx"
PAGES = sorted(p for p in [*ROOT.glob("*.md"), *ROOT.glob("[!.]*/**/*.md")] if "node_modules" not in p.parts)
LINK = re.compile(r"\[[^\]]+\]\(([^)\s]+)\)")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def anchors(page: str) -> set[str]:
    """GitHub's anchors of a page's headings."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def broken_links(page: Path) -> list[str]:
    """Relative links of a page that lead nowhere."""
    broken = []
    for link in LINK.findall(FENCE.sub("", page.read_text())):
        if "://" in link or link.startswith("mailto:"):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in anchors(target.read_text())):
            broken.append(link)
    return broken


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path):
    assert broken_links(page) == []


def test_link_check_finds_faults(tmp_path: Path):
    page = tmp_path / "page.md"
    page.write_text("# A heading\n[x](page.md#a-heading) [y](page.md#none) [z](gone.md) [w](https://example.org)")
    assert broken_links(page) == ["page.md#none", "gone.md"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_python_examples_parse(page: Path):
    for language, code in FENCE.findall(page.read_text()):
        if language == "python" and not re.match(r"\w+\(.*\) ->", code, re.DOTALL):
            ast.parse(code)


def test_readme_example_prints_what_the_readme_says():
    """Its Python block, run in the repository's root as it stands there, against the text block below it."""
    (_, code), (_, output) = [f for f in FENCE.findall((ROOT / "README.md").read_text()) if f[0] in ("python", "text")][
        :2
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == output.strip()


@pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="signatures print differently in each Python")
def test_api_page_is_current():
    spec = importlib.util.spec_from_file_location("generate_api", ROOT / "docs" / "generate_api.py")
    generate_api = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate_api)
    assert generate_api.API.read_text() == generate_api.render(), "docstrings have changed: run make docs"


def test_architecture_page_lists_the_wings_in_order():
    spec = importlib.util.spec_from_file_location("test_architecture", ROOT / "tests" / "test_architecture.py")
    architecture = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(architecture)
    section = (ROOT / "docs" / "architecture.md").read_text().partition("## The wings")[2].partition("\n## ")[0]
    cells = re.findall(r"^\| ((?:`\w+/?`(?:, )?)+) \|", section, re.MULTILINE)
    listed = re.findall(r"`(\w+)/?`", " ".join(cells))
    exist = {
        path.stem if path.is_file() else path.name
        for path in [*SRC.glob("[!_]*.py"), *(init.parent for init in SRC.glob("*/__init__.py"))]
    }
    assert listed == architecture.WINGS
    assert set(listed) == exist


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path: Path):
    pytest.importorskip("mkdocs", reason="needs mkdocs-material: pip install 'flash_moe_mlx[docs]'")
    pytest.importorskip("mkdocstrings", reason="needs mkdocstrings")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    pages = {path.stem for path in (ROOT / "docs").glob("*.md")} - {"index"}
    assert {path.parent.name for path in (tmp_path / "site").glob("*/index.html")} == pages, (
        "a page is not in mkdocs.yml"
    )
