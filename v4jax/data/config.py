"""The data settings, checked: which text to train on, and how to cut it.

Next file to read: v4jax/data/files.py.
"""

import dataclasses
import importlib.util
import math
import pathlib
import re

from v4jax.chat.encoding import EFFORTS, MODES
from v4jax.chat.tokens import CHAT_TOKENS, FIM_TOKENS
from v4jax.storage import Remote, checkpoint_name, local_path, place
from v4jax.tokenizer import ByteTokenizer, Tokenizer, load_tokenizer

FORMATS = ("text", "jsonl", "parquet", "arrayrecord", "chat", "preference", "hf")
ANSWERS = ("chosen", "rejected")
"""Keys of a preference record's two answers, in the order of a row."""
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?")
_SPLIT = re.compile(r"([\w.-]+/)?[\w.]+")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """One place that documents come from."""

    path: str
    """"stdlib" (the sources of the running Python's standard library, without its tests), a
    folder ("./stdlib" for one of that name), or, unless format is text, a file; of a bucket too
    (gs://, s3://). If format is hf, org/name[@revision] of a data set of the Hub."""
    format: str = "text"
    """text (each UTF-8 file is a document), or one document per record: jsonl, parquet (extra
    v4jax[parquet]), arrayrecord (JSON objects), chat (JSON lines of conversations), preference
    (JSON lines with chosen, rejected and perhaps prompt). Files of text and of JSON lines may be
    compressed: .gz, or .zst (extra v4jax[zstd]). hf: a data set of the Hub (extra
    v4jax[datasets])."""
    column: str = "text"
    """Key in a record for the document's text, or for a conversation's messages; not used by
    preference. Empty, for arrayrecord: the record itself is the text."""
    glob: str = "**/*"
    """Which files of a folder are read, as a pattern relative to it. Links are followed. The run
    says what it leaves out besides: suffixes of other formats, empty files, names with a leading
    dot."""
    split: str = "train"
    """Which split of a data set of the Hub is read; where it has several subsets, subset/split."""
    weight: float = 1.0
    """Share of the training tokens, relative to the other sources'; above 0."""
    name: str = ""
    """Name in metrics; empty: the path's last part without its suffix."""

    def __post_init__(self):
        for name in ("path", "glob"):
            if not isinstance(getattr(self, name), str) or not getattr(self, name):
                raise ValueError(
                    f"{name}: got {getattr(self, name)!r}; must be a string that is not empty"
                )
        if self.format not in FORMATS:
            raise ValueError(f"format: got {self.format!r}; allowed: {', '.join(FORMATS)}")
        _check_place(self.path, "path", self.format)
        if not isinstance(self.split, str) or not _SPLIT.fullmatch(self.split):
            raise ValueError(f"split: got {self.split!r}; must be a split, or subset/split")
        if self.split != "train" and self.format != "hf":
            raise ValueError(
                f"split: got {self.split!r} and format {self.format!r}; only a data set of the Hub "
                "(format hf) has splits"
            )
        if self.format != "arrayrecord" and not self.column:
            raise ValueError(f"column: got {self.column!r}; must name a column of {self.format}")
        if pathlib.PurePath(self.glob).is_absolute() or ".." in pathlib.PurePath(self.glob).parts:
            raise ValueError(
                f"glob: got {self.glob!r}; must be relative to the source folder, without '..'"
            )
        if not 0 < self.weight < math.inf:
            raise ValueError(f"weight: got {self.weight!r}; must be above 0")

    @property
    def talks(self) -> bool:
        """Whether its records are conversations, of which only an assistant's part is learned."""
        return self.format in ("chat", "preference")

    @property
    def paired(self) -> bool:
        """Whether a record is two conversations: the chosen and the rejected one."""
        return self.format == "preference"

    @property
    def columns(self) -> tuple[str, ...]:
        """Keys that a record must have."""
        if self.paired:
            return ANSWERS
        return (self.column,) if self.column else ()

    @property
    def label(self) -> str:
        """The source's name in metrics."""
        path = pathlib.PurePath(self.path)
        return self.name or (path.name.partition("@")[0] if self.format == "hf" else path.stem)

    @property
    def title(self) -> str:
        """The source's name in messages."""
        return f"source {self.label} ({self.path})"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChatFormat:
    """How conversations become text (v4jax/chat), and which parts are learned."""

    thinking_mode: str = "thinking"
    """chat or thinking. A record's own thinking_mode takes precedence."""
    drop_thinking: bool = True
    """Leave out the reasoning of turns before the last user message, as the released encoder
    does."""
    reasoning_effort: str | None = None
    """Effort that the prompt asks for: None, high or max (release 0731: None, low, high or max).
    A record's own reasoning_effort takes precedence."""
    release: str = ""
    """Release whose wording asks for effort: v4 or 0731. Empty: that of the checkpoint that the run
    begins from (by its encoding/encoding_dsv4.py, else by config.json), or v4."""
    train_on: str = "all"
    """all: every assistant message is learned; last: those of the last turn. A message with
    "weight": 0 is never learned."""
    too_long: str = "error"
    """What happens to a conversation or pair longer than a row: error, drop, or, of a
    conversation, cut (its end is left out). If nothing is left to learn, the whole conversation
    is left out, and the run says how many are."""

    def __post_init__(self):
        allowed = {
            "thinking_mode": MODES,
            "release": ("", *EFFORTS),
            "train_on": ("all", "last"),
            "too_long": ("error", "drop", "cut"),
        }
        releases = (self.release,) if self.release else tuple(EFFORTS)
        efforts = tuple({effort: 0 for name in releases for effort in EFFORTS.get(name, ())})
        for name, values in (allowed | {"reasoning_effort": efforts}).items():
            if getattr(self, name) not in values:
                raise ValueError(
                    f"{name}: got {getattr(self, name)!r}; allowed: {', '.join(map(str, values))}"
                )

    @property
    def wording(self) -> str:
        """`release`, v4 if none is named."""
        return self.release or "v4"


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which text to train on, and how to cut it."""

    source: str = "stdlib"
    """Where the text comes from: "stdlib", a folder, or a file of records; unused with mixture."""
    format: str = "text"
    """Format of source: text, jsonl, parquet, arrayrecord, chat, preference or hf."""
    column: str = "text"
    """Key in source's records for the document's text or the conversation's messages."""
    glob: str = "**/*"
    """Which files of the folder source are read, as a pattern relative to it."""
    split: str = "train"
    """Which split of the source is read if it is a data set of the Hub: split, or subset/split."""
    mixture: tuple[Source, ...] = ()
    """Several sources, mixed by weight, instead of source."""
    tokenizer: str = "byte"
    """byte, byte-chat (bytes and the special tokens of chat and fill-in-middle), a Hugging Face
    tokenizer.json, a folder with one, or org/name[@revision] of the Hub."""
    held_out: float = 0.02
    """Share of each source's documents kept for evaluation, between 0 and 1; at least one
    document is."""
    evaluate_on: tuple[Source, ...] = ()
    """Further sources to evaluate on, read whole, each reported by its name."""
    seed: int = 0
    """Seed of the order of the training documents, 0 to 2**32 - 1. The held-out split does not
    depend on it."""
    packing: str = "split"
    """split: documents one after another, cut where a row ends; best_fit: whole documents, rows
    padded."""
    fim_rate: float = 0.0
    """Share of the text documents that are rewritten as prefix, suffix, middle; 0 to 1."""
    cache: str = ""
    """Folder that keeps tokens for the next run; empty: none. A run reuses them if source files,
    tokenizer and settings are unchanged."""
    chat: ChatFormat = ChatFormat()
    """How conversations are encoded, and which parts are learned."""
    allow_change: bool = False
    """Go on although data, tokenizer or batch sizes are not those of the checkpoint: with its
    weights and optimizer, from a fresh position in the data, so that text may come again."""

    def __post_init__(self):
        for name in ("source", "tokenizer"):
            if not isinstance(getattr(self, name), str) or not getattr(self, name):
                raise ValueError(
                    f"{name}: got {getattr(self, name)!r}; must be a string that is not empty"
                )
        _check_place(self.source, "source", self.format)
        if self.cache != "":
            local_path(self.cache, "cache")
        checkpoint_name(self.tokenizer, "tokenizer")
        if not isinstance(self.held_out, float) or not 0 < self.held_out < 1:
            raise ValueError(f"held_out: got {self.held_out!r}; must be a share in (0, 1)")
        if type(self.seed) is not int or not 0 <= self.seed < 2**32:
            raise ValueError(f"seed: got {self.seed!r}; must be an integer in [0, 2**32)")
        if self.packing not in ("split", "best_fit"):
            raise ValueError(f"packing: got {self.packing!r}; allowed: split, best_fit")
        if not 0 <= self.fim_rate <= 1:
            raise ValueError(f"fim_rate: got {self.fim_rate!r}; must be a share in [0, 1]")
        labels = [source.label for source in (*self.sources, *self.evaluate_on)]
        if twice := {label for label in labels if labels.count(label) > 1} | (
            {"held_out"} & set(labels)
        ):
            raise ValueError(
                f"name: got {sorted(twice)[0]!r} more than once; give each source its own "
                "(held_out is all of them)"
            )
        _check_pairs(self)
        if self.masked and self.packing != "best_fit":
            raise ValueError(
                f"packing: got {self.packing!r}; conversations must stay whole; "
                "set packing to best_fit"
            )

    @property
    def sources(self) -> tuple[Source, ...]:
        """The sources to train on."""
        return self.mixture or (
            Source(
                path=self.source,
                format=self.format,
                column=self.column,
                glob=self.glob,
                split=self.split,
            ),
        )

    @property
    def masked(self) -> bool:
        """Whether only some tokens are learned: those that an assistant wrote."""
        return any(source.talks for source in (*self.sources, *self.evaluate_on))

    @property
    def paired(self) -> bool:
        """Whether rows hold pairs of conversations: one chosen, one rejected."""
        return any(source.paired for source in (*self.sources, *self.evaluate_on))

    @property
    def marks(self) -> tuple[str, ...]:
        """What pieces of documents have for each token beside its id."""
        return ("loss_mask",) * self.masked + ("rejected",) * self.paired


def _check_pairs(cfg: DataConfig) -> None:
    """Refuses what would part the two conversations of a pair, or mix pairs with something else."""
    if not cfg.paired:
        return
    for source in (*cfg.sources, *cfg.evaluate_on):
        if not source.paired:
            raise ValueError(
                f"format: got {source.format!r} for {source.label} beside preference; pairs are "
                "not mixed with other documents"
            )
    if cfg.chat.too_long == "cut":
        raise ValueError(
            "chat.too_long: got 'cut'; allowed with preference: error, drop (the two answers of a "
            "pair would lose different parts)"
        )


def _check_place(path: str, what: str, format: str) -> None:
    """Refuses what is no path on this machine, no place in a bucket, and no data set's name."""
    if format == "hf":
        if not _HUB_NAME.fullmatch(path):
            raise ValueError(f"{what}: got {path!r}; must be org/name or org/name@revision")
        if importlib.util.find_spec("datasets") is None:
            needs = "format hf needs the package datasets; pip install 'v4jax[datasets]'"
            raise ValueError(f"{what}: got {path!r}; {needs}")
        return
    found = place(path, what)
    if isinstance(found, Remote) and found.scheme == "hf":
        raise ValueError(
            f"{what}: got {path!r}; must be a path on this machine, gs:// or s3:// (a data set of "
            "the Hub: org/name, and format hf)"
        )


def tokenizer_of(cfg: DataConfig) -> Tokenizer:
    """The tokenizer that cfg names.

    Raises:
      ValueError: see load_tokenizer.
    """
    if cfg.tokenizer == "byte":
        return ByteTokenizer()
    if cfg.tokenizer == "byte-chat":
        return ByteTokenizer(CHAT_TOKENS + FIM_TOKENS)
    try:
        return load_tokenizer(cfg.tokenizer)
    except ValueError as error:
        raise ValueError(f"tokenizer: {error}") from None
