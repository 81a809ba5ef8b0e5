"""8 simulated CPU devices, strict promotion, warnings as errors (pyproject.toml), small compiles, each made once."""

import gc
import os
from importlib.metadata import version

# Before jax starts. Tiny models need no LLVM optimisation; tests spend their time compiling. A fusion made by the older
# emitters compiles a third faster; the newest jaxlib has no others than the newer ones and does not know the flag.
# One LLVM module a program: the workers have no cores to spare for more.
FLAGS = [
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
    "--xla_cpu_parallel_codegen_split_count=1",
]
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

LONGEST = [
    "test_stability",
    "test_mesh",
    "test_mesh_context",
    "test_exact",
    "test_intact",
    "test_promises",
    "test_run",
    "test_golden",
    "test_cache",
    "test_generate",
    "test_index_loss",
    "test_survival",
    "test_processes",
    "test_prefix",
    "test_anticipate",
    "test_stages",
    "test_decode_mesh",
]
"""Files that take longest, which begin first, so that two workers end together."""


def pytest_configure(config):
    # xdist would put files of many tests first, which are the quick ones.
    config.option.loadscopereorder = False


def pytest_collection_modifyitems(items):
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(places)))


@pytest.fixture(scope="session", autouse=True)
def compiled_once(tmp_path_factory):
    """Runs that are killed and go on compile the same step again. Not shared with processes that tests start: a killed one leaves half an entry."""
    jax.config.update("jax_compilation_cache_dir", str(tmp_path_factory.mktemp("compiled")))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
