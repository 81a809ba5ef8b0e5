"""Which text to train on, and how it is cut: the settings, checked.

Next file to read: v4jax/data/documents.py.
"""

import dataclasses
import math
import pathlib

from v4jax.chat.encoding import EFFORTS, MODES
from v4jax.chat.tokens import CHAT_TOKENS, FIM_TOKENS
from v4jax.tokenizer import ByteTokenizer, Tokenizer, load_tokenizer

FORMATS = ("text", "jsonl", "parquet", "arrayrecord", "chat")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """One place that documents come from.

    Fields:
      path: "stdlib", the sources of the running Python's standard library without its tests; or a folder ("./stdlib" for
        one of that name); or, unless format is "text", a file.
      format: "text": every UTF-8 file is a document. The others hold a document in every record: "jsonl" (a JSON object a
        line), "parquet" (extra v4jax[parquet]), "arrayrecord" (a JSON object a record), "chat" (jsonl of conversations).
      column: of a record, which holds the document: text, or a conversation's messages; "" of an arrayrecord: the record
        itself is the text.
      glob: which files of a folder are read; empty files and names that start with a dot are left out.
      weight: share of the tokens trained on, relative to the other sources'.
      name: in metrics; "": the path's last part without suffix.
    """

    path: str
    format: str = "text"
    column: str = "text"
    glob: str = "**/*"
    weight: float = 1.0
    name: str = ""

    def __post_init__(self):
        for name in ("path", "glob"):
            if not isinstance(getattr(self, name), str) or not getattr(self, name):
                raise ValueError(f"{name}: got {getattr(self, name)!r}; must be a string that is not empty")
        if self.format not in FORMATS:
            raise ValueError(f"format: got {self.format!r}; allowed: {', '.join(FORMATS)}")
        if self.format != "arrayrecord" and not self.column:
            raise ValueError(f"column: got {self.column!r}; must name a column of {self.format}")
        if pathlib.PurePath(self.glob).is_absolute() or ".." in pathlib.PurePath(self.glob).parts:
            raise ValueError(f"glob: got {self.glob!r}; must be relative to the source folder, without '..'")
        if not 0 < self.weight < math.inf:
            raise ValueError(f"weight: got {self.weight!r}; must be above 0")

    @property
    def label(self) -> str:
        return self.name or pathlib.PurePath(self.path).stem


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChatFormat:
    """How conversations become text (v4jax/chat), and what of it is learned.

    Fields:
      thinking_mode, drop_thinking, reasoning_effort, release: as in encode_messages; a record's own "thinking_mode" and
        "reasoning_effort" go first.
      train_on: "all" assistant messages, or those of the "last" turn. A message with "weight": 0 is never learned.
      too_long: what happens to conversations longer than a row: "error", "drop", or "cut" (their end is left out).
    """

    thinking_mode: str = "thinking"
    drop_thinking: bool = True
    reasoning_effort: str | None = None
    release: str = "v4"
    train_on: str = "all"
    too_long: str = "error"

    def __post_init__(self):
        allowed = {
            "thinking_mode": MODES, "release": tuple(EFFORTS), "train_on": ("all", "last"), "too_long": ("error", "drop", "cut"),
        }  # fmt: skip
        for name, values in (allowed | {"reasoning_effort": tuple(EFFORTS.get(self.release, ()))}).items():
            if getattr(self, name) not in values:
                raise ValueError(f"{name}: got {getattr(self, name)!r}; allowed: {', '.join(map(str, values))}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which text to train on, and how it is cut.

    Fields:
      source, format, column, glob: one source, as in `Source`; or mixture: several.
      tokenizer: "byte", "byte-chat" (with the special tokens of chat and fill-in-middle), or a Hugging Face
        tokenizer.json, or a directory that holds one.
      held_out: share of each source's documents kept for evaluation; at least one document is.
      evaluate_on: further sources, read whole, to evaluate on; each by its name.
      seed: order of the training documents; the split does not depend on it.
      packing: "split": documents one after another, cut where a row ends; "best_fit": documents whole, rows padded.
      fim_rate: share of the text documents that are turned to prefix, suffix, middle.
      cache: folder for tokens; "": none. A cache is used again while source files and tokenizer are as they were.
      chat: how conversations are encoded.
    """

    source: str = "stdlib"
    format: str = "text"
    column: str = "text"
    glob: str = "**/*"
    mixture: tuple[Source, ...] = ()
    tokenizer: str = "byte"
    held_out: float = 0.02
    evaluate_on: tuple[Source, ...] = ()
    seed: int = 0
    packing: str = "split"
    fim_rate: float = 0.0
    cache: str = ""
    chat: ChatFormat = ChatFormat()

    def __post_init__(self):
        for name in ("source", "tokenizer"):
            if not isinstance(getattr(self, name), str) or not getattr(self, name):
                raise ValueError(f"{name}: got {getattr(self, name)!r}; must be a string that is not empty")
        if isinstance(self.held_out, bool) or not isinstance(self.held_out, float) or not 0 < self.held_out < 1:
            raise ValueError(f"held_out: got {self.held_out!r}; must be a share in (0, 1)")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or not 0 <= self.seed < 2**32:
            raise ValueError(f"seed: got {self.seed!r}; must be an integer in [0, 2**32)")
        if self.packing not in ("split", "best_fit"):
            raise ValueError(f"packing: got {self.packing!r}; allowed: split, best_fit")
        if not 0 <= self.fim_rate <= 1:
            raise ValueError(f"fim_rate: got {self.fim_rate!r}; must be a share in [0, 1]")
        labels = [source.label for source in (*self.sources, *self.evaluate_on)]
        if twice := {label for label in labels if labels.count(label) > 1} | ({"held_out"} & set(labels)):
            raise ValueError(f"name: got {sorted(twice)[0]!r} more than once; give each source its own (held_out is all of them)")
        if self.masked and self.packing != "best_fit":
            raise ValueError(f"packing: got {self.packing!r}; conversations must stay whole: best_fit")

    @property
    def sources(self) -> tuple[Source, ...]:
        """What is trained on."""
        return self.mixture or (Source(path=self.source, format=self.format, column=self.column, glob=self.glob),)

    @property
    def masked(self) -> bool:
        """Whether only some tokens are learned: those that an assistant wrote."""
        return any(source.format == "chat" for source in (*self.sources, *self.evaluate_on))


def tokenizer_of(cfg: DataConfig) -> Tokenizer:
    """The tokenizer that cfg names."""
    if cfg.tokenizer == "byte":
        return ByteTokenizer()
    return ByteTokenizer(CHAT_TOKENS + FIM_TOKENS) if cfg.tokenizer == "byte-chat" else load_tokenizer(cfg.tokenizer)
