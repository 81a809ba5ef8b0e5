"""The setup of all tests: 8 simulated CPU devices, strict promotion, quick compiles.

pyproject.toml makes warnings errors.
"""

import gc
import os
from importlib.metadata import version

# These are set before jax starts. Tiny models need no LLVM optimisation; tests spend their time
# compiling. The older emitters compile a fusion a third faster; the newest jaxlib has only the
# newer ones and does not know the flag. One LLVM module a program: the workers have no cores to
# spare for more.
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
os.environ["HF_HUB_OFFLINE"] = "1"  # no test asks the real Hub

import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
# Tracing makes millions of small objects; searching them for cycles is a tenth of its time.
gc.set_threshold(200_000, 20, 50)

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
"""Files that take longest. They begin first, so that two workers end together."""


def pytest_configure(config):
    # xdist would put files of many tests first, and those are the quick ones.
    config.option.loadscopereorder = False


def pytest_collection_modifyitems(items):
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(places)))


@pytest.fixture(scope="session", autouse=True)
def compiled_once(tmp_path_factory):
    """Keeps compiled programs, since runs that are killed and resumed compile the same step again.

    Processes that tests start do not share them: a killed one leaves half an entry.
    """
    jax.config.update("jax_compilation_cache_dir", str(tmp_path_factory.mktemp("compiled")))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
