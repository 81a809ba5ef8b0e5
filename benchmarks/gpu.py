"""What only a GPU can show: agreement of kernels and model with plain ones, and kernels' rates.

    python benchmarks/gpu.py     # needs an NVIDIA GPU and jax[cuda13]; minutes, mostly compiling

The kernels (v4jax/kernels/expert_ffn/gpu.py) are compared with the loop over blocks that CPUs run.
Loss and gradients of the demo's model in float32 on the GPU are compared with those on this
machine's CPU. The error is the largest difference of an array over its largest number.
"""

import functools
import os
import time

os.environ.setdefault("JAX_PLATFORMS", "cuda,cpu")

import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))
from configs import demo
from sharding.experts import Groups
from v4jax.functional import init_params
from v4jax.kernels.expert_ffn import gpu
from v4jax.kernels.expert_ffn.formulas import Activation, ExpertWeights
from v4jax.kernels.expert_ffn.op import expert_ffn
from v4jax.train.loss import loss_and_routing


def case(dtype, experts: int, width: int, hidden: int, size: int, blocks: int):
    """(weights, x, gate, groups, cotangent), with uneven loads.

    One expert has no rows, and some blocks are not in use.
    """
    sizes = np.random.default_rng(0).multinomial(
        blocks - experts // 2, np.full(experts, 1 / experts)
    )
    sizes[0], sizes[1] = sizes[0] + sizes[1], 0
    used = int(sizes.sum())
    by_block = np.concatenate(
        (np.repeat(np.arange(experts), sizes), np.full(blocks - used, experts - 1))
    )
    groups = Groups(
        jnp.asarray(sizes * size, jnp.int32), jnp.asarray(by_block, jnp.int32), jnp.int32(used)
    )
    keys = jax.random.split(jax.random.key(0), 6)
    shapes = (experts, width, hidden), (experts, width, hidden), (experts, hidden, width)
    w = ExpertWeights(
        *(
            jax.random.normal(key, shape) * shape[1] ** -0.5
            for key, shape in zip(keys, shapes, strict=True)
        )
    )
    x, ct = (jax.random.normal(key, (blocks * size, width)).astype(dtype) for key in keys[3:5])
    gate = jnp.where(
        jnp.arange(blocks * size) < used * size, jax.random.uniform(keys[5], (blocks * size,)), 0
    )
    return w, x, gate, groups, ct


def experts(w, x, gate, groups, ct, implementation=None):
    """The experts' output and its gradients."""
    y, pull = jax.vjp(
        lambda *args: expert_ffn(Activation(10.0), *args, groups, implementation), w, x, gate
    )
    return y, pull(ct)


LOOP = functools.partial(experts, implementation="blocked")


def difference(got, expected) -> float:
    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True)
    pairs = ((np.asarray(a, np.float32), np.asarray(b, np.float32)) for a, b in pairs)
    return max(float(np.abs(a - b).max() / max(np.abs(b).max(), 1e-30)) for a, b in pairs)


def seconds(function, *args) -> float:
    """Seconds of one call: the best of four means of three."""
    jax.block_until_ready(function(*args))
    times = []
    for _ in range(4):
        start = time.perf_counter()
        for _ in range(3):
            out = function(*args)
        jax.block_until_ready(out)
        times.append((time.perf_counter() - start) / 3)
    return min(times)


def kernels() -> None:
    for dtype in (jnp.float32, jnp.bfloat16):
        args = case(dtype, experts=8, width=160, hidden=96, size=32, blocks=40)
        got = jax.jit(experts)(*args)
        expected = jax.jit(LOOP)(*args)
        print(
            f"kernels against the loop, {dtype.__name__}: {difference(got, expected):.1e}",
            flush=True,
        )
    w, x, gate, groups, ct = case(
        jnp.bfloat16, experts=32, width=2048, hidden=1024, size=128, blocks=512
    )
    flops = 2 * int(groups.group_sizes.sum()) * w.w1.shape[1] * w.w1.shape[2]
    one, hidden = w.w1.astype(jnp.bfloat16), ct[:, : w.w1.shape[2]]

    def rate(times, taken):
        return f"{taken * 1e3:.1f} ms, {times * flops / taken / 1e12:.0f} TFLOP/s"

    print("grouped_dot:", rate(1, seconds(jax.jit(gpu.grouped_dot), x, one, groups)))
    print("grouped_outer:", rate(1, seconds(jax.jit(gpu.grouped_outer), x, hidden, groups)))
    print(
        "experts, forward and backward, kernels:",
        rate(9, seconds(jax.jit(experts), w, x, gate, groups, ct)),
    )
    print(
        "experts, forward and backward, loop:",
        rate(9, seconds(jax.jit(LOOP), w, x, gate, groups, ct)),
        flush=True,
    )


def whole_model() -> None:
    cfg = demo.get_model()
    tokens = np.random.default_rng(0).integers(0, cfg.vocab_size, (4, 384)).astype(np.int32)
    found = {}
    cpu = jax.devices("cpu")[0]
    with jax.default_device(cpu):
        initial = init_params(cfg, jax.random.key(0))
    for device in (cpu, jax.devices()[0]):
        with jax.default_device(device):
            params = jax.device_put(initial, device)
            router = params["router"]
            loss = jax.value_and_grad(
                lambda weights, router: loss_and_routing(
                    cfg, weights | {"router": router}, {"tokens": tokens}
                )[0]
            )
            weights = {name: value for name, value in params.items() if name != "router"}
            found[device] = jax.tree.map(np.asarray, jax.jit(loss)(weights, router))
    (a, grads_a), (b, grads_b) = found.values()
    print(
        f"demo's model, float32, GPU against CPU: loss {abs(a - b) / abs(a):.1e}, worst "
        f"gradient {difference(grads_b, grads_a):.1e}"
    )


if __name__ == "__main__":
    print(jax.devices()[0].device_kind, "jax", jax.__version__)
    kernels()
    whole_model()
