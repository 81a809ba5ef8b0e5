"""Everything that defines a training run, in one frozen dataclass.

A file in configs/ builds it in `get_config()`.

Next file to read: v4jax/train/prepare.py.
"""

import dataclasses
from typing import Annotated, Literal

from tyro.conf import AvoidSubcommands
from tyro.constructors import PrimitiveConstructorSpec

from sharding.mesh import parse_mesh
from sharding.rules import AxisRules, rules_of
from v4jax.adapters.config import Lora, check_lora
from v4jax.checkpoint.formats import FORMATS
from v4jax.config import CSA, ModelConfig
from v4jax.data.config import DataConfig
from v4jax.kernels.choice import kernels_from
from v4jax.python_files import read_layout
from v4jax.quant.fake import check_quant
from v4jax.remat import policy_name
from v4jax.storage import checkpoint_name, local_path, place
from v4jax.train.losses.distill import Distill
from v4jax.train.losses.dpo import Dpo
from v4jax.train.losses.weights import LossWeights
from v4jax.train.objective import check_objective
from v4jax.train.profile import profiled_steps
from v4jax.train.stability import StabilityConfig
from v4jax.train.stages import Stage, check_stages
from v4jax.train.trackers import tracker_names

_LAYOUT_FLAG = PrimitiveConstructorSpec(
    nargs=1,
    metavar="NAME|FILE.py:NAME",
    instance_from_str=lambda words: read_layout(words[0]),
    is_instance=lambda value: isinstance(value, (AxisRules, str)),
    str_from_instance=lambda value: [str(value)],
)
"""How the command line reads and shows --layout."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One run. Every field can be overridden on the command line."""

    model: ModelConfig
    """The architecture: fields of the official config.json."""
    data: DataConfig = DataConfig()
    """Which text to train on, and how it becomes rows."""
    loss: LossWeights = LossWeights()
    """Weights of the terms of the loss."""
    objective: Literal["next_token", "dpo", "distill"] = "next_token"
    """What is learned: next_token (text; of conversations, what the assistant wrote), dpo (to
    prefer the chosen answers of data.format preference), or distill (the distributions of
    distill.teachers). The last two need lora, whose frozen base is that of reference and teachers;
    MTP has no loss in them."""
    dpo: Dpo = Dpo()
    """Settings of objective dpo."""
    distill: Distill = Distill()
    """Settings of objective distill."""
    stability: StabilityConfig = StabilityConfig()
    """What counts as a loss spike, and what the run does about it."""
    run_dir: str
    """Folder, here or in a bucket (gs://, s3://), that the run writes everything to. If it already
    holds a run of the same model, that run resumes."""
    mesh: str = ""
    """Axis sizes such as "data=2,expert=4" (axes: slice, data, fsdp, context, expert, tensor);
    empty: one device."""
    layout: Annotated[AxisRules | str, _LAYOUT_FLAG] = "full"
    """Sharding layout: full, dp, fsdp, ep, ep_fsdp, ep_tp, cp_ep or pod, or one of your own
    (in Python an AxisRules that sharding.rules.layout made)."""
    steps: int
    """Optimizer steps of the whole run, 1 or more."""
    batch_size: int
    """Rows (sequences) a step, over all devices; 1 or more."""
    gradient_accumulation: int | Literal["auto"] = 1
    """Micro-batches a step: batch_size / gradient_accumulation rows run at once, and memory is that
    of so many rows. 1 or more, a divisor of batch_size; auto: the fewest whose memory, estimated,
    the devices have."""
    gather: str = "micro_batch"
    """When weights that FSDP cuts are gathered: micro_batch (layer by layer, where they are used),
    or step (once a step, all of them, and held in the compute dtype until its last micro-batch)."""
    seq_len: int
    """Tokens a row, from 2 to the model's max_position_embeddings."""
    dtype: str = "float32"
    """Compute dtype, float32 or bfloat16. Weights are float32 in either case."""
    quant: str = "none"
    """none, or official: train with the fp8 and MXFP4 numbers that the served model computes
    with."""
    kernels: str = ""
    """Implementations of ops: reference, or pairs such as top_k=bisection,matmul=reference
    (v4jax/kernels/README.md lists them); empty: the best of the platform. Another platform's
    kernel is interpreted, slowly."""
    remat: str = "layer"
    """What the backward pass recomputes instead of keeping it: none, layer (whole layers),
    attention (what attention computes inside), experts (the same of experts), dots (all but
    products with weights), or offload (as layer; what is kept lies in the host's memory). In Python
    True is layer and False is none."""
    attention: str = "sparse"
    """How CSA layers choose entries: sparse (the indexer's best), dense (all visible ones), or
    indexer (dense, and only the indexer learns)."""
    learning_rate: float
    """Peak learning rate, above 0."""
    index_learning_rate: float = 0.0
    """The indexer's peak learning rate, on the same schedule; 0: the indexer does not learn.
    With attention dense it never learns."""
    warmup_steps: int = 2000
    """Steps of linear warm-up from 0 to the peak; 0 or more."""
    decay_steps: int = 0
    """Last steps of the run, over which a cosine lowers the rate; at most steps - warmup_steps."""
    final_lr_ratio: float = 0.1
    """Learning rate at the end, as a share of the peak; 0 to 1."""
    weight_decay: float = 0.1
    """Decoupled weight decay a step, relative to the learning rate; 0 or more."""
    momentum: float = 0.95
    """Muon's momentum, in [0, 1)."""
    momentum_dtype: str = "float32"
    """How Muon's momentum is stored: float32 or bfloat16. It is computed in float32."""
    moment_dtype: str = "float32"
    """The same of AdamW's moments."""
    optimizer_memory: str = "device"
    """Where the state of Muon and AdamW lies between steps: device, or host (the host's memory,
    where the platform has it)."""
    newton_schulz_dtype: str = "float32"
    """Factors of the products by which Muon orthogonalises: float32 or bfloat16. Sums are
    float32."""
    clip_norm: float = 1.0
    """Largest global gradient norm; gradients above it are scaled down. Above 0."""
    bias_rate: float | None = None
    """How far the router's selection bias moves in a step, 0 or more. None: 1e-3, and 0 when
    training on conversations or with lora."""
    log_every: int = 10
    """Steps between lines of metrics, 1 or more."""
    watch_every: int = 0
    """Steps between measurements inside the model (loads, gates, gradients, updates); 0: never."""
    eval_every: int = 100
    """Steps between evaluations on held-out text, 1 or more."""
    eval_batches: int = 8
    """Held-out batches of an evaluation, at most; 0: no evaluation."""
    checkpoint_every: int = 100
    """Steps between checkpoints, 1 or more. The last step is always saved."""
    keep: int = 2
    """Newest checkpoints that are kept, 1 or more."""
    keep_every: int = 0
    """Also keep the checkpoint of every this many steps; 0: none."""
    keep_best: int = 0
    """Also keep this many checkpoints with the lowest held-out loss; 0: none."""
    init_from: str = ""
    """Checkpoint of any kind, or org/name[@revision] of the Hub, to take the first weights from;
    empty: random weights. A run with checkpoints of its own resumes from those. With lora it is
    the frozen base, which every start reads."""
    lora: AvoidSubcommands[Lora | None] = None
    """Train low-rank adapters of init_from's weights instead of these (docs/lora.md); None: all
    weights. --lora.rank and its other fields turn it on."""
    strict: bool = False
    """Stop if the newest checkpoint is damaged, instead of resuming from an older one."""
    export: str = "bfloat16"
    """Format of the official safetensors written at the end: float32, bfloat16, fp8, official,
    or none. With lora, anything but none writes the adapter instead (docs/lora.md)."""
    sample_prompt: str = ""
    """Text that the finished model continues in sample.txt."""
    sample_tokens: int = 0
    """Tokens of that sample; 0: no sample."""
    trackers: str = ""
    """Services that get the metrics too: wandb, mlflow, or both with a comma between them; empty:
    none (docs/training.md#trackers)."""
    profile: str = ""
    """Steps to trace, as FIRST:COUNT, such as 10:3; the trace goes to RUN_DIR/profile
    (docs/profiling.md). Empty: none."""
    compile_cache: str = ""
    """Folder in which compiled programs are kept, so that a run that starts again compiles
    nothing; empty: none."""
    seed: int = 0
    """Seed of the initial weights, an integer."""
    stages: tuple[Stage, ...] = ()
    """Changes during the run, in order (v4jax/train/stages.py). Evaluation keeps the first
    stage's batch size and length."""

    def __post_init__(self):
        object.__setattr__(self, "remat", policy_name(self.remat))
        _check_places(self)
        _check_choices(self)
        _check_sizes(self)
        _check_rates(self)
        _check_indexer(self)
        _check_rollbacks(self)
        check_objective(self)
        check_lora(self)
        tracker_names(self.trackers)
        profiled_steps(self.profile, self.steps)
        check_stages(self)

    @property
    def micro_batches(self) -> int:
        """gradient_accumulation as a number."""
        count = self.gradient_accumulation
        assert count != "auto", (
            "v4jax/planner/micro_batches.py chooses a number before anything runs"
        )
        return count

    @property
    def router_bias_rate(self) -> float:
        """`bias_rate`, or its default: 1e-3, and 0 for conversations and with lora."""
        if self.bias_rate is not None:
            return self.bias_rate
        return 0.0 if self.data.masked or self.lora is not None else 1e-3


def _check_places(cfg: TrainConfig) -> None:
    """Folders, the mesh and what lies where on it."""
    if cfg.run_dir != "":
        place(cfg.run_dir, "run_dir")
    if cfg.compile_cache != "":
        local_path(cfg.compile_cache, "compile_cache")
    if cfg.init_from != "":
        checkpoint_name(cfg.init_from, "init_from")
    parse_mesh(cfg.mesh)
    rules_of(cfg.layout)


def _check_choices(cfg: TrainConfig) -> None:
    """Fields that name one of a few things."""
    kernels_from(cfg.kernels)
    for name in ("dtype", "momentum_dtype", "moment_dtype", "newton_schulz_dtype"):
        _allow(cfg, name, ("float32", "bfloat16"))
    _allow(cfg, "export", (*FORMATS, "none"))
    _allow(cfg, "gather", ("micro_batch", "step"))
    _allow(cfg, "attention", ("sparse", "dense", "indexer"))
    _allow(cfg, "optimizer_memory", ("device", "host"))
    check_quant(cfg.model, cfg.quant)


def _check_sizes(cfg: TrainConfig) -> None:
    """Counts of steps, rows, tokens, batches and checkpoints."""
    for name in ("steps", "batch_size", "log_every", "eval_every", "checkpoint_every", "keep"):
        _require(cfg, name, getattr(cfg, name) >= 1, "at least 1")
    for name in ("warmup_steps", "decay_steps", "eval_batches", "sample_tokens"):
        _require(cfg, name, getattr(cfg, name) >= 0, "0 or above")
    for name in ("keep_every", "keep_best", "watch_every"):
        _require(cfg, name, getattr(cfg, name) >= 0, "0 or above")
    parts, limit = cfg.gradient_accumulation, cfg.model.max_position_embeddings
    divides = parts == "auto" or (parts >= 1 and cfg.batch_size % parts == 0)
    rule = f"auto, or a divisor of batch_size={cfg.batch_size}"
    _require(cfg, "gradient_accumulation", divides, rule)
    _require(cfg, "seq_len", cfg.seq_len >= 2, "at least 2")
    _require(cfg, "seq_len", cfg.seq_len <= limit, f"at most max_position_embeddings={limit}")
    left = cfg.steps - cfg.warmup_steps
    _require(cfg, "decay_steps", cfg.decay_steps <= left, f"at most steps - warmup_steps = {left}")


def _check_rates(cfg: TrainConfig) -> None:
    """Numbers of the optimizer and its schedule."""
    for name in ("learning_rate", "clip_norm"):
        _require(cfg, name, getattr(cfg, name) > 0, "above 0")
    for name in ("index_learning_rate", "weight_decay", "router_bias_rate"):
        _require(cfg, name, getattr(cfg, name) >= 0, "0 or above")
    _require(cfg, "momentum", 0 <= cfg.momentum < 1, "in [0, 1)")
    _require(cfg, "final_lr_ratio", 0 <= cfg.final_lr_ratio <= 1, "in [0, 1]")


def _check_indexer(cfg: TrainConfig) -> None:
    """An indexer learns only where there is one, and must where nothing else does."""
    name, rate = "index_learning_rate", cfg.index_learning_rate
    if cfg.attention == "indexer":
        _require(cfg, name, rate > 0, "above 0 with attention 'indexer'")
    has_one = CSA in cfg.model.compress_ratios
    rule = "0 for a model without CSA layers, which has no indexer"
    _require(cfg, name, has_one or rate == 0, rule)


def _check_rollbacks(cfg: TrainConfig) -> None:
    """With rollbacks an older checkpoint must be there: the newest may not be proven good yet."""
    if cfg.stability.rollbacks == 0:
        return
    proven, every = cfg.stability.proven, cfg.checkpoint_every
    _require(cfg, "keep", cfg.keep >= 2, "at least 2 with stability.rollbacks")
    _require(cfg, "checkpoint_every", every > proven, f"above stability.proven={proven}")


def _allow(cfg: TrainConfig, name: str, allowed: tuple[str, ...]) -> None:
    if getattr(cfg, name) not in allowed:
        raise ValueError(f"{name}: got {getattr(cfg, name)!r}; allowed: {', '.join(allowed)}")


def _require(cfg: TrainConfig, name: str, holds: bool, rule: str) -> None:
    if not holds:
        raise ValueError(f"{name}: got {getattr(cfg, name)}; must be {rule}")
