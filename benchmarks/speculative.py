"""Speculative decoding beside plain decoding on a trained model: speed, kept drafts, cost of a
step.

    make demo; python benchmarks/speculative.py runs/demo [--tokens 200]

Both give the same tokens. A speculative step runs two tokens through the model and one through MTP.
It brings 1 + a tokens, where a is the share of drafts kept. So it pays if 1 + a is more than its
cost in plain steps, the last column. Bar: 1.3 times the tokens per second.
"""

import argparse
import os
import statistics
import time

TEXTS = (
    "def __init__(self, name, value=None):\n        ",
    "import os\nimport sys\n\n",
    "class ",
    "        if not isinstance(",
    "    def test_",
    "        raise ValueError(",
    '    """Return ',
    "for key, value in ",
)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint")
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from sharding.mesh import simulate_devices

    simulate_devices(1)
    import v4jax
    from v4jax.generate.cache import split_layers
    from v4jax.generate.decode import generate
    from v4jax.generate.sampling import Sampling
    from v4jax.generate.steps import DecodeConfig
    from v4jax.tokenizer import load_tokenizer

    cfg, params = v4jax.load(arguments.checkpoint)
    params, tokenizer = split_layers(cfg, params), load_tokenizer(arguments.checkpoint)
    prompts = [[tokenizer.bos_token_id, *tokenizer.encode(text)] for text in TEXTS]

    def run(decoding, tokens):
        """(seconds, completions) of all prompts, one after the other."""
        start = time.perf_counter()
        found = [
            generate(
                cfg, params, [row], tokens, stop=lambda *_: False, capacity=512, decoding=decoding
            )[0]
            for row in prompts
        ]
        return time.perf_counter() - start, found

    print(
        "                 plain             speculative                                        "
        "cost of a step"
    )
    print(
        "temperature   ms a token   ms a token   times as fast   drafts that stay   ms a step   "
        "in plain steps"
    )
    for temperature in (0.0, 0.7, 1.0):
        plain = DecodeConfig(sampling=Sampling(temperature=temperature))
        settings, seconds, found = (plain, plain._replace(speculative=True)), ([], []), [None, None]
        for decoding in settings:
            run(decoding, 2)
        for _ in range(arguments.rounds):  # in turn, so that a noisy machine disturbs both
            for i, decoding in enumerate(settings):
                first, _ = run(decoding, 1)
                whole, found[i] = run(decoding, arguments.tokens)
                seconds[i].append((whole - first) / len(prompts) / (arguments.tokens - 1))
        assert [row.tokens for row in found[0]] == [row.tokens for row in found[1]], (
            "speculation changed a token"
        )
        one, two = map(statistics.median, seconds)
        share = sum(row.accepted for row in found[1]) / sum(row.drafted for row in found[1])
        step = two * (1 + share)
        print(
            f"{temperature:11.1f} {1e3 * one:12.2f} {1e3 * two:12.2f} {one / two:15.2f} "
            f"{share:18.1%} {1e3 * step:11.2f} {step / one:16.2f}"
        )


if __name__ == "__main__":
    main()
