"""Everything that defines a training run, in one frozen dataclass. A file in configs/ builds it in `get_config()`.

Next file to read: v4jax/train/loop.py.
"""

import dataclasses

from sharding.mesh import parse_mesh
from sharding.rules import LAYOUTS
from v4jax.checkpoint.formats import FORMATS
from v4jax.config import CSA, ModelConfig
from v4jax.quant.fake import check_quant
from v4jax.data.config import DataConfig
from v4jax.train.loss import LossWeights
from v4jax.train.stability import StabilityConfig
from v4jax.train.stages import Stage, check_stages


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One run. Every field can be overridden on the command line.

    Attributes:
      model: architecture. data: text and tokenizer. loss: weights of the loss's parts. stability: what is done about spikes.
      run_dir: where everything is written; an existing run of the same model is resumed.
      mesh: axis sizes such as "data=2,expert=4"; empty: one device. layout: name of the sharding layout.
      steps, batch_size, seq_len: optimizer steps, rows per step (global), tokens per row.
      dtype: compute dtype; weights and optimizer are float32. quant: "official" trains
        with the low-precision numbers of the served model (QAT). remat: recompute layers in the backward pass.
      attention: of CSA layers: "sparse", "dense" (every visible entry) or "indexer" (dense, and nothing but the indexer learns).
      index_learning_rate: the indexer's peak, on the same schedule; 0: nothing trains it. "dense" leaves it as it is.
      learning_rate: peak. warmup_steps, decay_steps: linear up, cosine down to final_lr_ratio at the end.
      clip_norm: largest global gradient norm. bias_rate: speed of the router's selection bias (None: 1e-3, and 0 where
        conversations are trained on: fine-tuning keeps the balance it was given).
      watch_every: steps between looks inside (train/watch.py); 0: none.
      log_every, eval_every, checkpoint_every: steps. eval_batches: held-out batches per evaluation. keep: newest checkpoints kept;
        keep_every: and those of every so many steps; keep_best: and so many of the least held-out loss.
      init_from: weights to start from, of a checkpoint of any kind (a run that has checkpoints resumes from its own).
      strict: stop where the newest checkpoint is damaged, instead of going back to an older one.
      export: write official safetensors at the end ("float32", "bfloat16", "fp8", "official" or "none").
      sample_prompt, sample_tokens: continued at the end, as a look at the model; 0 tokens: no sample.
      seed: of the initial weights.
      stages: what changes later, in order (train/stages.py); evaluation keeps the first stage's rows.
    """

    model: ModelConfig
    data: DataConfig = DataConfig()
    loss: LossWeights = LossWeights()
    stability: StabilityConfig = StabilityConfig()
    run_dir: str
    mesh: str = ""
    layout: str = "full"
    steps: int
    batch_size: int
    seq_len: int
    dtype: str = "float32"
    quant: str = "none"
    remat: bool = True
    attention: str = "sparse"
    learning_rate: float
    index_learning_rate: float = 0.0
    warmup_steps: int = 2000
    decay_steps: int = 0
    final_lr_ratio: float = 0.1
    weight_decay: float = 0.1
    momentum: float = 0.95
    clip_norm: float = 1.0
    bias_rate: float | None = None
    log_every: int = 10
    watch_every: int = 0
    eval_every: int = 100
    eval_batches: int = 8
    checkpoint_every: int = 100
    keep: int = 2
    keep_every: int = 0
    keep_best: int = 0
    init_from: str = ""
    strict: bool = False
    export: str = "bfloat16"
    sample_prompt: str = ""
    sample_tokens: int = 0
    seed: int = 0
    stages: tuple[Stage, ...] = ()

    def __post_init__(self):
        parse_mesh(self.mesh)
        _allow(self, "layout", tuple(LAYOUTS))
        _allow(self, "dtype", ("float32", "bfloat16"))
        _allow(self, "export", (*FORMATS, "none"))
        _allow(self, "attention", ("sparse", "dense", "indexer"))
        check_quant(self.model, self.quant)
        for name in ("steps", "batch_size", "log_every", "eval_every", "checkpoint_every", "keep"):
            _require(self, name, getattr(self, name) >= 1, "at least 1")
        _require(self, "seq_len", self.seq_len >= 2, "at least 2")
        for name in ("warmup_steps", "decay_steps", "eval_batches", "sample_tokens", "router_bias_rate", "weight_decay", "keep_every", "keep_best",
                     "watch_every", "index_learning_rate"):
            _require(self, name, getattr(self, name) >= 0, "0 or above")
        for name in ("learning_rate", "clip_norm"):
            _require(self, name, getattr(self, name) > 0, "above 0")
        if self.attention == "indexer":
            _require(self, "index_learning_rate", self.index_learning_rate > 0, "above 0 with attention 'indexer'")
        if self.index_learning_rate:
            _require(self, "index_learning_rate", CSA in self.model.compress_ratios, "0 for a model without CSA layers, which has no indexer")
        _require(self, "momentum", 0 <= self.momentum < 1, "in [0, 1)")
        _require(self, "final_lr_ratio", 0 <= self.final_lr_ratio <= 1, "in [0, 1]")
        _require(self, "decay_steps", self.warmup_steps + self.decay_steps <= self.steps,
                 f"at most steps - warmup_steps = {self.steps - self.warmup_steps}")  # fmt: skip
        if self.stability.rollbacks:  # the newest checkpoint may not be known to be good yet
            _require(self, "keep", self.keep >= 2, "at least 2 with stability.rollbacks")
            _require(self, "checkpoint_every", self.checkpoint_every > self.stability.proven,
                     f"above stability.proven={self.stability.proven}")  # fmt: skip
        check_stages(self)
        _require(self, "seq_len", self.seq_len <= self.model.max_position_embeddings,
                 f"at most max_position_embeddings={self.model.max_position_embeddings}")  # fmt: skip

    @property
    def router_bias_rate(self) -> float:
        return (0.0 if self.data.masked else 1e-3) if self.bias_rate is None else self.bias_rate


def _allow(cfg: TrainConfig, name: str, allowed: tuple[str, ...]) -> None:
    if getattr(cfg, name) not in allowed:
        raise ValueError(f"{name}: got {getattr(cfg, name)!r}; allowed: {', '.join(allowed)}")


def _require(cfg: TrainConfig, name: str, holds: bool, rule: str) -> None:
    if not holds:
        raise ValueError(f"{name}: got {getattr(cfg, name)}; must be {rule}")
