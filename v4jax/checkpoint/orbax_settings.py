"""Orbax's settings for the checkpoints of a run: chunks of stored arrays, and when a step counts.

Next file to read: v4jax/checkpoint/keeping.py.
"""

from orbax.checkpoint import v1 as ocp

from v4jax.checkpoint.bucket_clients import DATA_FILE_BYTES
from v4jax.storage import Place, Remote

_CHUNK_BYTES = 64 * 2**20
"""Bytes of a chunk of a stored array. Orbax would make each device's share one chunk, and reading
one expert would decode them all."""


def context_for(directory: Place) -> ocp.Context:
    """Small chunks, cut along stacked axes (layers, experts) first, so `stream` reads one matrix.

    In a bucket, where nothing can be renamed, a step counts once its file of keeping.COMMITTED
    is there, which is written last.
    """
    context = ocp.Context()
    if isinstance(directory, Remote):
        context.atomicity.mode = ocp.options.AtomicityMode.COMMIT_FILE
        context.array.saving.ocdbt_target_data_file_size = DATA_FILE_BYTES
    options = context.array.saving.StorageOptions
    context.array.saving.scoped_storage_options_creator = lambda key, value: options(
        chunk_byte_size=_CHUNK_BYTES, shard_axes=tuple(range(max(0, len(value.shape) - 2)))
    )
    return context
