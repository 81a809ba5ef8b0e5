"""The configuration of a DeepSeek-V4 model: one frozen dataclass that validates itself.

Its fields are spelled like config.json. Layer kinds, scan groups and parameter shapes are derived
from it. It reads the official style of config.json and the style that transformers 5 writes, and
writes the official one.

Next file to read: v4jax/model/transformer.py.
"""

import dataclasses
import pathlib
import re
from collections.abc import Iterable
from typing import Any, NamedTuple

from v4jax.storage import local_path
from v4jax.untrusted import file_in, read_json

WINDOW_ONLY, CSA, HCA = 0, 4, 128
"""Compress ratios: sliding window only, CSA and HCA (report 2.3)."""

_RATIO_OF_LAYER_TYPE = {
    "sliding_attention": WINDOW_ONLY,
    "compressed_sparse_attention": CSA,
    "heavily_compressed_attention": HCA,
}
_SIZES = [
    "vocab_size",
    "hidden_size",
    "moe_intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "head_dim",
    "qk_rope_head_dim",
    "q_lora_rank",
    "o_groups",
    "o_lora_rank",
    "n_routed_experts",
    "num_experts_per_tok",
    "sliding_window",
    "hc_mult",
    "hc_sinkhorn_iters",
    "max_position_embeddings",
]
_AT_MOST = {
    "num_hidden_layers": 1000,
    "n_routed_experts": 16384,
    "hc_mult": 64,
    "hc_sinkhorn_iters": 1000,
    "max_position_embeddings": 2**31,
}
"""Largest values; larger ones can only be mistakes, and would keep a reader busy without end.
Other sizes: `_LARGEST_SIZE`."""
_LARGEST_SIZE = 2**24
_ABSURD = 1e30
_LEAST_EPS = 1e-24
"""A norm's gradient at a vector of zeros passes through eps^-1.5, which float32 must hold."""
_INDEX_SIZES = ("index_n_heads", "index_head_dim", "index_topk")
_FIXED = {  # V4 was published with these values only; others would be another architecture
    "num_key_value_heads": 1,
    "n_shared_experts": 1,
    "scoring_func": "sqrtsoftplus",
    "norm_topk_prob": True,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
}


class LayerKind(NamedTuple):
    """What tells layers apart: the compress ratio, and whether experts are hash-routed."""

    compress_ratio: int
    hash_routed: bool


class LayerGroup(NamedTuple):
    """`repeats` copies of the pattern `kinds`, from layer `first` on; scanned as one unit."""

    first: int
    kinds: tuple[LayerKind, ...]
    repeats: int

    @property
    def name(self) -> str:
        """The group's key in the parameter tree, for example layers_3_42."""
        return f"layers_{self.first}_{self.first + len(self.kinds) * self.repeats - 1}"

    def layer(self, n: int) -> str:
        """The key of repetition `n` where repetitions are apart, for example layers_3_42_0."""
        return f"{self.name}_{n}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """YaRN for the rotary angles of compressed layers, applied at every length.

    In the official code it is `precompute_freqs_cis`.
    """

    factor: float = 16.0
    """How many times longer than the original context the model reads, 1 or more."""
    original_max_position_embeddings: int = 65536
    """Tokens of the original context."""
    beta_fast: float = 32.0
    """Rotations over the original context above which a pair keeps its speed; above beta_slow."""
    beta_slow: float = 1.0
    """Rotations over the original context below which a pair is slowed by factor; above 0."""

    def __post_init__(self):
        numbers = all(_is_number(value) for value in dataclasses.astuple(self))
        if (
            not numbers
            or not (self.factor >= 1 and self.original_max_position_embeddings >= 1)
            or not self.beta_fast > self.beta_slow > 0
        ):
            raise ValueError(
                f"rope_scaling: got {dataclasses.asdict(self)}; allowed: factor >= 1, "
                "original_max_position_embeddings >= 1, beta_fast > beta_slow > 0"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A DeepSeek-V4 architecture. Fields have the names and meanings of the official config.json.

    `compress_ratios` has one number per layer (0 window only, 4 CSA, 128 HCA), then one 0 per MTP
    layer.

    Raises:
      ValueError: for anything that is not a V4 this code can build; names the field, the value and
        the rule.
    """

    vocab_size: int
    """Token ids, padded ones included."""
    hidden_size: int
    """Width of each residual stream."""
    moe_intermediate_size: int
    """Hidden width of an expert, shared or routed."""
    num_hidden_layers: int
    """Main layers, MTP's not counted."""
    num_attention_heads: int
    """Query heads; there is one key and value head."""
    head_dim: int
    """Width of a query head, and of the shared key and value head."""
    qk_rope_head_dim: int
    """Last dimensions of a head that rotary embedding turns; even."""
    q_lora_rank: int
    """Width of the latent that queries are projected from."""
    o_groups: int
    """Groups of heads whose outputs are projected apart; divides num_attention_heads."""
    o_lora_rank: int
    """Width of each group's projected output."""
    n_routed_experts: int
    """Routed experts of a layer."""
    num_experts_per_tok: int
    """Routed experts that each token uses."""
    routed_scaling_factor: float
    """Sum of the weights of a token's routed experts."""
    compress_ratios: tuple[int, ...]
    """One number per layer: 0 (window only), 4 (CSA) or 128 (HCA); then one 0 per MTP layer."""
    num_hash_layers: int = 3
    """First layers, which choose experts by a table of token ids."""
    num_nextn_predict_layers: int = 1
    """Multi-token-prediction modules, 0 or 1."""
    sliding_window: int = 128
    """Raw tokens that every layer attends to, the current one included."""
    index_n_heads: int = 64
    """Heads of the lightning indexer."""
    index_head_dim: int = 128
    """Width of an indexer head."""
    index_topk: int = 512
    """Entries that the indexer chooses for a query."""
    hc_mult: int = 4
    """Residual streams of the hyper-connections."""
    hc_sinkhorn_iters: int = 20
    """Sinkhorn iterations that make the mixing matrix doubly stochastic."""
    hc_eps: float = 1e-6
    """Added to the gates of the hyper-connections and in the denominators of Sinkhorn."""
    rms_norm_eps: float = 1e-6
    """Added to the mean square in every RMS norm."""
    swiglu_limit: float = 10.0
    """Bound of an expert's gate and up projections."""
    rope_theta: float = 10000.0
    """Base of rotary embedding in layers without compression."""
    compress_rope_theta: float | None = None
    """Base of rotary embedding in CSA and HCA layers. Must be set if there are such layers."""
    rope_scaling: RopeScaling | None = None
    """YaRN of the CSA and HCA layers; None: plain rotary embedding."""
    max_position_embeddings: int = 1048576
    """Longest sequence, in tokens."""
    initializer_range: float = 0.02
    """Standard deviation of the initial matrices."""
    bos_token_id: int | None = 0
    """Token that begins a document; None: no token does."""
    eos_token_id: int | None = 1
    """Token that ends a document, the first if config.json lists several; None: no token does."""
    more_eos_token_ids: tuple[int, ...] = dataclasses.field(default=(), compare=False)
    """Further tokens that end a generated row. Configs that differ only in them are equal."""

    def __post_init__(self):
        object.__setattr__(self, "compress_ratios", tuple(self.compress_ratios))
        _spread_special_tokens(self)
        _check_sizes(self)
        _check_layers(self)
        _check_divisions(self)

    # ---- derived ---------------------------------------------------------------------------------

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """All tokens that end a generated row, eos_token_id first."""
        return () if self.eos_token_id is None else (self.eos_token_id, *self.more_eos_token_ids)

    @property
    def layer_kinds(self) -> tuple[LayerKind, ...]:
        """The kind of each main layer, in order."""
        ratios = self.compress_ratios[: self.num_hidden_layers]
        return tuple(LayerKind(ratio, i < self.num_hash_layers) for i, ratio in enumerate(ratios))

    @property
    def layer_groups(self) -> tuple[LayerGroup, ...]:
        """The layers as repeated patterns, so that compile time does not grow with depth.

        Example: V4-Flash is [(SWA hash) x 2], [(CSA hash) x 1], [(HCA, CSA) x 20].
        """
        groups, start = [], 0
        while start < self.num_hidden_layers:
            period, repeats = _longest_repeat(self.layer_kinds[start:])
            groups.append(LayerGroup(start, self.layer_kinds[start : start + period], repeats))
            start += period * repeats
        return tuple(groups)

    # ---- files -----------------------------------------------------------------------------------

    @classmethod
    def from_json(cls, path) -> "ModelConfig":
        """Reads config.json, or a directory that has one, of official or transformers 5 style."""
        path = local_path(path, "path")
        path = path / "config.json" if path.is_dir() else path.resolve()
        raw = read_config_json(path)
        try:
            return cls.from_dict(raw)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> "ModelConfig":
        """Builds the config from the contents of config.json.

        Keys that describe neither weights nor equations are ignored.

        Raises:
          ValueError: another architecture, a DSpark drafter, a fixed choice that differs, or a
            missing key.
        """
        _refuse_other_models(raw)
        for name, only in _FIXED.items():
            if raw.get(name, only) != only:
                raise ValueError(f"{name}: got {raw[name]!r}; DeepSeek-V4 allows only {only!r}")
        _check_json_types(raw)
        raw = _official_style(raw)
        fields = {field.name: field for field in dataclasses.fields(cls)}
        missing = [
            name
            for name, field in fields.items()
            if field.default is dataclasses.MISSING and raw.get(name) is None
        ]
        if missing:
            raise ValueError(f"missing key(s) {', '.join(missing)}")
        del fields["more_eos_token_ids"]  # no key of config.json: eos_token_id lists them all
        values = {name: raw[name] for name in fields if raw.get(name) is not None}
        # Without the key the released default applies; null says that there is no such token.
        values |= {name: raw[name] for name in ("bos_token_id", "eos_token_id") if name in raw}
        if "rope_scaling" in values:
            values["rope_scaling"] = _read_rope_scaling(values["rope_scaling"])
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """The official config.json, which `from_dict`, transformers, vLLM and SGLang read."""
        raw: dict[str, Any] = {
            "architectures": ["DeepseekV4ForCausalLM"],
            "model_type": "deepseek_v4",
        }
        raw |= dataclasses.asdict(self) | _FIXED
        raw["compress_ratios"] = list(self.compress_ratios)
        if more := raw.pop("more_eos_token_ids"):
            raw["eos_token_id"] = [self.eos_token_id, *more]
        if self.rope_scaling is None:
            del raw["rope_scaling"]
        else:
            raw["rope_scaling"] = {"type": "yarn"} | dataclasses.asdict(self.rope_scaling)
        if self.compress_rope_theta is None:
            del raw["compress_rope_theta"]
        return raw

    def replace(self, **changes) -> "ModelConfig":
        """A validated copy with some fields changed."""
        return dataclasses.replace(self, **changes)

    def ending_at(self, tokens: Iterable[int]) -> "ModelConfig":
        """The same model, with rows that end at these tokens too."""
        ends = [*self.eos_token_ids, *tokens]
        return self.replace(eos_token_id=ends or None, more_eos_token_ids=())

    def difference(self, other: "ModelConfig") -> str | None:
        """The first key of config.json in which two models differ; None if they are the same model.

        Further end tokens do not count, nor does a special token that only one of them has.
        """
        ours = self.replace(more_eos_token_ids=()).to_dict()
        theirs = other.replace(more_eos_token_ids=()).to_dict()
        for name in ("bos_token_id", "eos_token_id"):
            if None in (ours[name], theirs[name]):
                ours[name] = theirs[name] = None
        return next((name for name in ours | theirs if ours.get(name) != theirs.get(name)), None)


def read_config_json(path: pathlib.Path) -> dict[str, Any]:
    """The contents of a config.json.

    Raises:
      ValueError: no such file, a link out of its directory, or no JSON object.
    """
    try:
        raw = read_json(file_in(path.parent, path.name))
    except FileNotFoundError:
        raise ValueError(
            f"{path}: no such file; expected a config.json of a deepseek_v4 model"
        ) from None
    except ValueError as error:
        raise ValueError(f"{path.parent}/{error}") from None
    if not isinstance(raw, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(raw).__name__}")
    return raw


def _longest_repeat(kinds: tuple[LayerKind, ...]) -> tuple[int, int]:
    """(period, repeats) of the pattern that covers most layers from the start.

    On a tie it is the shortest pattern.
    """
    best = (1, 1)
    for period in range(1, len(kinds) // 2 + 1):
        repeats = 1
        while kinds[repeats * period : (repeats + 1) * period] == kinds[:period]:
            repeats += 1
        if repeats > 1 and period * repeats > best[0] * best[1]:
            best = (period, repeats)
    return best


def _is_number(value: Any) -> bool:
    return (
        isinstance(value, (int, float))
        and not isinstance(value, bool)
        and -_ABSURD < value < _ABSURD
    )


def _check_sizes(cfg: ModelConfig) -> None:
    for name in _SIZES + list(_INDEX_SIZES if CSA in cfg.compress_ratios else ()):
        value = getattr(cfg, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name}: got {value!r}; must be a positive integer")
        if value > (most := _AT_MOST.get(name, _LARGEST_SIZE)):
            raise ValueError(f"{name}: got {str(value)[:40]}; must be at most {most}")
    for name in (
        "routed_scaling_factor",
        "hc_eps",
        "rms_norm_eps",
        "swiglu_limit",
        "rope_theta",
        "initializer_range",
    ):
        value = getattr(cfg, name)
        if not _is_number(value) or not value > 0:
            raise ValueError(f"{name}: got {value!r}; must be a number above 0")
    for name in ("hc_eps", "rms_norm_eps"):
        if getattr(cfg, name) < _LEAST_EPS:
            raise ValueError(f"{name}: got {getattr(cfg, name)!r}; must be at least {_LEAST_EPS}")
    if type(cfg.num_nextn_predict_layers) is not int or cfg.num_nextn_predict_layers not in (0, 1):
        raise ValueError(
            f"num_nextn_predict_layers: got {cfg.num_nextn_predict_layers!r}; allowed: 0 or 1"
        )
    ids = [("eos_token_id", token) for token in cfg.eos_token_ids]
    if cfg.bos_token_id is not None:
        ids.append(("bos_token_id", cfg.bos_token_id))
    for name, value in ids:
        if not is_token(value, cfg.vocab_size):
            raise ValueError(f"{name}: got {value!r}; must be in [0, vocab_size={cfg.vocab_size})")


def is_token(value: Any, vocab_size: int) -> bool:
    """Whether `value` is a token id: an integer in [0, vocab_size), and no bool."""
    return type(value) is int and 0 <= value < vocab_size


def _spread_special_tokens(cfg: ModelConfig) -> None:
    """Moves all but the first of several end tokens to more_eos_token_ids."""
    first, rest = cfg.eos_token_id, list(cfg.more_eos_token_ids)
    if isinstance(first, (list, tuple)) and first:
        first, rest = first[0], [*first[1:], *rest]
    if first is None and rest:
        raise ValueError(f"more_eos_token_ids: got {rest} without eos_token_id; set that one first")
    distinct = [token for n, token in enumerate(rest) if token != first and token not in rest[:n]]
    object.__setattr__(cfg, "eos_token_id", first)
    object.__setattr__(cfg, "more_eos_token_ids", tuple(distinct))
    if isinstance(cfg.bos_token_id, (list, tuple)) and len(cfg.bos_token_id) == 1:
        object.__setattr__(cfg, "bos_token_id", cfg.bos_token_id[0])


def _check_layers(cfg: ModelConfig) -> None:
    expected = cfg.num_hidden_layers + cfg.num_nextn_predict_layers
    if len(cfg.compress_ratios) != expected:
        raise ValueError(
            f"compress_ratios: got {len(cfg.compress_ratios)} entries; must be {expected} "
            f"(num_hidden_layers {cfg.num_hidden_layers} + num_nextn_predict_layers "
            f"{cfg.num_nextn_predict_layers})"
        )
    odd = [
        ratio
        for ratio in cfg.compress_ratios
        if type(ratio) is not int or ratio not in (WINDOW_ONLY, CSA, HCA)
    ]
    if odd:
        raise ValueError(
            f"compress_ratios: got {odd[0]!r}; allowed: 0 (window only), 4 (CSA), 128 (HCA)"
        )
    if any(cfg.compress_ratios[cfg.num_hidden_layers :]):
        raise ValueError(
            f"compress_ratios: the MTP entry is {cfg.compress_ratios[-1]}; the MTP layer allows "
            "only 0"
        )
    if (
        type(cfg.num_hash_layers) is not int
        or not 0 <= cfg.num_hash_layers <= cfg.num_hidden_layers
    ):
        raise ValueError(
            f"num_hash_layers: got {cfg.num_hash_layers!r}; must be in [0, "
            f"num_hidden_layers={cfg.num_hidden_layers}]"
        )
    if any(cfg.compress_ratios) and not (
        _is_number(cfg.compress_rope_theta) and cfg.compress_rope_theta > 0
    ):
        # Published code and config.json disagree on its default, so any guess would be wrong for
        # some checkpoint (docs/equations.md#trap-6).
        raise ValueError(
            f"compress_rope_theta: got {cfg.compress_rope_theta!r}; a model with compressed layers "
            "must state it "
            "(160000 in the released checkpoints)"
        )


def _check_divisions(cfg: ModelConfig) -> None:
    if cfg.num_attention_heads % cfg.o_groups:
        raise ValueError(
            f"o_groups: got {cfg.o_groups}; must divide "
            f"num_attention_heads={cfg.num_attention_heads}"
        )
    if cfg.qk_rope_head_dim % 2:
        raise ValueError(
            f"qk_rope_head_dim: got {cfg.qk_rope_head_dim}; must be even (rotary pairs)"
        )
    if cfg.qk_rope_head_dim > cfg.head_dim:
        raise ValueError(
            f"qk_rope_head_dim: got {cfg.qk_rope_head_dim}; must be at most head_dim={cfg.head_dim}"
        )
    if CSA in cfg.compress_ratios and cfg.qk_rope_head_dim > cfg.index_head_dim:
        raise ValueError(
            f"index_head_dim: got {cfg.index_head_dim}; must be at least "
            f"qk_rope_head_dim={cfg.qk_rope_head_dim}"
        )
    if cfg.num_experts_per_tok > cfg.n_routed_experts:
        raise ValueError(
            f"num_experts_per_tok: got {cfg.num_experts_per_tok}; must be at most n_routed_experts="
            f"{cfg.n_routed_experts}"
        )


def _refuse_other_models(raw: dict[str, Any]) -> None:
    names = [str(raw.get("model_type"))] + re.findall(
        r"\w[\w.]*", str(raw.get("architectures") or "")
    )
    if any(mark in name.lower() for name in names for mark in ("v4.1", "v4_1", "v41")):
        raise ValueError(
            f"model_type: got {names[0]!r} {names[1:]}; DeepSeek-V4.1 is another architecture; "
            "allowed: "
            "'deepseek_v4'"
        )
    if raw.get("model_type") != "deepseek_v4":
        raise ValueError(f"model_type: got {raw.get('model_type')!r}; allowed: 'deepseek_v4'")
    dspark = sorted(name for name in raw if name.startswith("dspark"))
    if dspark:
        raise ValueError(
            f"{dspark[0]}: this checkpoint's mtp.* is a DSpark drafter, which v4jax does not build"
        )


def _check_json_types(raw: dict[str, Any]) -> None:
    """Refuses a key with a value of the wrong JSON type, before anything looks inside it."""
    kinds = {
        "a list": ((list, tuple), ("compress_ratios", "layer_types", "mlp_layer_types")),
        "an object": ((dict, RopeScaling), ("rope_scaling", "rope_parameters", "compress_rates")),
    }
    for word, (allowed, names) in kinds.items():
        for name in names:
            if raw.get(name) is not None and not isinstance(raw[name], allowed):
                raise ValueError(f"{name}: got {raw[name]!r}; must be {word}")
    rope = raw.get("rope_parameters") or {}
    if rope and not (isinstance(rope.get("main"), dict) and isinstance(rope.get("compress"), dict)):
        raise ValueError(
            f"rope_parameters: got {rope}; must be an object with the objects main and compress"
        )


def _official_style(raw: dict[str, Any]) -> dict[str, Any]:
    """Translates transformers 5's keys to the official ones.

    These are layer_types, mlp_layer_types and rope_parameters.
    """
    raw = dict(raw)
    layers = raw.get("num_hidden_layers") or 0
    if raw.get("compress_ratios") is None and raw.get("layer_types") is not None:
        unknown = [name for name in raw["layer_types"] if str(name) not in _RATIO_OF_LAYER_TYPE]
        if unknown:
            raise ValueError(
                f"layer_types: got {unknown[0]!r}; allowed: {', '.join(_RATIO_OF_LAYER_TYPE)}"
            )
        for name, ratio in (raw.get("compress_rates") or {}).items():
            if _RATIO_OF_LAYER_TYPE.get(name) != ratio:
                raise ValueError(
                    f"compress_rates: got {name}={ratio}; DeepSeek-V4 allows only "
                    f"{_RATIO_OF_LAYER_TYPE.get(name)}"
                )
        ratios = [_RATIO_OF_LAYER_TYPE[name] for name in raw["layer_types"]]
        raw["compress_ratios"] = ratios + [WINDOW_ONLY] * (raw.get("num_nextn_predict_layers") != 0)
    if raw.get("num_hash_layers") is None and raw.get("mlp_layer_types") is not None:
        kinds = list(raw["mlp_layer_types"])
        raw["num_hash_layers"] = hashed = kinds.count("hash_moe")
        if len(kinds) != layers or kinds != ["hash_moe"] * hashed + ["moe"] * (len(kinds) - hashed):
            raise ValueError(
                f"mlp_layer_types: got {kinds}; must be hash_moe layers first, then moe, {layers} "
                "in all"
            )
    factor, head_dim = raw.get("partial_rotary_factor"), raw.get("head_dim")
    if raw.get("qk_rope_head_dim") is None and _is_number(factor) and _is_number(head_dim):
        raw["qk_rope_head_dim"] = round(head_dim * factor)
    rope = raw.get("rope_parameters")
    if rope:
        raw["rope_theta"] = rope["main"].get("rope_theta", raw.get("rope_theta"))
        raw["compress_rope_theta"] = rope["compress"].get(
            "rope_theta", raw.get("compress_rope_theta")
        )
        raw["rope_scaling"] = (
            rope["compress"] if rope["compress"].get("rope_type", "default") != "default" else None
        )
    return raw


def _read_rope_scaling(raw: Any) -> RopeScaling | None:
    if raw is None or isinstance(raw, RopeScaling):
        return raw
    kind = raw.get("type", raw.get("rope_type"))
    if kind != "yarn":
        raise ValueError(f"rope_scaling: got type {kind!r}; allowed: 'yarn', or no rope_scaling")
    if raw.get("attention_factor", 1.0) not in (None, 1.0):
        raise ValueError(
            f"rope_scaling: got attention_factor {raw['attention_factor']}; DeepSeek-V4 allows "
            "only 1.0"
        )
    names = [field.name for field in dataclasses.fields(RopeScaling)]
    missing = [name for name in names[:2] if name not in raw]
    if missing:
        raise ValueError(f"rope_scaling: missing key(s) {', '.join(missing)}")
    return RopeScaling(**{name: raw[name] for name in names if name in raw})
