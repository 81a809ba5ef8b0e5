"""Runs Python files of the user, for a config's function or a layout. Their errors are one line.

A file can import its neighbours, and modules of the folder above. Installed modules come first, so
a config named like an installed module shadows nothing. As members of their folder, neighbours come
first: in a folder called configs, `from configs import models` means the file beside the importing
one, not the one installed with v4jax.

Next file to read: v4jax/cli/main.py.
"""

import contextlib
import dataclasses
import importlib.util
import inspect
import pathlib
import sys
import traceback
import types
from collections.abc import Iterator
from typing import Any

from sharding.axes import close
from sharding.rules import AxisRules, rules_of
from v4jax.storage import local_path


def call(path: str | pathlib.Path, name: str) -> Any:
    """Calls the function `name` of the Python file `path` without arguments; returns its result.

    Raises:
      ValueError: no such file or function, or whatever the file raises, with its line.
    """
    with _running(path) as module:
        if not hasattr(module, name):
            raise _Refused(f"{path}: has no function {name}()")
        function = getattr(module, name)
        if not callable(function):
            kind = type(function).__name__
            raise _Refused(f"{path}: {name} is of type {kind}; must be a function")
        parameters = inspect.signature(function).parameters.values()
        if needed := [one.name for one in parameters if _is_needed(one)]:
            raise _Refused(f"{path}: {name}({', '.join(needed)}) must need no arguments")
        return function()


def read_layout(layout: AxisRules | str | None) -> AxisRules | str | None:
    """The layout that "FILE.py:NAME" names in a Python file; anything else is returned unchanged.

    Raises:
      ValueError: no such file, no such layout in it, or whatever the file raises.
    """
    if not isinstance(layout, str) or not (":" in layout or layout.endswith(".py")):
        return layout
    path, _, name = layout.rpartition(":") if ":" in layout else (layout, ":", "")
    with _running(path, "layout") as module:
        there = {key: value for key, value in vars(module).items() if isinstance(value, AxisRules)}
        has = f"layouts there: {', '.join(there) or 'none'}"
        if not name:
            raise _Refused(f"layout: got {layout!r}; must be FILE.py:NAME; {has}")
        if name not in vars(module):
            raise _Refused(f"{path}: has no layout {name!r}{close(name, tuple(there))}; {has}")
        if name not in there:
            kind = type(vars(module)[name]).__name__
            raise _Refused(
                f"{path}: {name} is of type {kind}; must be made by sharding.rules.layout; {has}"
            )
        return dataclasses.replace(rules_of(there[name]), name=layout)


class _Refused(ValueError):
    """An error whose text is complete; all other errors in a file get file and line added."""


def _is_needed(parameter: inspect.Parameter) -> bool:
    optional = parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    return parameter.default is parameter.empty and not optional


@contextlib.contextmanager
def _running(path: str | pathlib.Path, what: str = "") -> Iterator[types.ModuleType]:
    """The module of the file `path`; its code may be called within the context."""
    path = local_path(path, what)
    if path.is_dir():
        raise ValueError(f"{path}: is a folder; must be a Python file such as CONFIG.py")
    if not path.exists():
        raise ValueError(f"{path}: no such CONFIG.py or other Python file")
    if path.suffix != ".py":
        raise ValueError(f"{path}: must be a Python file, with a name that ends in .py")
    file = path.resolve()
    spec = importlib.util.spec_from_file_location(f"_file_{file.stem}", file)
    assert spec is not None and spec.loader is not None, "a file that ends in .py has a loader"
    module = importlib.util.module_from_spec(spec)
    with _importable(file.parent, module):
        try:
            spec.loader.exec_module(module)
            yield module
        except _Refused:
            raise
        except (Exception, SystemExit) as error:
            raise ValueError(_line(error, path, file)) from error


@contextlib.contextmanager
def _importable(folder: pathlib.Path, module: types.ModuleType) -> Iterator[None]:
    """Lets `module`, a file of `folder`, import its neighbours within the context.

    Afterwards the neighbours are forgotten, and so is all else below `folder` or the folder above
    it that is not installed, so that another file does not get them instead of its own.
    """
    paths = [str(one) for one in (folder, folder.parent) if str(one) not in sys.path]
    ours = {module.__name__: module}  # dataclasses look their module up here
    if (package := _package(folder)) is not None:
        ours[package.__name__] = package
    hidden = {name: one for name, one in sys.modules.items() if name.partition(".")[0] in ours}
    before, path_before = set(sys.modules) - set(hidden), list(sys.path)
    for name in hidden:
        del sys.modules[name]
    sys.modules.update(ours)
    sys.path.extend(paths)
    try:
        yield
    finally:
        for path in paths:
            with contextlib.suppress(ValueError):  # the file may have removed it itself
                sys.path.remove(path)
        _forget(set(sys.modules) - before, set(ours), folder.parent, path_before)
        sys.modules.update(hidden)


def _forget(new: set[str], ours: set[str], above: pathlib.Path, path: list[str]) -> None:
    """Removes modules from sys.modules, packages with all that is in them.

    Args:
      new: names of the modules to look at.
      ours: top-level names that are removed in any case.
      above: another top-level module is removed if it lies below this folder, unless it is also
        found on the search path `path`.
    """
    gone = set(ours)
    for name in new - gone:
        if "." not in name and any(one.is_relative_to(above) for one in _places(name)):
            gone |= set() if _is_found(name, path) else {name}
    for name in new:
        if name.partition(".")[0] in gone:
            del sys.modules[name]


def _places(name: str) -> list[pathlib.Path]:
    """The file of a module, or the folders of a package without a file."""
    module = sys.modules[name]
    file = getattr(module, "__file__", None)
    return [pathlib.Path(one) for one in ([file] if file else getattr(module, "__path__", ()))]


def _is_found(name: str, path: list[str]) -> bool:
    """Whether a top-level module, as loaded, can be imported with the search path `path`."""
    places, module = _places(name), sys.modules.pop(name)
    now, sys.path[:] = list(sys.path), path
    try:
        spec = importlib.util.find_spec(name)
    finally:
        sys.path[:] = now
        sys.modules[name] = module
    if spec is None:
        return False
    there = [spec.origin] if spec.origin else spec.submodule_search_locations or []
    return set(places) <= set(map(pathlib.Path, there))


def _package(folder: pathlib.Path) -> types.ModuleType | None:
    """The folder as a package, with its files before those of other folders of that name.

    None if something installed has the name, or if the name cannot be imported.
    """
    if not folder.name.isidentifier() or (folder / "__init__.py").exists():
        return None
    known = importlib.util.find_spec(folder.name)
    if known is not None and known.origin is not None:
        return None
    package = types.ModuleType(folder.name)
    others = known.submodule_search_locations if known is not None else None
    package.__path__ = [str(folder), *(others or ())]
    return package


def _line(error: BaseException, path: pathlib.Path, file: pathlib.Path) -> str:
    """One line: the error, and the innermost line of the file or a neighbour that led to it."""
    where = [(frame.filename, frame.lineno) for frame in traceback.extract_tb(error.__traceback__)]
    text = str(error)
    if isinstance(error, SyntaxError) and error.filename:
        where.append((error.filename, error.lineno))
        text = error.msg
    ours = [(name, line) for name, line in where if pathlib.Path(name).parent == file.parent]
    name, line = ours[-1] if ours else (str(file), None)
    place = str(path if name == str(file) else name) + (f":{line}" if line else "")
    return f"{place}: {type(error).__name__}{': ' * bool(text)}{text}"
