"""How rotary embedding is stretched for contexts longer than those of pretraining.

Next file to read: v4jax/config/json_styles.py.
"""

import dataclasses

from v4jax.config.validation import is_number


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
        numbers = all(is_number(value) for value in dataclasses.astuple(self))
        if (
            not numbers
            or not (self.factor >= 1 and self.original_max_position_embeddings >= 1)
            or not self.beta_fast > self.beta_slow > 0
        ):
            raise ValueError(
                f"rope_scaling: got {dataclasses.asdict(self)}; allowed: factor >= 1, "
                "original_max_position_embeddings >= 1, beta_fast > beta_slow > 0"
            )
