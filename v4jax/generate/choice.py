"""How a command chooses tokens: by its flags, and by the checkpoint's generation_config.json where no flag is given.

`"do_sample": false` takes the likeliest token, whatever else the file says; `"do_sample": true` without a temperature
means 1. A filter (top_k, top_p, min_p) of the file counts only where tokens are sampled.

Next file to read: v4jax/generate/command.py.
"""

import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

from sharding.processes import is_first
from v4jax.checkpoint.load import read_config
from v4jax.config import ModelConfig
from v4jax.generate.sampling import Sampling
from v4jax.generation_config import GENERATION_FILE, read_generation_config, with_end_tokens

_FILTERS = ("top_k", "top_p", "min_p")
_FLAGS = ("temperature", *_FILTERS, "max_new_tokens")
_CHANGES_NO_TOKEN = (
    "bos_token_id", "pad_token_id", "eos_token_id", "transformers_version", "use_cache", "cache_implementation",
    "return_dict_in_generate",
)  # fmt: skip
_OFF_AT_ONE = (
    "repetition_penalty", "encoder_repetition_penalty", "length_penalty", "typical_p", "num_beams", "num_beam_groups",
    "num_return_sequences",
)  # fmt: skip


def say(*lines: str) -> None:
    """Each line that is not empty, on the stderr of the first process: stdout is the text's."""
    for line in filter(None, lines if is_first() else ()):
        print(f"v4jax: {line}", file=sys.stderr, flush=True)


class Choice(NamedTuple):
    """How tokens are chosen, and how many.

    Attributes:
      max_new_tokens: at most. gives_way: it is the file's, and becomes less where there is no room for so many.
      line: what the file decides, in words; "" for nothing.
    """

    sampling: Sampling
    max_new_tokens: int
    gives_way: bool = False
    line: str = ""

    def most(self, prompt: int, room: int) -> int:
        """New tokens that may follow `prompt` tokens where there is room for `room` in all."""
        return max(1, min(self.max_new_tokens, room - prompt)) if self.gives_way else self.max_new_tokens


def model_and_choice(flags) -> tuple[ModelConfig, Choice]:
    """The model of flags.checkpoint, with the end tokens of both its files, and how the flags and the file choose tokens.

    Raises:
      ValueError: no such checkpoint; a value out of range; of generation_config.json, naming the file.
    """
    own = read_config(flags.checkpoint)
    cfg = with_end_tokens(own, flags.checkpoint)
    further = [token for token in cfg.eos_token_ids if token not in own.eos_token_ids]
    return cfg, choice_of(flags, further if getattr(flags, "stop_tokens", None) is None else ())


def choice_of(flags, ends: Sequence[int] = ()) -> Choice:
    """What the flags say, and generation_config.json of flags.checkpoint for those that are None.

    Args:
      ends: tokens that end a row by that file alone, for the line.

    Raises:
      ValueError: a value out of range; of the file's, naming the file.
    """
    raw = {name: value for name, value in read_generation_config(flags.checkpoint).items() if value is not None}
    try:
        _check(raw)
    except ValueError as error:
        raise ValueError(f"{flags.checkpoint}/{GENERATION_FILE}: {error}") from None
    flagged = {name: getattr(flags, name) for name in _FLAGS if getattr(flags, name) is not None}
    filed = {name: raw[name] for name in _FLAGS if name in raw}
    if "do_sample" in raw:
        filed["temperature"] = raw.get("temperature", 1.0) if raw["do_sample"] else 0.0
    if (filed | flagged).get("temperature", 0) == 0:
        filed = {name: value for name, value in filed.items() if name not in _FILTERS}
    chosen = {"max_new_tokens": flags.default_new_tokens} | filed | flagged
    most = chosen.pop("max_new_tokens")
    counts = {name: value for name, value in filed.items() if name not in flagged}
    return Choice(Sampling(**chosen), most, "max_new_tokens" in counts, _line(raw, counts, ends))


def _check(raw: dict[str, Any]) -> None:
    """Raises ValueError for a value of the wrong type, or that `Sampling` would refuse."""
    if not isinstance(raw.get("do_sample", True), bool):
        raise ValueError(f"do_sample: got {raw['do_sample']!r}; must be true or false")
    for name in ("temperature", "top_p", "min_p"):
        value = raw.get(name, 1)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ValueError(f"{name}: got {value!r}; must be a number")
    most = raw.get("max_new_tokens", 1)
    if type(most) is not int or most < 1:
        raise ValueError(f"max_new_tokens: got {most!r}; must be an integer of at least 1")
    Sampling(temperature=raw.get("temperature", 0.0))
    Sampling(temperature=1.0, **{name: raw[name] for name in _FILTERS if name in raw})


def _line(raw: dict[str, Any], counts: dict[str, Any], ends: Sequence[int]) -> str:
    """What counts of the file, and what in it v4jax does not do; "" for neither."""
    used = [f"{name} {value:g}" for name, value in counts.items() if name != "max_new_tokens"]
    if "temperature" in counts and raw.get("do_sample") is False:
        used[list(counts).index("temperature")] += " (do_sample is false)"
    if "max_new_tokens" in counts:
        used.append(f"max_new_tokens {counts['max_new_tokens']}, or what there is room for")
    if ends:
        used.append(f"rows also end at {', '.join(map(str, ends))}")
    unused = [f"{name} {value!r}" for name, value in raw.items() if not _is_neutral(name, value)]
    said = [", ".join(used)] if used else []
    if unused:
        said.append(f"not used: {', '.join(unused)}")
    return f"{GENERATION_FILE}: {'; '.join(said)}" if said else ""


def _is_neutral(name: str, value: Any) -> bool:
    """Whether a key of the file is used, or changes no token."""
    if name in ("do_sample", *_FLAGS, *_CHANGES_NO_TOKEN) or name.startswith(("_", "output_")):
        return True
    return not value or (value == 1 and name in _OFF_AT_ONE)
