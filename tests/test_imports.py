"""Imports run one way only, and package files hold no code."""

import ast
import graphlib
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parent.parent
# A room may import the rooms of earlier lines. Files of one room may import each other, without
# circles.
ORDER = [
    "sharding",
    "v4jax.stderr",
    "v4jax.storage",
    "v4jax.untrusted",
    "v4jax.python_files",
    "v4jax.config",
    "v4jax.initializers",
    "v4jax.parameters",
    "v4jax.parameter_tree",
    "v4jax.drafter_parameters",
    "v4jax.generation_config",
    "v4jax.cost_part",
    "v4jax.cost",
    "v4jax.tokenizer",
    "v4jax.chat",
    "v4jax.quant",
    "v4jax.packed_tree",
    "v4jax.kernels",
    "v4jax.remat",
    "v4jax.gradient_sums",
    "v4jax.context",
    "v4jax.cache",
    "v4jax.diagnostics",
    "v4jax.model",
    "v4jax.functional",
    "v4jax.checkpoint",
    "v4jax.adapters",
    "v4jax.data",
    "v4jax.api",
    "v4jax.train",
    "v4jax.generate",
    "v4jax.score",
    "v4jax.planner",
    "v4jax.convert",
    "v4jax.launch",
    "v4jax.cli",
    "v4jax.__main__",
]
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): path
    for package in ("sharding", "v4jax")
    for path in (ROOT / package).rglob("*.py")
    if path.name != "__init__.py"
}
# The packages whose names the rest imports without naming a file; users do so too.
for package in ("config", "storage", "tokenizer"):
    FILES[f"v4jax.{package}"] = ROOT / "v4jax" / package / "__init__.py"


def room(name):
    """The package of a file; a file directly in v4jax is a room of its own."""
    parts = name.split(".")
    return parts[0] if parts[0] == "sharding" else ".".join(parts[:2])


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            files = [
                f"{node.module}.{alias.name}" for alias in node.names
            ]  # `from v4jax.quant import fp8` names a file
            yield from [name if name in FILES else node.module for name in files]


def ours(name):
    """The files of this repository that a file imports."""
    return {
        other
        for other in imported(FILES[name])
        if other.split(".")[0] in ("v4jax", "sharding", "configs")
    }


def test_every_file_belongs_to_a_room():
    assert {room(name) for name in FILES} == set(ORDER)


@pytest.mark.parametrize("name", FILES)
def test_imports_run_one_way(name):
    for other in ours(name):
        assert other in FILES, f"{name} imports {other}; name the file"
        assert ORDER.index(room(other)) <= ORDER.index(room(name)), (
            f"{name} imports {other}, whose room stands below it"
        )


def test_files_import_each_other_without_circles():
    try:
        graphlib.TopologicalSorter({name: ours(name) for name in FILES}).prepare()
    except graphlib.CycleError as circle:
        pytest.fail(" imports ".join(reversed(circle.args[1])))


def test_package_files_hold_no_code():
    for path in [*ROOT.glob("v4jax/**/__init__.py"), *ROOT.glob("sharding/**/__init__.py")]:
        for node in ast.parse(path.read_text()).body:
            name = isinstance(node, ast.Assign) and node.targets[0].id == "__all__"
            assert isinstance(node, (ast.ImportFrom, ast.Expr)) or name, f"{path}:{node.lineno}"


@pytest.mark.parametrize("name", FILES)
def test_docstrings_lead_on(name):
    text = ast.get_docstring(ast.parse(FILES[name].read_text()))
    assert text, f"{name} has no docstring"
    for target in re.findall(r"Next file to read: ([\w/.]+\w)", text):
        assert (ROOT / target).exists(), f"{name} leads to {target}"
