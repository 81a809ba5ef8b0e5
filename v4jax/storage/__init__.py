"""Every file access: this machine's disks, gs:// and s3:// buckets, and models of the Hub by name.

Next file to read: v4jax/storage/local.py.
"""

from v4jax.storage.checkpoints import (
    checkpoint_name,
    checkpoint_path,
    folder_of_checkpoint,
    pinned,
    place_of_checkpoints,
    streamed,
)
from v4jax.storage.claim import WRITER, Claim
from v4jax.storage.files import (
    Entry,
    copy,
    exists,
    lines,
    listing,
    make_folder,
    move_folder,
    read,
    read_into,
    reader,
    remove,
    remove_folder,
    size,
    write,
    writer,
)
from v4jax.storage.hub import data_set
from v4jax.storage.local import file_to_write, folder_to_fill, local_path, path_of_checkpoints
from v4jax.storage.places import Place, is_remote, place, require_writable
from v4jax.storage.remote import Remote
from v4jax.storage.spool import Spool

__all__ = [
    "WRITER",
    "Claim",
    "Entry",
    "Place",
    "Remote",
    "Spool",
    "checkpoint_name",
    "checkpoint_path",
    "copy",
    "data_set",
    "exists",
    "file_to_write",
    "folder_of_checkpoint",
    "folder_to_fill",
    "is_remote",
    "lines",
    "listing",
    "local_path",
    "make_folder",
    "move_folder",
    "path_of_checkpoints",
    "pinned",
    "place",
    "place_of_checkpoints",
    "read",
    "read_into",
    "reader",
    "remove",
    "remove_folder",
    "require_writable",
    "size",
    "streamed",
    "write",
    "writer",
]
