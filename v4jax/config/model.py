"""The configuration of a DeepSeek-V4 model: one frozen dataclass that validates itself.

Its fields are spelled like config.json. Layer kinds, scan groups and parameter shapes are derived
from it. It reads the official style of config.json and the style that transformers 5 writes, and
writes the official one.

Next file to read: v4jax/config/layers.py.
"""

import dataclasses
from collections.abc import Iterable
from typing import Any

from v4jax.config.json_styles import FIXED, official_style, read_config_json, read_rope_scaling
from v4jax.config.layers import LayerGroup, LayerKind, groups_of
from v4jax.config.rope import RopeScaling
from v4jax.config.validation import check
from v4jax.storage import Remote, checkpoint_path


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A DeepSeek-V4 architecture. Fields have the names and meanings of the official config.json.

    `compress_ratios` has one number per layer (0 window only, 4 CSA, 128 HCA; another divisor of
    128 pools as HCA does), then one 0 per MTP layer.

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
        check(self)

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
        return groups_of(self.layer_kinds)

    # ---- files -----------------------------------------------------------------------------------

    @classmethod
    def from_json(cls, path) -> "ModelConfig":
        """Reads config.json, or a directory that has one, of official or transformers 5 style."""
        path = checkpoint_path(path, "path")
        if path.is_dir():
            path = path / "config.json"
        elif not isinstance(path, Remote):
            path = path.resolve()
        raw = read_config_json(path)
        try:
            return cls.from_dict(raw)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> "ModelConfig":
        """Builds the config from the contents of config.json.

        Keys that describe neither weights nor equations are ignored. Of a release with a DSpark
        drafter or a vision tower it is the trunk (v4jax/config/releases.py).

        Raises:
          ValueError: another architecture, a fixed choice that differs, or a missing key.
        """
        raw = official_style(raw)
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
            values["rope_scaling"] = read_rope_scaling(values["rope_scaling"])
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """The official config.json, which `from_dict`, transformers, vLLM and SGLang read."""
        raw: dict[str, Any] = {
            "architectures": ["DeepseekV4ForCausalLM"],
            "model_type": "deepseek_v4",
        }
        raw |= dataclasses.asdict(self) | FIXED
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
