"""The documentation site: what its hook does with links.

`make docs` builds the site, and a broken link is an error there.
"""

import runpy

import pytest
from commands import ROOT

HOOK = ROOT / "docs/site_links.py"
ADDRESS = "https://example.org/v4jax/"


@pytest.fixture(scope="module")
def rewrite():
    return runpy.run_path(str(HOOK))["rewrite"]


@pytest.mark.parametrize(
    ("link", "without", "with_address"),
    [
        ("[a](b.md#c)", "[a](b.md#c)", "[a](b.md#c)"),
        ("[a](#c)", "[a](#c)", "[a](#c)"),
        ("![a](b.png)", "![a](b.png)", "![a](b.png)"),
        ("[a](https://e.org/x.md)", "[a](https://e.org/x.md)", "[a](https://e.org/x.md)"),
        ("[a](../benchmarks/README.md#c)", "[a](performance.md#c)", "[a](performance.md#c)"),
        ("[`a`](../v4jax/b.py)", "`a`", f"[`a`]({ADDRESS}blob/main/v4jax/b.py)"),
    ],
)
def test_a_link_leads_to_a_page_the_repository_or_nowhere(rewrite, link, without, with_address):
    assert rewrite(link, "docs/x.md", "x.md", None) == without
    assert rewrite(link, "docs/x.md", "x.md", ADDRESS) == with_address


def test_links_are_read_from_where_the_file_stands(rewrite):
    """A page of api/ goes up one folder; a file outside docs/ starts from its own."""
    assert rewrite("[a](../data.md)", "docs/api/x.md", "api/x.md", None) == "[a](../data.md)"
    text = "[a](../docs/data.md), [b](train_step.py), [c](../CONTRIBUTING.md)"
    page = rewrite(text, "benchmarks/README.md", "performance.md", None)
    assert page == "[a](data.md), b, [c](contributing.md)"


def test_every_page_of_the_navigation_is_there():
    hook = runpy.run_path(str(HOOK))
    for line in (ROOT / "mkdocs.yml").read_text().partition("\nnav:")[2].splitlines():
        name = line.rpartition(" ")[2]
        if name.endswith(".md"):
            assert name in hook["PAGES"].values() or (ROOT / "docs" / name).is_file(), name
