"""Decides how a command chooses tokens: by its flags, else by generation_config.json.

`"do_sample": false` takes the likeliest token, whatever else the file says. `"do_sample": true`
without a temperature means temperature 1. The file's filters (top_k, top_p, min_p) count only
where tokens are sampled.

Next file to read: v4jax/generate/command.py.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from v4jax.checkpoint.load import read_config
from v4jax.config import ModelConfig
from v4jax.generate.sampling import Sampling
from v4jax.generation_config import GENERATION_FILE, read_generation_config, with_end_tokens

CACHE_TOKENS = 4096
"""Tokens that fit in the cache if neither flag nor prompt asks for more."""

_FILTERS = ("top_k", "top_p", "min_p")
_FLAGS = ("temperature", *_FILTERS, "max_new_tokens")
_CHANGES_NO_TOKEN = {
    *("bos_token_id", "eos_token_id", "pad_token_id", "transformers_version"),
    *("use_cache", "cache_implementation", "return_dict_in_generate"),
}
_OFF_AT_ONE = {
    *("repetition_penalty", "encoder_repetition_penalty", "length_penalty", "typical_p"),
    *("num_beams", "num_beam_groups", "num_return_sequences"),
}


class Choice(NamedTuple):
    """How tokens are chosen, and how many.

    Attributes:
      max_new_tokens: most new tokens.
      from_file: the limit comes from the file and shrinks to what fits in the cache (see
        cache_tokens). Files of released models name lengths that no machine has memory for.
      line: what the file decides, in words; "" for nothing.
    """

    sampling: Sampling
    max_new_tokens: int
    from_file: bool = False
    line: str = ""

    def new_tokens(self, prompt: int, capacity: int) -> int:
        """Most new tokens after `prompt` tokens, if `capacity` tokens fit in all."""
        if not self.from_file:
            return self.max_new_tokens
        return max(1, min(self.max_new_tokens, capacity - prompt))


def model_and_choice(flags) -> tuple[ModelConfig, Choice]:
    """The model of flags.checkpoint, with the end tokens of both files, and its Choice.

    Raises:
      ValueError: no such checkpoint, or a value out of range; names the file if the value comes
        from there.
    """
    own = read_config(flags.checkpoint)
    cfg = with_end_tokens(own, flags.checkpoint)
    further = [token for token in cfg.eos_token_ids if token not in own.eos_token_ids]
    replaced = getattr(flags, "stop_tokens", None) is not None
    return cfg, choice_of(flags, () if replaced else further)


def choice_of(flags, ends: Sequence[int] = ()) -> Choice:
    """The choice that the flags make; generation_config.json fills in for flags that are None.

    Args:
      ends: tokens that end a row only because of that file. The line names them.

    Raises:
      ValueError: a value out of range; names the file if the value comes from there.
    """
    raw = read_generation_config(flags.checkpoint)
    raw = {name: value for name, value in raw.items() if value is not None}
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
    max_new_tokens = chosen.pop("max_new_tokens")
    counts = {name: value for name, value in filed.items() if name not in flagged}
    line = _line(raw, counts, ends)
    return Choice(Sampling(**chosen), max_new_tokens, "max_new_tokens" in counts, line)


def cache_tokens(flags, cfg: ModelConfig, prompt: int = 0) -> int:
    """Tokens that the cache holds, prompt included, if no flag says how many follow.

    It is --cache-tokens. Without that flag it is the larger of CACHE_TOKENS and `prompt` plus the
    command's own default of new tokens, up to the model's max_position_embeddings.
    """
    if flags.cache_tokens is not None:
        return flags.cache_tokens
    wanted = max(CACHE_TOKENS, prompt + flags.default_new_tokens)
    return min(wanted, cfg.max_position_embeddings)


def _check(raw: dict[str, Any]) -> None:
    """Raises ValueError for a value of the wrong type, or one that `Sampling` refuses."""
    if not isinstance(raw.get("do_sample", True), bool):
        raise ValueError(f"do_sample: got {raw['do_sample']!r}; must be true or false")
    for name in ("temperature", "top_p", "min_p"):
        value = raw.get(name, 1)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ValueError(f"{name}: got {value!r}; must be a number")
    max_new_tokens = raw.get("max_new_tokens", 1)
    if type(max_new_tokens) is not int or max_new_tokens < 1:
        raise ValueError(
            f"max_new_tokens: got {max_new_tokens!r}; must be an integer of at least 1"
        )
    Sampling(temperature=raw.get("temperature", 0.0))
    Sampling(temperature=1.0, **{name: raw[name] for name in _FILTERS if name in raw})


def _line(raw: dict[str, Any], counts: dict[str, Any], ends: Sequence[int]) -> str:
    """Says what of the file applies, and what v4jax does not use; "" for neither."""
    notes = {"max_new_tokens": ", or what there is room for"}
    if raw.get("do_sample") is False:
        notes["temperature"] = " (do_sample is false)"
    used = [f"{name} {_plain(value)}{notes.get(name, '')}" for name, value in counts.items()]
    if ends:
        used.append(f"rows also end at {', '.join(map(str, ends))}")
    unused = [f"{name} {value!r}" for name, value in raw.items() if not _is_neutral(name, value)]
    said = [", ".join(used)] if used else []
    if unused:
        said.append(f"not used: {', '.join(unused)}")
    return f"{GENERATION_FILE}: {'; '.join(said)}" if said else ""


def _plain(value: float) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _is_neutral(name: str, value: Any) -> bool:
    """Whether a key of the file is used by v4jax, or has a value that changes no token."""
    if name in ("do_sample", *_FLAGS) or name in _CHANGES_NO_TOKEN:
        return True
    if name.startswith(("_", "output_")):
        return True
    return not value or (value == 1 and name in _OFF_AT_ONE)
