"""Names that gave way to the field's words do not come back (docs/glossary.md).

The test reads classes, functions, parameters and fields, not local names and prose.
"""

import ast
import pathlib
from collections.abc import Iterator

import pytest

ROOT = pathlib.Path(__file__).parent.parent
EVERYWHERE = ("sharding", "v4jax")
# Retired name: (what it is called now, the rooms it is retired in). Some words mean something else
# in other rooms, and stay there.
RETIRED = {
    "Ask": ("Collect", EVERYWHERE),
    "ask": ("collect", EVERYWHERE),
    "Kept": ("CacheView", EVERYWHERE),
    "kept": ("view", ("v4jax/cache", "v4jax/model")),
    "part": ("with_arrays", ("v4jax/cache",)),
    "Stretch": ("ChunkSpan", EVERYWHERE),
    "stretch": ("span", EVERYWHERE),
    "read_stretch": ("read_span", EVERYWHERE),
    "Slots": ("CompressedKV", EVERYWHERE),
    "Past": ("WindowKV", EVERYWHERE),
    "Far": ("Entries", EVERYWHERE),
    "Split": ("ShardAxes", EVERYWHERE),
    "Csa": ("SparseMode", EVERYWHERE),
    "csa": ("sparse", EVERYWHERE),
    "csa_of": ("sparse_mode", EVERYWHERE),
    "teach": ("train_indexer", EVERYWHERE),
    "Documents": ("Segments", EVERYWHERE),
    "documents": ("segments", ("v4jax/cache", "v4jax/model", "v4jax/generate")),
    "read_documents": ("read_segments", ("v4jax/model",)),
    "turn": (
        "rope",
        ("v4jax/cache", "v4jax/model"),
    ),  # elsewhere: of a conversation, of an exchange
    "compressed_turn": ("compressed_rope", EVERYWHERE),
    "low": ("fp8", ("v4jax/model",)),
    "own": ("context", EVERYWHERE),
    "Seen": ("Diagnostics", EVERYWHERE),
    "seen": ("diagnostics", EVERYWHERE),
    "look": ("measure", EVERYWHERE),
    "both": ("merge", EVERYWHERE),
    "Setting": ("DecodeConfig", EVERYWHERE),
    "setting": ("decoding", EVERYWHERE),
    "News": ("StepOutput", EVERYWHERE),
    "news": ("output", EVERYWHERE),
    "room": ("capacity", EVERYWHERE),
    "most": ("max_new_tokens, or limit", EVERYWHERE),
    "tell": ("on_tokens", EVERYWHERE),
    "hold": ("freeze", EVERYWHERE),
    "is_held": ("is_frozen", EVERYWHERE),
    "Feed": ("RoutedBatchQueue", EVERYWHERE),
    "Record": ("LossHistory", EVERYWHERE),
    "record": ("history", ("v4jax/train",)),  # elsewhere: of a data source
    "Note": ("JsonItem", EVERYWHERE),
    "note": ("item", ("v4jax/checkpoint", "v4jax/train")),
    "Room": ("MemoryBudget", EVERYWHERE),
    "foreign": ("untrusted", EVERYWHERE),
    "row_BT": ("position_BT", EVERYWHERE),
    "row_BV": ("position_BV", EVERYWHERE),
    "window_row_BUW": ("window_position_BUW", EVERYWHERE),
}
MODULES = {
    "v4jax/foreign.py": "v4jax/untrusted.py",
    "v4jax/layout": "v4jax/planner",
    "v4jax/checkpoint/intact.py": "v4jax/checkpoint/checksums.py",
    "v4jax/checkpoint/note.py": "v4jax/checkpoint/json_item.py",
    "v4jax/checkpoint/room.py": "v4jax/checkpoint/memory_budget.py",
    "v4jax/checkpoint/text.py": "v4jax/checkpoint/atomic.py",
    "v4jax/model/dense.py": "v4jax/kernels/matmul.py",
    "v4jax/model/documents.py": "v4jax/model/segments.py",
    "v4jax/model/grouped.py": "v4jax/kernels/expert_ffn",
    "v4jax/model/outer.py": "v4jax/kernels/expert_ffn/grad_tpu.py",
    "v4jax/model/packed.py": "v4jax/cache/quantized.py",
    "v4jax/model/state.py": "v4jax/cache/layer.py",
    "v4jax/model/triton.py": "v4jax/kernels/expert_ffn/gpu.py",
}
FILES = sorted(
    path.relative_to(ROOT).as_posix() for top in EVERYWHERE for path in (ROOT / top).rglob("*.py")
)


def declared(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """(name, line) of every class, function, parameter and annotated field."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.name, node.lineno
        elif isinstance(node, ast.arg):
            yield node.arg, node.lineno
        if isinstance(node, ast.ClassDef):
            for line in node.body:
                if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name):
                    yield line.target.id, line.lineno


def retired(name: str, file: str) -> str | None:
    """What a retired name, with or without an underscore before it, is called now; else None."""
    now, rooms = RETIRED.get(name.removeprefix("_"), (None, ()))
    return now if any(file.startswith(f"{room}/") for room in rooms) else None


@pytest.mark.parametrize("file", FILES)
def test_retired_words_name_nothing(file):
    for name, line in declared(ast.parse((ROOT / file).read_text())):
        now = retired(name, file)
        assert now is None, f"{file}:{line}: {name} is retired; use {now}"


@pytest.mark.parametrize("old", MODULES)
def test_a_renamed_module_is_not_left_behind(old):
    assert (ROOT / MODULES[old]).exists()
    assert not any((ROOT / old).rglob("*.py")) and not (ROOT / old).is_file()


def test_a_retired_word_is_found_wherever_a_name_is_declared():
    text = "class Kept:\n    csa: int\ndef _turn(*, ask): lambda low: 0\n"
    found = [name for name, _ in declared(ast.parse(text)) if retired(name, "v4jax/model/new.py")]
    assert sorted(found) == ["Kept", "_turn", "ask", "csa", "low"]
    assert retired("turn", "v4jax/chat/encoding.py") is None
