"""Learning rate: linear warm-up, constant, cosine decay (docs/equations.md#schedule).

Next file to read: v4jax/train/muon.py.
"""

import optax


def learning_rate(
    peak: float, steps: int, warmup_steps: int, decay_steps: int, final_ratio: float
) -> optax.Schedule:
    """The rate of each step, counted from 0.

    It rises to `peak` over `warmup_steps`, starting at peak / warmup_steps, and falls to
    final_ratio * peak over the last `decay_steps`.
    """
    warm = optax.linear_schedule(peak / max(warmup_steps, 1), peak, max(warmup_steps - 1, 1))
    decay = optax.cosine_decay_schedule(peak, max(decay_steps, 1), alpha=final_ratio)
    return optax.join_schedules(
        [warm, optax.constant_schedule(peak), decay], [warmup_steps, steps - decay_steps]
    )
