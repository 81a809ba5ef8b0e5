"""Makes the pages, written for a reader of the repository, lead to the right places on the site.

A link that leaves docs/ becomes one to a page, for the files of PAGES; otherwise one to the
repository, if mkdocs.yml has its repo_url; otherwise the text of the link alone. mkdocs calls the
functions below by their names (`hooks` in mkdocs.yml).
"""

import pathlib
import posixpath
import re

ROOT = pathlib.Path(__file__).parent.parent
PAGES = {
    "benchmarks/README.md": "performance.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}
"""Files outside docs/ that are pages of the site -> their names there."""

_LINK = re.compile(r"(!?)\[((?:[^][]|\[[^]]*\])*)\]\(([^()\s]+)\)")


def on_files(files, config):
    """Adds the pages of PAGES to those of docs/."""
    from mkdocs.structure.files import File  # here: the tests read this file without mkdocs

    for path, page in PAGES.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown, page, config, **_):
    """The text of a page with its links rewritten."""
    sources = {name: path for path, name in PAGES.items()}
    source = sources.get(page.file.src_uri, f"docs/{page.file.src_uri}")
    return rewrite(markdown, source, page.file.src_uri, config.repo_url)


def rewrite(markdown: str, source: str, page: str, repo_url: str | None) -> str:
    """The text of the file `source` of the repository, as the page `page`.

    Example: in docs/data.md, without a repo_url, "[a](../v4jax/api.py)" becomes "a", and
    "[b](../CONTRIBUTING.md)" a link to the page that PAGES has for it.
    """

    def there(match: re.Match) -> str:
        mark, text, link = match.groups()
        path, sign, anchor = link.partition("#")
        if not path or "://" in link:
            return match[0]
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
        inside = PAGES.get(target, target.removeprefix("docs/"))
        if inside != target:
            near = posixpath.relpath(inside, posixpath.dirname(page) or ".")
            return f"{mark}[{text}]({near}{sign}{anchor})"
        if repo_url is None:
            return text
        return f"[{text}]({repo_url.rstrip('/')}/blob/main/{target}{sign}{anchor})"

    return _LINK.sub(there, markdown)
