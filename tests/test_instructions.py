"""What README.md and CONTRIBUTING.md tell people to run is what the Makefile and CI run."""

import pathlib
import re
import tomllib

import pytest

ROOT = pathlib.Path(__file__).parent.parent
PAGES = ("README.md", "CONTRIBUTING.md")


def text(name: str) -> str:
    return (ROOT / name).read_text()


@pytest.mark.parametrize("page", [*PAGES, ".ci/run"])
def test_every_make_command_is_a_target(page):
    targets = set(re.findall(r"^([a-z]+):", text("Makefile"), re.M))
    named = set(re.findall(r"^(?:    )?make ([a-z]+)", text(page), re.M))
    assert named and named <= targets, named - targets


def test_contributing_names_all_that_ci_checks():
    page, ci = text("CONTRIBUTING.md"), text(".ci/run")
    checks = re.findall(r"^make ([a-z]+)", ci, re.M)
    assert len(checks) == 4 and all(f"make {check} " in page for check in checks)
    commands = re.findall(r'"\$ALL/bin/python" -m (pytest [^#\n]*)', ci)
    assert len(commands) == 2
    assert commands[-1].endswith('and not long"')  # such a test may be slow or parity as well
    for command in commands:
        assert f".venv/bin/python -m {command.strip()}" in page, command


def test_every_extra_is_named_in_the_readme():
    extras = tomllib.loads(text("pyproject.toml"))["project"]["optional-dependencies"]
    assert [name for name in extras if f"`{name}`" not in text("README.md")] == []


@pytest.mark.parametrize("page", PAGES)
def test_every_file_of_a_command_exists(page):
    named = re.findall(r"(?:pytest|v4jax train) ((?:tests|configs)/\S+\.py)", text(page))
    assert named and all((ROOT / path).is_file() for path in named), named
