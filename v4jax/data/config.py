"""Which text to train on, and how it is cut: the settings, checked.

Next file to read: v4jax/data/documents.py.
"""

import dataclasses
import pathlib

from v4jax.tokenizer import ByteTokenizer, Tokenizer, load_tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which text to train on, and how it is cut.

    Fields:
      source: "stdlib", the sources of the running Python's standard library without its tests; or a folder of
        UTF-8 text files ("./stdlib" for a folder of that name).
      tokenizer: "byte", or a Hugging Face tokenizer.json, or a directory that holds one.
      glob: which files of the folder are documents; empty files and names that start with a dot are left out.
      held_out: share of the documents kept for evaluation; at least one document is.
      seed: order of the training documents; the split does not depend on it.

    Raises:
      ValueError: naming the field, the value and the rule.
    """

    source: str = "stdlib"
    tokenizer: str = "byte"
    glob: str = "**/*"
    held_out: float = 0.02
    seed: int = 0

    def __post_init__(self):
        for name in ("source", "tokenizer", "glob"):
            if not isinstance(getattr(self, name), str) or not getattr(self, name):
                raise ValueError(f"{name}: got {getattr(self, name)!r}; must be a string that is not empty")
        if pathlib.PurePath(self.glob).is_absolute() or ".." in pathlib.PurePath(self.glob).parts:
            raise ValueError(f"glob: got {self.glob!r}; must be relative to the source folder, without '..'")
        if isinstance(self.held_out, bool) or not isinstance(self.held_out, float) or not 0 < self.held_out < 1:
            raise ValueError(f"held_out: got {self.held_out!r}; must be a share in (0, 1)")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or not 0 <= self.seed < 2**32:
            raise ValueError(f"seed: got {self.seed!r}; must be an integer in [0, 2**32)")


def tokenizer_of(cfg: DataConfig) -> Tokenizer:
    """The tokenizer that cfg names."""
    return ByteTokenizer() if cfg.tokenizer == "byte" else load_tokenizer(cfg.tokenizer)
