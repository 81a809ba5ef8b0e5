"""A user's config: it finds its neighbours, shadows nothing, and its errors are one line."""

import fnmatch
import json
import pathlib
import sys
import tomllib

import pytest
from commands import ROOT, run

from v4jax.cli import main as cli
from v4jax.python_files import call

GOOD = """
import dataclasses
from configs.demo import get_config as demo
def get_config():
    return dataclasses.replace(demo(), steps=7, warmup_steps=1, decay_steps=1)
"""


def write(folder, **files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / f"{name}.py").write_text(text)
    return folder


@pytest.mark.parametrize(
    "name", ["my_config", "json", "jax", "v4jax", "configs", "numpy", "has-dash and blank"]
)
def test_a_config_of_any_name_and_place_runs_and_shadows_nothing(tmp_path, name):
    before = dict(sys.modules), list(sys.path)
    write(
        tmp_path,
        **{name: "import json, numpy, jax, v4jax.config\njson.loads, numpy.ones, jax.jit" + GOOD},
    )
    assert call(tmp_path / f"{name}.py", "get_config").steps == 7
    assert (
        all(sys.modules[key] is value for key, value in before[0].items()) and sys.path == before[1]
    )


def test_a_folder_named_like_an_installed_module_shadows_nothing(tmp_path):
    folder = write(
        tmp_path / "jax",
        numpy="",
        cfg="import jax, numpy\ndef get_config(): return jax.jit, numpy.ones",
    )
    assert call(folder / "cfg.py", "get_config")[0].__module__.startswith("jax.")


def test_a_config_finds_its_neighbours_and_nobody_else_does(tmp_path):
    uses = "import sizes\ndef get_config(): import sizes as late; return sizes.N, late.N"
    first = write(tmp_path / "a/runs", sizes="N = 1", cfg=uses)
    second = write(tmp_path / "b/runs", sizes="N = 2", cfg=uses)
    assert call(first / "cfg.py", "get_config") == (1, 1)
    assert call(second / "cfg.py", "get_config") == (2, 2)


@pytest.mark.parametrize("above", [False, True])
@pytest.mark.parametrize("regular", [False, True])
def test_packages_near_a_config_are_forgotten_with_all_that_is_in_them(tmp_path, above, regular):
    uses = "from common import deep\nimport common.more.far\n"
    uses += "def get_config(): import common.late; return deep.N, common.more.far.N, common.late.N"
    before = set(sys.modules)
    for n, name in enumerate("ab"):
        folder = write(tmp_path / name / "runs", cfg=uses)
        common = (folder.parent if above else folder) / "common"
        write(common, deep=f"N = {n}", late=f"N = {n}")
        write(common / "more", far=f"N = {n}")
        if regular:
            write(common, __init__="")
            write(common / "more", __init__="")
        assert call(folder / "cfg.py", "get_config") == (n, n, n)
    assert not [one for one in set(sys.modules) - before if one.partition(".")[0] == "common"]


def test_packages_that_a_config_finds_by_a_path_of_its_own_are_forgotten_too(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    uses = "import pathlib, sys\nsys.path.insert(0, str(pathlib.Path(__file__).parent / 'lib'))\n"
    uses += "import own_path\ndef get_config(): return own_path.N"
    for n, name in enumerate("ab"):
        folder = write(tmp_path / name, cfg=uses)
        write(folder / "lib", own_path=f"N = {n}")
        assert call(folder / "cfg.py", "get_config") == n


def test_what_is_installed_near_a_config_stays_the_same_module(tmp_path, monkeypatch):
    """The config is in a checkout with its environment; a second import would make new classes."""
    site = write(tmp_path / "env" / "site", installed_one="class Kind: pass")
    write(site / "installed_package", inner="class Kind: pass")
    monkeypatch.setattr(sys, "path", [*sys.path, str(site)])
    uses = "import installed_one\nfrom installed_package import inner\n"
    uses += "def get_config(): return installed_one.Kind, inner.Kind"
    folder = write(tmp_path / "runs", cfg=uses)
    first = call(folder / "cfg.py", "get_config")
    assert first == call(folder / "cfg.py", "get_config")
    assert sys.modules["installed_package.inner"].Kind is first[1]
    for name in ("installed_one", "installed_package", "installed_package.inner"):
        del sys.modules[name]


def test_a_config_finds_what_the_folder_above_holds(tmp_path):
    folder = write(
        tmp_path / "runs", cfg="from far_above import sizes\ndef get_config(): return sizes.N"
    )
    write(tmp_path / "far_above", sizes="N = 3")
    assert call(folder / "cfg.py", "get_config") == 3


def test_in_a_folder_called_configs_neighbours_come_before_those_installed(tmp_path):
    text = (
        "from configs import models\nfrom configs.demo import get_model\ndef get_config(): "
        "return models.HERE, get_model()"
    )
    folder = write(tmp_path / "configs", models="HERE = 1", cfg=text)
    here, model = call(folder / "cfg.py", "get_config")
    assert here == 1 and model.hidden_size == 128


def test_a_linked_config_finds_what_lies_beside_the_real_one(tmp_path):
    (tmp_path / "linked.py").symlink_to(ROOT / "configs/sft_demo.py")
    assert pathlib.Path(call(tmp_path / "linked.py", "get_config").data.source).is_file()


def test_dataclasses_with_lazy_annotations_work_in_a_config(tmp_path):
    text = (
        "from __future__ import annotations\nimport dataclasses\n@dataclasses.dataclass\n"
        "class Sizes:\n    n: int = 3\n"
    )
    write(tmp_path, cfg=text + "def get_config(): return Sizes().n")
    assert call(tmp_path / "cfg.py", "get_config") == 3


IN = "{tmp}/cfg.py"
BROKEN = {
    "syntax": ("\n\nx = (", f"{IN}:3: SyntaxError: '(' was never closed"),
    "import": (
        "import nothing_called_so",
        f"{IN}:1: ModuleNotFoundError: No module named 'nothing_called_so'",
    ),
    "relative": ("from . import x", f"{IN}:1: ImportError: attempted relative import"),
    "value": (
        GOOD.replace("steps=7", "steps=0"),
        f"{IN}:5: ValueError: steps: got 0; must be at least 1",
    ),
    "no message": ("def get_config():\n    assert 1 > 2\n", f"{IN}:2: AssertionError\n"),
    "several lines": ("raise OSError('a\\n  b')", f"{IN}:1: OSError: a b"),
    "exit": ("import sys\nsys.exit(0)", f"{IN}:2: SystemExit: 0"),
    "recursion": (
        "def get_config():\n    return get_config()",
        f"{IN}:2: RecursionError: maximum recursion depth",
    ),
    "a neighbour": ("import near\n", "{tmp}/near.py:2: ZeroDivisionError: division by zero"),
    "a neighbour's syntax": ("import bad\n", "{tmp}/bad.py:1: SyntaxError: "),
    "no function": ("x = 1", f"{IN}: has no function get_config()"),
    "no callable": ("get_config = 3", f"{IN}: get_config is of type int; must be a function"),
    "arguments": (
        "def get_config(size, *, n, m=1, **more): pass",
        f"{IN}: get_config(size, n) must need no arguments",
    ),
    "another result": (
        "def get_config(): return {}",
        f"{IN}: get_config() gave dict; must give a v4jax.train.config.TrainConfig",
    ),
    "no result": ("def get_config(): pass", f"{IN}: get_config() gave NoneType"),
    "bytes": ("x = '\0'", f"{IN}"),
}


@pytest.mark.parametrize(
    "command", ["train {path} --dry-run", "layout {path} --paper", "cost {path}"]
)
@pytest.mark.parametrize(("text", "line"), BROKEN.values(), ids=BROKEN)
def test_what_a_config_raises_is_one_line_with_its_place(tmp_path, capsys, text, line, command):
    write(tmp_path, cfg=text, near="x = 1\nx / 0", bad="def")
    assert cli.main(command.format(path=tmp_path / "cfg.py").split()) == 2
    said = capsys.readouterr()
    assert said.err.startswith(f"v4jax: {line.format(tmp=tmp_path)}"), said.err
    assert said.err.count("\n") == 1 and not said.out


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("none.py", "none.py: no such CONFIG.py"),
        ("folder.py", "folder.py: is a folder; must be a Python file"),
        ("broken_link.py", "broken_link.py: no such CONFIG.py"),
        ("plain", "plain: must be a Python file, with a name that ends in .py"),
    ],
)
def test_a_path_that_is_no_python_file_is_named(tmp_path, capsys, path, words):
    (tmp_path / "folder.py").mkdir()
    (tmp_path / "broken_link.py").symlink_to(tmp_path / "nothing")
    (tmp_path / "plain").write_text(GOOD)
    assert cli.main(["train", str(tmp_path / path)]) == 2
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1


def test_the_whole_traceback_is_shown_on_request(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("V4JAX_TRACEBACK", "1")
    write(tmp_path, cfg="1 / 0")
    assert cli.main(["train", str(tmp_path / "cfg.py")]) == 2
    said = capsys.readouterr().err
    assert "Traceback" in said and said.endswith("cfg.py:1: ZeroDivisionError: division by zero\n")


def test_a_config_far_from_the_checkout_plans_its_run(tmp_path):
    write(tmp_path, my_config=GOOD)
    done = run(
        sys.executable,
        "-m",
        "v4jax",
        "train",
        str(tmp_path / "my_config.py"),
        "--dry-run",
        "--json",
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["stages"][0]["last_step"] == 7


def test_every_file_of_the_packages_is_installed():
    """Hatchling takes every file of a package that git does not ignore."""
    build = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]
    assert build["targets"]["wheel"] == {"packages": ["v4jax", "sharding", "configs"]}
    assert "exclude" not in build
    ignored = (ROOT / ".gitignore").read_text().split()
    for package in ("v4jax", "sharding", "configs"):
        for path in (ROOT / package).rglob("*"):
            if path.suffix != ".pyc" and path.name != "__pycache__":
                assert not any(fnmatch.fnmatch(path.name, one.strip("/")) for one in ignored), path
    assert all((ROOT / package / "py.typed").is_file() for package in ("v4jax", "sharding"))
    assert not (ROOT / "configs/__init__.py").exists(), (
        "a user's own folder called configs would hide the installed one"
    )
