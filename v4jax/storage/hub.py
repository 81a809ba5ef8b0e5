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
import re
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
_COMMIT = re.compile(r"[0-9a-f]{40}")


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
def data_set(name: str) -> Remote:
    """The data set that org/name or org/name@revision means in this process, with its commit.

    Raises:
      ValueError: no such data set or revision, one that this user may not read, or HF_HUB_OFFLINE
        is set and the revision is no commit.
      OSError: the Hub cannot be reached.
    """
    from v4jax.stderr import say

    repo, _, revision = name.partition("@")
    if _COMMIT.fullmatch(revision):
        return Remote("hf", f"datasets/{name}")
    found = Remote("hf", f"datasets/{repo}")
    commit = retried(found, _data_set_commit, found, repo, revision or "main")
    say(f"{found}: commit {commit} of the Hub")
    return Remote("hf", f"{found.key}@{commit}")


def _data_set_commit(found: Remote, repo: str, revision: str) -> str:
    """The commit of a revision; faults that no further try would mend are ValueErrors."""
    import huggingface_hub
    from huggingface_hub import errors

    try:
        return str(huggingface_hub.HfApi().dataset_info(repo, revision=revision).sha)
    except errors.GatedRepoError:
        page = f"{huggingface_hub.constants.ENDPOINT}/datasets/{repo}"
        text = f"is a gated data set: accept its terms at {page}, and log in (hf auth login)"
    except errors.RepositoryNotFoundError:
        text = "no such data set on the Hub (a private one needs a login)"
    except errors.RevisionNotFoundError:
        text = f"the data set has no revision {revision!r}"
    except errors.OfflineModeIsEnabled:
        text = "HF_HUB_OFFLINE is set, and only a commit names the same data without the Hub"
    raise ValueError(f"{found}: {text}")


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
        text = f"{_not_here(repo)}, and no such model on the Hub (a private one needs a login)"
    except errors.RevisionNotFoundError:
        text = f"the model has no revision {revision!r}"
    except errors.LocalEntryNotFoundError as error:
        text = _out_of_reach(error, repo)
    raise ValueError(f"{name}: {text}")


def _not_here(repo: str) -> str:
    """That org/name is no folder of this machine; says so at length where `org` is one."""
    parent, _, name = repo.partition("/")
    near = f" (the folder {parent} has no {name} in it)" if os.path.isdir(parent) else ""
    return f"no such folder here{near}"


def _out_of_reach(error: Exception, repo: str) -> str:
    """Why a model is not in the cache while the Hub gave no answer.

    Raises:
      Exception: the cause, where a further try may help.
    """
    import huggingface_hub
    from huggingface_hub import errors

    if huggingface_hub.constants.is_offline_mode():
        return f"{_not_here(repo)}, nor in the Hub's cache (HF_HUB_OFFLINE is set)"
    cause = error.__cause__
    if cause is not None and not isinstance(cause, errors.OfflineModeIsEnabled):
        raise cause
    return f"{_not_here(repo)}, and the Hub cannot be reached"


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
