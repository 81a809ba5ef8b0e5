"""The house's layout: imports run one way only, and package files hold no code."""

import ast
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parent.parent
# A file may import what stands on an earlier line (packages: also their own files in the order the text gives).
ORDER = [
    "sharding.axes",
    "sharding.rules",
    "sharding.mesh",
    "sharding.targets",
    "sharding.processes",
    "sharding.params",
    "sharding.embedding",
    "sharding.manual",
    "sharding.counting",
    "sharding.exchange",
    "sharding.experts",
    "sharding.matrices",
    "sharding.audit",
    "v4jax.storage",
    "v4jax.foreign",
    "v4jax.python_files",
    "v4jax.config",
    "v4jax.generation_config",
    "v4jax.cost",
    "v4jax.tokenizer",
    "v4jax.chat.tokens",
    "v4jax.chat.dsml",
    "v4jax.chat.encoding",
    "v4jax.chat.parse",
    "v4jax.checkpoint.text",
    "v4jax.checkpoint.disk",
    "v4jax.checkpoint.intact",
    "v4jax.data.config",
    "v4jax.data.compressed",
    "v4jax.data.files",
    "v4jax.data.documents",
    "v4jax.data.records",
    "v4jax.data.checks",
    "v4jax.data.tools",
    "v4jax.data.messages",
    "v4jax.data.conversations",
    "v4jax.data.identity",
    "v4jax.data.store",
    "v4jax.data.selection",
    "v4jax.data.pieces",
    "v4jax.data.mixture",
    "v4jax.data.rows",
    "v4jax.quant.scales",
    "v4jax.quant.fp8",
    "v4jax.quant.mxfp4",
    "v4jax.quant.fake",
    "v4jax.model.dense",
    "v4jax.model.weights",
    "v4jax.model.norm",
    "v4jax.model.rotary",
    "v4jax.model.packed",
    "v4jax.model.state",
    "v4jax.model.documents",
    "v4jax.model.hyper",
    "v4jax.model.watch",
    "v4jax.model.compressor",
    "v4jax.model.indexer",
    "v4jax.model.attention",
    "v4jax.model.outer",
    "v4jax.model.triton",
    "v4jax.model.grouped",
    "v4jax.model.moe",
    "v4jax.model.block",
    "v4jax.model.mtp",
    "v4jax.model.transformer",
    "v4jax.checkpoint.formats",
    "v4jax.checkpoint.files",
    "v4jax.checkpoint.names",
    "v4jax.checkpoint.load",
    "v4jax.checkpoint.room",
    "v4jax.checkpoint.export",
    "v4jax.checkpoint.note",
    "v4jax.checkpoint.store",
    "v4jax.checkpoint.stream",
    "v4jax.api",
    "v4jax.train.data",
    "v4jax.train.loss",
    "v4jax.train.balance",
    "v4jax.train.schedule",
    "v4jax.train.muon",
    "v4jax.train.stability",
    "v4jax.train.stages",
    "v4jax.train.config",
    "v4jax.train.watch",
    "v4jax.train.step",
    "v4jax.train.finite",
    "v4jax.train.anticipate",
    "v4jax.train.resume",
    "v4jax.train.report",
    "v4jax.train.picture",
    "v4jax.train.loop",
    "v4jax.generate.cache",
    "v4jax.generate.prefix",
    "v4jax.generate.sampling",
    "v4jax.generate.decode",
    "v4jax.generate.rollout",
    "v4jax.generate.row",
    "v4jax.generate.text",
    "v4jax.generate.choice",
    "v4jax.generate.command",
    "v4jax.generate.chat",
    "v4jax.score",
    "v4jax.layout.hardware",
    "v4jax.layout.measure",
    "v4jax.layout.weights",
    "v4jax.layout.terms",
    "v4jax.layout.muon",
    "v4jax.layout.work",
    "v4jax.layout.traffic",
    "v4jax.layout.memory",
    "v4jax.layout.decode",
    "v4jax.layout.estimate",
    "v4jax.layout.search",
    "v4jax.layout.compiled",
    "v4jax.layout.notes",
    "v4jax.layout.command",
    "v4jax.layout.page",
    "v4jax.layout.portable",
    "v4jax.layout.plan",
    "v4jax.convert",
    "v4jax.launch",
    "v4jax.arguments",
    "v4jax.cli",
    "v4jax.__main__",
]
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): path
    for package in ("sharding", "v4jax")
    for path in (ROOT / package).rglob("*.py")
    if path.name != "__init__.py"
}


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            files = [
                f"{node.module}.{alias.name}" for alias in node.names
            ]  # `from v4jax.quant import fp8` names a file
            yield from [name if name in ORDER else node.module for name in files]


def test_every_file_has_a_place():
    assert sorted(FILES) == sorted(ORDER)


@pytest.mark.parametrize("name", ORDER)
def test_imports_run_one_way(name):
    for other in imported(FILES[name]):
        assert other.split(".")[0] != "configs", f"{name} imports configs"
        if other.split(".")[0] in ("v4jax", "sharding"):
            assert other in ORDER[: ORDER.index(name)], (
                f"{name} imports {other}, which stands below it"
            )


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
