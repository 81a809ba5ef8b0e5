"""Models of the Hugging Face Hub by name: downloaded into huggingface_hub's cache, and checked.

A name means one commit for as long as the process runs, whatever happens to its branch meanwhile.
huggingface_hub keeps a file with a flipped byte, so what has a sha256 is compared with it, once.

Next file to read: v4jax/storage/checkpoints.py.
"""

import functools
import hashlib
import logging
import os
import pathlib
import sys
from typing import Any

from v4jax.storage.faults import retried
from v4jax.storage.remote import Remote

_SMALL = (["*.json", "*.jinja", "*.model", "*.txt"], ["*/*"])
"""Patterns of files that are downloaded, and of those that are not."""
_ENCODING = (["encoding/*"], [])
_OTHER_WEIGHTS = ("bin", "pt", "pth", "ckpt", "gguf", "h5", "msgpack", "onnx", "npz")
_ALL = (["*"], ["*/*.safetensors", *(f"*.{suffix}" for suffix in _OTHER_WEIGHTS)])
_Patterns = tuple[list[str], list[str]]
_SHA256_DIGITS = 64


def snapshot(name: Remote, weights: bool) -> pathlib.Path:
    """The folder of a model's files on this machine, downloaded if they are not there yet.

    Args:
      weights: its safetensors and all other files too; otherwise only config, tokenizer, encoding/
        and other small files.

    Raises:
      ValueError: no such model or revision, or a model that this user may not read.
      OSError: the Hub cannot be reached and the cache lacks the files, or the disk is full.
    """
    small = _small_files(name)
    return _all_files(name, small.name) if weights else small


def commit_of(name: Remote) -> str:
    """The commit that a name means in this process. Raises like `snapshot`."""
    return _small_files(name).name


@functools.cache
def _small_files(name: Remote) -> pathlib.Path:
    """Downloads the small files, and says which commit the name means."""
    from v4jax.stderr import say  # it imports JAX, for which --help need not wait

    folder = _checked(name, _SMALL, name.key.partition("@")[2] or "main")
    _checked(name, _ENCODING, folder.name)
    say(f"{name}: commit {folder.name} of the Hub, in {folder}")
    return folder


@functools.cache
def _all_files(name: Remote, commit: str) -> pathlib.Path:
    return _checked(name, _ALL, commit)


def _checked(name: Remote, patterns: _Patterns, revision: str) -> pathlib.Path:
    """A snapshot whose files have the sha256 that the Hub gives them; damaged ones come twice."""
    folder = _download(name, patterns, revision)
    damaged = _damaged(folder)
    if not damaged:
        return folder
    for link in damaged:
        logging.getLogger("v4jax").warning("%s: has another sha256; once more", link)
        link.resolve().unlink()
        link.unlink()
    folder = _download(name, patterns, revision)
    if damaged := _damaged(folder):
        raise OSError(f"{damaged[0]}: was downloaded twice, and has another sha256 than the Hub's")
    return folder


def _download(name: Remote, patterns: _Patterns, revision: str) -> pathlib.Path:
    from huggingface_hub.utils import disable_progress_bars

    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    if not sys.stderr.isatty():
        disable_progress_bars()
    return pathlib.Path(retried(name, _snapshot_download, name, patterns, revision))


def _snapshot_download(name: Remote, patterns: _Patterns, revision: str) -> str:
    """huggingface_hub's download; its faults that no further try would mend are ValueErrors."""
    import huggingface_hub
    from huggingface_hub import errors

    repo = name.key.partition("@")[0]
    options: dict[str, Any] = {"allow_patterns": patterns[0], "ignore_patterns": patterns[1]}
    try:
        return huggingface_hub.snapshot_download(repo, revision=revision, **options)
    except errors.GatedRepoError:
        page = f"{huggingface_hub.constants.ENDPOINT}/{repo}"
        text = f"is a gated model: accept its terms at {page}, and log in (hf auth login)"
    except errors.RepositoryNotFoundError:
        text = "no such folder here, and no such model on the Hub (a private one needs a login)"
    except errors.RevisionNotFoundError:
        text = f"the model has no revision {revision!r}"
    except errors.LocalEntryNotFoundError as error:
        text = _out_of_reach(error)
    raise ValueError(f"{name}: {text}")


def _out_of_reach(error: Exception) -> str:
    """Why a model is not in the cache while the Hub gave no answer.

    Raises:
      Exception: the cause, where a further try may help.
    """
    import huggingface_hub
    from huggingface_hub import errors

    if huggingface_hub.constants.is_offline_mode():
        return "no such folder here, nor in the Hub's cache (HF_HUB_OFFLINE is set)"
    cause = error.__cause__
    if cause is not None and not isinstance(cause, errors.OfflineModeIsEnabled):
        raise cause
    return "no such folder here, and the Hub cannot be reached"


def _damaged(folder: pathlib.Path) -> list[pathlib.Path]:
    """Files whose contents have not the sha256 that their blob in the cache is called by."""
    links = [path for path in sorted(folder.rglob("*")) if path.is_symlink()]
    hashed = [path for path in links if len(path.resolve().name) == _SHA256_DIGITS]
    return [path for path in hashed if not _is_proven(path.resolve())]


def _is_proven(blob: pathlib.Path) -> bool:
    """Whether a blob has its sha256; that it has is noted, for hashing terabytes takes long."""
    stat = blob.stat()
    noted = _noted_in() / f"{blob.name}-{stat.st_size}-{stat.st_mtime_ns}"
    if noted.exists():
        return True
    with open(blob, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != blob.name:
        return False
    noted.parent.mkdir(parents=True, exist_ok=True)
    noted.touch()
    return True


def _noted_in() -> pathlib.Path:
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return pathlib.Path(cache).expanduser() / "v4jax" / "sha256"
