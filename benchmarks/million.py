"""A million tokens: 1,048,576 tokens prefilled in chunks, then 32 decoded, by a small model.

    python benchmarks/million.py [--tokens 1048576] [--storage official]    # minutes on two cores
    python benchmarks/million.py --decode-only       # the times per token alone: a minute

The model has layers of every kind. The table has the time of a decoded token at 16K and at the end
(bar: at most 4 times as much), what a token reads, and the seconds that those bytes take at the
measured read rate. Bytes are those of the cache's real arrays: rings and weights whole, entries and
index keys as far as they are in use, and the chosen entries of CSA. The script ends with an error
if the process used 8 GB or more.
"""

import argparse
import os
import resource
import time

TOKENS, SHORT, NEW, STEPS, STRETCH = 2**20, 2**14, 32, 8, 2**16
LIMIT = 8e9
"""Bytes that the process may use."""


def get_model():
    from v4jax.config import ModelConfig

    return ModelConfig(
        vocab_size=512,
        hidden_size=64,
        moe_intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=2,
        head_dim=32,
        qk_rope_head_dim=16,
        q_lora_rank=32,
        o_groups=2,
        o_lora_rank=32,
        n_routed_experts=8,
        num_experts_per_tok=2,
        routed_scaling_factor=1.5,
        compress_ratios=(0, 4, 128),
        num_hash_layers=1,
        num_nextn_predict_layers=0,
        sliding_window=128,
        index_n_heads=1,
        index_head_dim=32,
        index_topk=128,
        compress_rope_theta=160000.0,
        max_position_embeddings=TOKENS + 4 * NEW,
    )


def read_rate() -> float:
    """Bytes per second of a sum over 256 MB, best of five."""
    import jax
    import jax.numpy as jnp

    x, add = jnp.ones(2**26), jax.jit(jnp.sum)
    add(x).block_until_ready()
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        add(x).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return x.nbytes / min(seconds)


def traffic(cfg, cache, tokens: int) -> dict[str, float]:
    """Bytes that a decoded token reads, by array; scores are written and read once."""
    import jax

    from v4jax.config import CSA
    from v4jax.cost import cost

    def size(tree) -> float:
        return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))

    parts = dict.fromkeys(
        ("weights", "rings", "HCA entries", "CSA entries", "index keys", "index scores"), 0.0
    )
    parts["weights"] = 4 * cost(cfg, tokens).total.active
    for group in cfg.layer_groups:
        for i, kind in enumerate(group.kinds):
            layer, ratio = cache.layers[group.name][f"block_{i}"], kind.compress_ratio
            parts["rings"] += size(
                (
                    layer.window,
                    layer.entry and (layer.entry.c, layer.entry.z),
                    layer.index and (layer.index.c, layer.index.z),
                )
            )
            if layer.entry is None:
                continue
            slots = jax.tree.leaves(layer.entry.slots)[0].shape[2]
            used = tokens // ratio
            seen = min(used, cfg.index_topk) if ratio == CSA else used
            parts[f"{'CSA' if ratio == CSA else 'HCA'} entries"] += (
                size(layer.entry.slots) * seen / slots
            )
            if layer.index is not None:
                parts["index keys"] += size(layer.index.slots) * used / slots
                parts["index scores"] += 2 * 4 * used * group.repeats
    return parts


class Run:
    """One row, from its first token to its last."""

    def __init__(self, storage: str, tokens: int):
        import jax
        import numpy as np

        from v4jax.functional import init_params
        from v4jax.generate.cache import split_layers
        from v4jax.generate.steps import DecodeConfig

        self.cfg = get_model()
        self.params = split_layers(self.cfg, init_params(self.cfg, jax.random.key(0)))
        self.decoding = DecodeConfig(
            storage=storage, quant="official" if storage == "official" else "none"
        )
        self.capacity, self.seed_B = tokens + 4 * NEW, np.zeros(1, np.uint32)
        self.tokens = np.random.default_rng(0).integers(2, self.cfg.vocab_size, tokens).tolist()
        self.done, self.state, self.output = 0, None, None

    def prefill(self, until: int) -> None:
        """Prefills up to `until` tokens of the text, in chunks (v4jax/generate/decode.py)."""
        from v4jax.generate.steps import prefill

        start, first = time.perf_counter(), self.done
        while self.done < until:
            part = self.tokens[self.done : min(self.done + STRETCH, until)]
            cache = None if self.state is None else self.state.cache
            self.state, self.output = prefill(
                self.cfg, self.decoding, self.params, [part], self.seed_B, self.capacity, cache
            )
            self.output.token_PBN.block_until_ready()
            self.done += len(part)
            spent = time.perf_counter() - start
            print(
                f"prefill: {self.done:8d} of {len(self.tokens)} tokens, {spent:6.1f} s, "
                f"{1e6 * spent / (self.done - first):5.0f} us a token, "
                f"peak {peak() / 1e9:.2f} GB",
                flush=True,
            )

    def skip(self, until: int) -> None:
        """Sets the cache as if there were `until` tokens; their values change no time."""
        import jax.numpy as jnp

        self.state = self.state._replace(
            cache=self.state.cache._replace(length_B=jnp.full(1, until, jnp.int32))
        )
        self.done = until

    def decode(self, tokens: int) -> float:
        """Seconds a token."""
        from v4jax.generate.decode import decode
        from v4jax.generate.steps import State

        start = time.perf_counter()
        (completion,), cache = decode(
            self.cfg,
            self.decoding,
            self.params,
            self.state,
            self.output,
            self.seed_B,
            lambda *_: False,
            [tokens + 1],
        )
        seconds = (time.perf_counter() - start) / tokens
        import jax.numpy as jnp

        self.state = State(cache, jnp.asarray(completion.tokens[-1:], jnp.int32), None)
        return seconds


def peak() -> float:
    return 1024.0 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=TOKENS)
    parser.add_argument("--storage", default="dtype", choices=("dtype", "official"))
    parser.add_argument(
        "--decode-only", action="store_true", help="no prefill: the length of the cache is set"
    )
    arguments = parser.parse_args()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from sharding.mesh import simulate_devices

    simulate_devices(1)  # as the command line does: keeps freed memory
    run, rows, seconds = Run(arguments.storage, arguments.tokens), [], {}
    rate = read_rate()
    start = time.perf_counter()
    for until in (SHORT, arguments.tokens - NEW):
        if arguments.decode_only and until > SHORT:
            run.skip(until)
        else:
            run.prefill(until)
        run.decode(STEPS)  # the first call compiles
        seconds[until] = run.decode(NEW)
        rows.append((until, seconds[until], traffic(run.cfg, run.state.cache, until)))
    print(
        f"all in {time.perf_counter() - start:.0f} s; read rate {rate / 1e9:.1f} GB/s; peak "
        f"{peak() / 1e9:.2f} GB"
    )
    names = list(rows[0][2])
    print(
        "tokens    ms a token   bytes read "
        + "".join(f"{name:>15s}" for name in names)
        + "   ms at the read rate"
    )
    for tokens, time_each, parts in rows:
        total = sum(parts.values())
        print(
            f"{tokens:8d} {1e3 * time_each:10.2f} {total / 1e6:11.2f}M "
            + "".join(f"{parts[name] / 1e6:14.2f}M" for name in names)
            + f" {1e3 * total / rate:12.2f}"
        )
    (_, short, few), (_, long, many) = rows
    more = sum(many.values()) - sum(few.values())
    print(
        f"a token at the end / at 16K: {long / short:.2f} (bar 4); {1e3 * (long - short):.2f} "
        f"ms more, {more / 1e6:.1f} MB more: {more / (long - short) / 1e9:.1f} GB/s"
    )
    if peak() > LIMIT:
        raise SystemExit(f"held {peak() / 1e9:.1f} GB; the bar is {LIMIT / 1e9:.0f}")


if __name__ == "__main__":
    main()
