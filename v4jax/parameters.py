"""Every parameter of the model, in one table: names, shape, axes, initial value, precision, use.

The model declares its weights from this table. Checkpoints, Muon, the cost, the layout lab and the
watched groups read it too; none of them looks at a name to find out what a parameter is.

A tensor of a released file is one matrix or vector of one layer, [out, in]. An array of the tree
stacks a group of layers, [in, out]; routed experts are stacked too. {layer} is layers.N or mtp.0,
{block} its place in the tree, such as layers_3_42/block_1 or mtp/block, and {e} an expert.

Shapes, by their letters (`sizes`): V vocabulary, D hidden, X streams, N heads, H head dim, Q
latent of the queries, G output groups, O output rank, I index heads, J index head dim, E experts,
K experts of a token, F expert hidden; M tokens of a window that is compressed, W width of what it
pools. In CSA windows overlap: W is 2 H there, and H in HCA.

Next file to read: v4jax/parameter_tree.py.
"""

import dataclasses
from collections.abc import Callable

from v4jax.config import CSA, WINDOW_ONLY, ModelConfig
from v4jax.initializers import (
    Initializer,
    dynamic_scale,
    hash_table,
    normal,
    ones,
    static_mean,
    static_mix,
    zeros,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParamSpec:
    """What there is to know about a parameter.

    Attributes:
      path: its place in the tree.
      official: its name in released files.
      shape: the names of its sizes (`sizes`) in the tree, less the axis of stacked layers.
      axes: the logical name of each axis.
      init: makes its initial values.
      transpose: whether released files have it the other way round.
      precision: what released instruct models store: "fp8", "mxfp4", "bfloat16", "float32" or
        "int64".
      float32: whether the model computes with it in float32; otherwise in the compute dtype.
      optimizer: "muon", "adamw", or None for what the router keeps.
      uses: the name of a size: how many products of one row a token makes with it.
      where: the layers that have it: "block", all of them and MTP's; "compressed", CSA and HCA;
        "csa"; "hash" and "score", which route by a table and by scores. "mtp" and "model": no
        layer, but MTP's module and the whole model.
      part: the part of the network: "embed", "head", "norm", "attention", "compressor", "indexer",
        "gate", "router", "experts", "shared_experts", "hyper" or "mtp_projection".
    """

    path: str
    official: str
    shape: tuple[str, ...]
    axes: tuple[str | None, ...]
    init: Callable[[ModelConfig], Initializer]
    transpose: bool = False
    precision: str = "float32"
    float32: bool = True
    optimizer: str | None = "adamw"
    uses: str = "0"
    where: str = ""
    part: str = ""

    @property
    def is_low(self) -> bool:
        """Whether some release stores it in low precision."""
        return self.precision in ("fp8", "mxfp4")

    @property
    def is_norm(self) -> bool:
        """Whether it is the weight of a norm."""
        return self.axes == ("norm",)

    @property
    def is_expert(self) -> bool:
        """Whether it stacks routed experts, each a tensor of its own in released files."""
        return self.axes[0] == "experts"

    def size(self, cfg: ModelConfig, ratio: int = WINDOW_ONLY) -> tuple[int, ...]:
        """Its shape in one layer with the compress ratio `ratio`."""
        named = sizes(cfg, ratio)
        return tuple(int(named[name]) for name in self.shape)


def sizes(cfg: ModelConfig, ratio: int = WINDOW_ONLY) -> dict[str, float]:
    """The number behind each name of a size, in a layer with the compress ratio `ratio`."""
    streams, heads, experts = cfg.hc_mult, cfg.num_attention_heads, cfg.n_routed_experts
    return {
        "0": 0,
        "1": 1,
        "3": 3,
        "V": cfg.vocab_size,
        "D": cfg.hidden_size,
        "X": streams,
        "XD": streams * cfg.hidden_size,
        "X(X+2)": streams * (streams + 2),
        "N": heads,
        "H": cfg.head_dim,
        "NH": heads * cfg.head_dim,
        "NH/G": heads // cfg.o_groups * cfg.head_dim,
        "GO": cfg.o_groups * cfg.o_lora_rank,
        "Q": cfg.q_lora_rank,
        "M": ratio,
        "W": cfg.head_dim * (2 if ratio == CSA else 1),
        "I": cfg.index_n_heads,
        "J": cfg.index_head_dim,
        "IJ": cfg.index_n_heads * cfg.index_head_dim,
        "2J": 2 * cfg.index_head_dim,
        "E": experts,
        "K": cfg.num_experts_per_tok,
        "K/E": cfg.num_experts_per_tok / experts,
        "F": cfg.moe_intermediate_size,
    }


# ---- the table -----------------------------------------------------------------------------------
# One line a tensor: path, official name, shape, axes, and what its kind leaves open. The line above
# a module says where it exists, how its paths and its official names begin, and its part.


def _tensor(path, official, shape, axes, init, precision="float32", **others) -> ParamSpec:
    """A tensor that lies in files as it lies in the tree, which AdamW trains in float32."""
    names = tuple(None if axis == "-" else axis for axis in axes.split())
    return ParamSpec(
        path=path,
        official=official,
        shape=tuple(shape.split()),
        axes=names,
        init=init,
        precision=precision,
        **others,
    )


def _norm(path, official, shape, **others) -> ParamSpec:
    """The weight of a norm."""
    return _tensor(path, official, shape, "norm", ones, "bfloat16", **others)


def _router(name, shape, axes, init, precision) -> ParamSpec:
    """What the router keeps, which no optimizer moves."""
    return _tensor(name, name, shape, axes, init, precision, optimizer=None)


def _matrix32(path, official, shape, axes, precision, **others) -> ParamSpec:
    """A matrix that Muon trains, and whose products stay in float32."""
    kind = {"transpose": True, "optimizer": "muon", "uses": "1"} | others
    return _tensor(path, official, shape, axes, normal, precision, **kind)


def _matrix(path, official, shape, axes, precision, **others) -> ParamSpec:
    """A matrix whose products are computed in the compute dtype."""
    return _matrix32(path, official, shape, axes, precision, float32=False, **others)


def _expert(path, official, shape, axes) -> ParamSpec:
    """A matrix of all routed experts of a layer."""
    return _matrix(path, official, shape, axes, "mxfp4", uses="K/E")


def _module(shared: tuple[str, str, str, str], *tensors: ParamSpec) -> tuple[ParamSpec, ...]:
    where, path, official, part = shared
    return tuple(
        dataclasses.replace(
            tensor,
            where=where,
            path=path + tensor.path,
            official=official + tensor.official,
            part=tensor.part or part,
        )
        for tensor in tensors
    )


TABLE: tuple[ParamSpec, ...] = (
    *_module(
        ("model", "embed/", "embed.", "embed"),
        _tensor("weight", "weight", "V D", "vocab embed", normal, "bfloat16", float32=False),
    ),
    *_module(("model", "norm/", "norm.", "norm"), _norm("weight", "weight", "D")),
    *_module(
        ("model", "hc_head/", "hc_head_", "hyper"),
        _matrix32("fn", "fn", "XD X", "streams_embed mix", "float32"),
        _tensor("base", "base", "X", "mix", static_mean),
        _tensor("scale", "scale", "1", "-", dynamic_scale),
    ),
    *_module(
        ("model", "head/", "head.", "head"),
        _matrix("weight", "weight", "D V", "embed vocab", "bfloat16", optimizer="adamw"),
    ),
    *_module(
        ("block", "{block}/", "{layer}.", "norm"),
        _norm("attn_norm/weight", "attn_norm.weight", "D"),
        _norm("ffn_norm/weight", "ffn_norm.weight", "D"),
    ),
    *_module(
        ("block", "{block}/hc_attn/", "{layer}.hc_attn_", "hyper"),
        _matrix32("fn", "fn", "XD X(X+2)", "streams_embed mix", "float32"),
        _tensor("base", "base", "X(X+2)", "mix", static_mix),
        _tensor("scale", "scale", "3", "-", dynamic_scale),
    ),
    *_module(
        ("block", "{block}/hc_ffn/", "{layer}.hc_ffn_", "hyper"),
        _matrix32("fn", "fn", "XD X(X+2)", "streams_embed mix", "float32"),
        _tensor("base", "base", "X(X+2)", "mix", static_mix),
        _tensor("scale", "scale", "3", "-", dynamic_scale),
    ),
    *_module(
        ("block", "{block}/attn/", "{layer}.attn.", "attention"),
        _tensor("attn_sink", "attn_sink", "N", "sinks", zeros),
        _matrix("wq_a", "wq_a.weight", "D Q", "embed q_lora", "fp8"),
        _norm("q_norm/weight", "q_norm.weight", "Q", part="norm"),
        _matrix("wq_b", "wq_b.weight", "Q NH", "q_lora_in heads", "fp8"),
        _matrix("wkv", "wkv.weight", "D H", "embed head_dim", "fp8"),
        _norm("kv_norm/weight", "kv_norm.weight", "H", part="norm"),
        _matrix("wo_a", "wo_a.weight", "NH/G GO", "group_in groups", "fp8"),
        _matrix("wo_b", "wo_b.weight", "GO D", "groups embed", "fp8"),
    ),
    *_module(
        ("compressed", "{block}/attn/compressor/", "{layer}.attn.compressor.", "compressor"),
        _tensor("ape", "ape", "M W", "ape_rows entry", zeros),
        _matrix32("wkv", "wkv.weight", "D W", "embed entry", "bfloat16"),
        _matrix32("wgate", "wgate.weight", "D W", "embed entry", "bfloat16"),
        _norm("norm/weight", "norm.weight", "H"),
    ),
    *_module(
        ("csa", "{block}/attn/indexer/", "{layer}.attn.indexer.", "indexer"),
        _matrix("wq_b", "wq_b.weight", "Q IJ", "q_lora_in index_heads", "fp8"),
        _matrix("weights_proj", "weights_proj.weight", "D I", "embed index_heads", "bfloat16"),
        _tensor("compressor/ape", "compressor.ape", "M 2J", "ape_rows entry", zeros),
        _matrix32("compressor/wkv", "compressor.wkv.weight", "D 2J", "embed entry", "bfloat16"),
        _matrix32("compressor/wgate", "compressor.wgate.weight", "D 2J", "embed entry", "bfloat16"),
        _norm("compressor/norm/weight", "compressor.norm.weight", "J"),
    ),
    *_module(
        ("block", "{block}/ffn/", "{layer}.ffn.", "gate"),
        _matrix32("gate", "gate.weight", "D E", "embed routes", "bfloat16"),
    ),
    *_module(
        ("hash", "router/{block}/ffn/", "{layer}.ffn.gate.", "router"),
        _router("tid2eid", "V K", "table_rows table_slots", hash_table, "int64"),
    ),
    *_module(
        ("score", "router/{block}/ffn/", "{layer}.ffn.gate.", "router"),
        _router("bias", "E", "routes", zeros, "float32"),
    ),
    *_module(
        ("block", "{block}/ffn/experts/", "{layer}.ffn.experts.{e}.", "experts"),
        _expert("w1", "w1.weight", "E D F", "experts expert_embed expert_hidden"),
        _expert("w2", "w2.weight", "E F D", "experts expert_hidden expert_embed"),
        _expert("w3", "w3.weight", "E D F", "experts expert_embed expert_hidden"),
    ),
    *_module(
        ("block", "{block}/ffn/shared_experts/", "{layer}.ffn.shared_experts.", "shared_experts"),
        _matrix("w1", "w1.weight", "D F", "embed hidden", "fp8"),
        _matrix("w2", "w2.weight", "F D", "hidden embed", "fp8"),
        _matrix("w3", "w3.weight", "D F", "embed hidden", "fp8"),
    ),
    *_module(
        ("mtp", "mtp/", "mtp.0.", "mtp_projection"),
        _matrix("e_proj", "e_proj.weight", "D D", "embed embed_out", "fp8"),
        _matrix("h_proj", "h_proj.weight", "D D", "embed embed_out", "fp8", uses="X"),
        _norm("enorm/weight", "enorm.weight", "D", part="norm"),
        _norm("hnorm/weight", "hnorm.weight", "D", part="norm"),
        _norm("norm/weight", "norm.weight", "D", part="norm"),
    ),
    *_module(
        ("mtp", "mtp/hc_head/", "mtp.0.hc_head_", "hyper"),
        _matrix32("fn", "fn", "XD X", "streams_embed mix", "float32"),
        _tensor("base", "base", "X", "mix", static_mean),
        _tensor("scale", "scale", "1", "-", dynamic_scale),
    ),
)
