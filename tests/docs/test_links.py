"""Links of README and docs lead somewhere: files exist, and so do headings."""

import re

import pytest
from support.pages import FOLDER, PAGES, ROOT

LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
FENCED = re.compile(r"^ *```.*?^ *```$", re.MULTILINE | re.DOTALL)


def links(page):
    return LINK.findall(FENCED.sub("", page.read_text(encoding="utf-8")))


def anchors(page):
    """Ids of a page: of its headings, as mkdocs makes them, and of the objects that it documents."""
    text = page.read_text(encoding="utf-8")
    objects = set(re.findall(r"^::: (\S+)$", text, re.MULTILINE))
    headings = re.findall(r"^#+ (.+)$", FENCED.sub("", text), re.MULTILINE)
    slugs = {
        re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", heading.replace("`", "")).strip().lower())
        for heading in headings
    }
    return slugs | objects


@pytest.mark.parametrize(
    "page", [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"], ids=lambda page: str(page.relative_to(ROOT))
)
def test_links_lead_to_files_and_headings_that_exist(page):
    for link in links(page):
        if re.match(r"https?://", link):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), f"{page.name}: {link}"
        assert not anchor or anchor in anchors(target), f"{page.name}: {link} has no such heading"
        if page.parent == FOLDER:
            assert FOLDER in [target, *target.parents], f"{page.name}: {link} leaves the site"


def test_every_page_can_be_reached_from_the_readme():
    linked = {(ROOT / link.partition("#")[0]).resolve() for link in links(ROOT / "README.md")}
    assert set(FOLDER.glob("*.md")) - linked == {FOLDER / "index.md"}
