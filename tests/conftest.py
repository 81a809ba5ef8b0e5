"""8 simulated CPU devices, strict promotion, warnings as errors (pyproject.toml), small compiles, each made once."""

import gc
import os
from importlib.metadata import version

# Before jax starts. Tiny models need no LLVM optimisation; tests spend their time compiling. A fusion made by the older
# emitters compiles a third faster; the newest jaxlib has no others than the newer ones and does not know the flag.
FLAGS = ["--xla_backend_optimization_level=0", "--xla_llvm_disable_expensive_passes=true"]
if version("jaxlib").startswith("0.10."):
    FLAGS.append("--xla_cpu_use_fusion_emitters=false")
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *FLAGS])
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
gc.set_threshold(
    200_000, 20, 50
)  # tracing makes millions of small objects, and looking for cycles among them is a tenth of its time


@pytest.fixture(scope="session", autouse=True)
def compiled_once(tmp_path_factory):
    """Runs that are killed and go on compile the same step again. Not shared with processes that tests start: a killed one leaves half an entry."""
    jax.config.update("jax_compilation_cache_dir", str(tmp_path_factory.mktemp("compiled")))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
