"""Every relative link of every Markdown page leads to a file, and every anchor to a heading."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = sorted({*ROOT.glob("*.md"), *(page for top in ("docs", "examples") for page in ROOT.glob(f"{top}/**/*.md"))})

FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
CODE = re.compile(r"`[^`]*`")
LINK = re.compile(r"\]\(([^()\s]+)\)")
HEADING = re.compile(r"^#{1,6} +(.*?) *$", re.MULTILINE)


def links(text: str) -> list[str]:
    """The targets of all inline links and images, those inside code left out."""
    return LINK.findall(CODE.sub("", FENCE.sub("", text)))


def anchors(text: str) -> set[str]:
    """The anchors that headings get: lower case, spaces to hyphens, other punctuation dropped, repeats numbered."""
    seen: Counter[str] = Counter()
    found = set()
    for heading in HEADING.findall(FENCE.sub("", text)):
        words = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading)
        anchor = re.sub(r"[^\w\- ]", "", words.lower()).replace(" ", "-")
        found.add(f"{anchor}-{seen[anchor]}" if seen[anchor] else anchor)
        seen[anchor] += 1
    return found


def broken(page: Path) -> list[str]:
    """The links of a page that lead nowhere; addresses of other sites are not followed."""
    wrong = []
    for target in links(page.read_text()):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        path = page.parent / name if name else page
        if not path.exists():
            wrong.append(f"{target}: no such file")
        elif anchor and (path.suffix != ".md" or anchor not in anchors(path.read_text())):
            wrong.append(f"{target}: no such heading")
    return wrong


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_of_a_page_leads_to_a_file_and_a_heading(page: Path) -> None:
    assert broken(page) == []


def test_the_pages_of_the_repository_are_found_and_have_links() -> None:
    names = {str(page.relative_to(ROOT)) for page in PAGES}
    assert {"README.md", "docs/glossary.md", "docs/commands/README.md", "docs/study/README.md"} <= names
    assert sum(len(links(page.read_text())) for page in PAGES) > 100


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("[x](missing.md)", ["missing.md: no such file"]),
        ("# A Title: 1\n\n[x](#a-title-1) [y](#a-title)", ["#a-title: no such heading"]),
        ("## Same\n\n## Same\n\n[x](#same-1) [y](#same-2)", ["#same-2: no such heading"]),
        ("```text\n# not a heading\n[x](missing.md)\n```\n\n`[y](missing.md)` [z](#not-a-heading)", ["#not-a-heading"]),
        ("[x](https://example.com/missing) [y](page.md#a_b)\n\n# a_b", []),
    ],
)
def test_a_link_that_leads_nowhere_is_named(text: str, wrong: list[str], tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(text)
    found = broken(page)
    assert len(found) == len(wrong)
    assert all(each.startswith(start) for each, start in zip(found, wrong, strict=True))


def test_the_glossary_names_every_term_once() -> None:
    text = (ROOT / "docs" / "glossary.md").read_text()
    terms = [
        term.strip().lower()
        for terms in re.findall(r"^- \*\*(.+?)\*\*:", text, re.MULTILINE)
        for term in terms.split(",")
    ]
    assert len(terms) > 50
    assert [term for term, count in Counter(terms).items() if count > 1] == []
