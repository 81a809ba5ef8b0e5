"""Keeps caches of the beginnings of prompts on disk, so shared ones run once (report 3.6.2).

A beginning is kept in stretches of STRETCH tokens, one file each. A file has the stretch's entries
and index keys, and the rings (window, tokens not yet pooled) at its end. A prompt goes on from the
last stretch that it shares with an earlier one; of the stretches before, only entries are used.

A file's name is the hash of all that its numbers depend on: model, weights, the row's adapter,
formats, and every token up to the one after the stretch, which MTP has seen. The file begins with a
checksum and is renamed when complete, so a killed run leaves nothing that would be read; a damaged
file is removed and computed again. Above `limit` bytes the least recently used files are removed,
later stretches before earlier ones. Other files in the folder are neither counted nor touched.

Shapes: L layers, B batch, R slots of a ring or of entries, W width.
Next file to read: v4jax/generate/rollout.py.
"""

import functools
import hashlib
import itertools
import json
import os
import pathlib
import tempfile
from collections.abc import Iterator, Sequence

import jax
import numpy as np

from v4jax.adapters.several import only
from v4jax.cache.layer import LayerCache
from v4jax.config import ModelConfig
from v4jax.generate.cache import Cache
from v4jax.parameter_tree import ADAPTERS, NUMBERS
from v4jax.stderr import say
from v4jax.storage import folder_to_fill, local_path

STRETCH = 512
"""Tokens per file: a multiple of every compress ratio, and the chunk of prefill."""

_VERSION = 1
_SUFFIX = ".stretch"
_SUM = hashlib.sha256().digest_size


class PrefixStore:
    """A folder of stretches.

    Args:
      limit: bytes that the files may take.
      formats: what the numbers depend on besides model, weights and tokens; any JSON value.

    Attributes:
      reused, kept: tokens read, and tokens written, so far.
    """

    def __init__(self, folder, limit: int, cfg: ModelConfig, params, formats):
        check_store(folder, limit)
        self._folder, self._limit, self._cfg = local_path(folder, "prefix cache"), limit, cfg
        self._folder.mkdir(parents=True, exist_ok=True)
        model = cfg.replace(more_eos_token_ids=()).to_dict()  # end tokens change no cache
        known = json.dumps([_VERSION, STRETCH, model, formats], sort_keys=True)
        # Of several adapters a row's numbers depend on its own alone, and not on its name.
        names = params.get(NUMBERS, {})
        shared = only(params, None) if names else params
        self._base = hashlib.sha256(known.encode() + digest(shared))
        self._of_adapter = {name: digest(only(params, name)[ADAPTERS]) for name in names}
        self.reused = self.kept = 0

    def begin(
        self, cache: Cache, rows: Sequence[Sequence[int]], adapters: Sequence[str | None] = ()
    ) -> tuple[Cache, list[int]]:
        """Fills an empty cache with the beginnings of rows that are on disk.

        The last token of a row is never among them, since it must run.

        Args:
          adapters: the name of each row's adapter, of several; None or missing: none.

        Returns:
          The cache, and the number of tokens that it has of each row.
        """
        found = [self._chain(*one) for one in itertools.zip_longest(rows, adapters)]
        known = [STRETCH * len(chain) for chain in found]
        self.reused += sum(known)
        if not any(known):
            return cache, known
        leaves, tree = jax.tree.flatten((cache.layers, cache.mtp))
        ratios, arrays = _ratios(self._cfg, cache), [np.array(leaf) for leaf in leaves]
        for b, chain in enumerate(found):
            for n, content in enumerate(chain):
                for array, ratio, piece in zip(
                    arrays, ratios, _split(ratios, leaves, content), strict=True
                ):
                    size = STRETCH // ratio if ratio else len(piece[0])
                    first = n * size if ratio else 0
                    array[:, b, first : first + size] = piece
        leaves = [
            jax.device_put(array, leaf.sharding) for array, leaf in zip(arrays, leaves, strict=True)
        ]
        layers, mtp = jax.tree.unflatten(tree, leaves)
        return Cache(
            jax.device_put(np.array(known, np.int32), cache.length_B.sharding), layers, mtp
        ), known

    def keep(
        self,
        rows: Sequence[Sequence[int]],
        known: Sequence[int],
        cache: Cache,
        done: int,
        adapters: Sequence[str | None] = (),
    ) -> None:
        """Writes the stretches that end where the rows are now, if they are new.

        Args:
          done: tokens run of each row since the `known` ones.
          adapters: as in `begin`.
        """
        for b, (row, had, adapter) in enumerate(itertools.zip_longest(rows, known, adapters)):
            end = had + done
            if end % STRETCH == 0 and end < len(row):
                path = list(self._paths(row[: end + 1], adapter))[-1]
                if not path.exists():
                    self._write(path, cache, b, end)

    def _write(self, path: pathlib.Path, cache: Cache, row: int, end: int) -> None:
        pieces = _pieces(
            _ratios(self._cfg, cache),
            jax.tree.leaves((cache.layers, cache.mtp)),
            row,
            end // STRETCH - 1,
        )
        payload, new = b"".join(np.asarray(piece).tobytes() for piece in pieces), None
        try:
            with tempfile.NamedTemporaryFile(
                dir=self._folder, suffix=f"{_SUFFIX}.tmp", delete=False
            ) as file:
                new = pathlib.Path(file.name)
                file.write(hashlib.sha256(payload).digest() + payload)
                file.flush()
                os.fsync(file.fileno())
            os.replace(new, path)
            self._shrink()
        except OSError as error:  # a full disk, for example; the answer does not depend on it
            say(f"prefix cache: {path}: {error}")
            if new is not None:
                new.unlink(missing_ok=True)
            return
        self.kept += STRETCH

    def _paths(self, tokens: Sequence[int], adapter: str | None) -> Iterator[pathlib.Path]:
        """Yields the files of the whole stretches that a token follows."""
        ids, name = np.asarray(tokens, "<i4"), self._base.copy()
        if adapter is not None:
            name.update(self._of_adapter[adapter])
        name.update(ids[:1].tobytes())
        for end in range(STRETCH, len(ids), STRETCH):
            name.update(ids[end - STRETCH + 1 : end + 1].tobytes())
            yield self._folder / (name.hexdigest() + _SUFFIX)

    def _chain(self, tokens: Sequence[int], adapter: str | None = None) -> list[bytes]:
        """The contents of the row's first stretches, up to one that is missing or damaged."""
        chain, used = [], []
        for path in self._paths(tokens, adapter):
            if not path.is_file():
                break
            try:
                content = path.read_bytes()
            except OSError as error:
                say(f"prefix cache: {path}: {error}; it is computed again")
                break
            if hashlib.sha256(content[_SUM:]).digest() != content[:_SUM]:
                say(f"prefix cache: {path} is damaged; it is computed again")
                path.unlink()
                break
            chain.append(content[_SUM:])
            used.append(path)
        for path in reversed(used):  # so the earliest stretch is the most recently used
            os.utime(path)
        return chain

    def _shrink(self) -> None:
        """Removes the least recently used stretches until the rest fits the limit.

        Files that killed runs left count as stretches.
        """
        own = [
            path
            for path in self._folder.iterdir()
            if path.name.endswith((_SUFFIX, f"{_SUFFIX}.tmp")) and path.is_file()
        ]
        files = sorted(
            (stat.st_mtime_ns, stat.st_size, path) for path in own for stat in [path.stat()]
        )
        over = sum(size for _, size, _ in files) - self._limit
        for _, size, path in files:
            if over <= 0:
                return
            path.unlink()
            over -= size


def check_store(folder, limit: int) -> None:
    """Raises ValueError for a folder or limit that cannot be, before anything is read or made."""
    if limit < 1:
        raise ValueError(f"prefix cache: got a limit of {limit} bytes; must be at least 1")
    if jax.process_count() > 1:
        raise ValueError(f"prefix cache: it serves one process; this job has {jax.process_count()}")
    folder_to_fill(folder, "prefix cache")


def _ratios(cfg: ModelConfig, cache: Cache) -> tuple[int, ...]:
    """Tokens per slot of each leaf of (layers, mtp); 0 for a ring."""

    def of(layer: LayerCache, ratio: int) -> LayerCache:
        marks = jax.tree.map(lambda _: 0, layer)

        def slots(part):
            return part and part._replace(slots=jax.tree.map(lambda _: ratio, part.slots))

        return marks._replace(entry=slots(marks.entry), index=slots(marks.index))

    layers = {
        group.name: {
            f"block_{i}": of(cache.layers[group.name][f"block_{i}"], kind.compress_ratio)
            for i, kind in enumerate(group.kinds)
        }
        for group in cfg.layer_groups
    }
    return tuple(jax.tree.leaves((layers, jax.tree.map(lambda _: 0, cache.mtp))))


@functools.partial(jax.jit, static_argnums=0)
def _pieces(
    ratios: tuple[int, ...], leaves: Sequence[jax.Array], row: jax.Array, index: jax.Array
) -> list[jax.Array]:
    """What a stretch keeps of a row: rings whole, and the stretch's own slots."""

    def piece(ratio, x_LBRW):
        x_LRW = jax.lax.dynamic_index_in_dim(x_LBRW, row, axis=1, keepdims=False)
        return (
            jax.lax.dynamic_slice_in_dim(
                x_LRW, index * (STRETCH // ratio), STRETCH // ratio, axis=1
            )
            if ratio
            else x_LRW
        )

    return [piece(ratio, leaf) for ratio, leaf in zip(ratios, leaves, strict=True)]


def _split(
    ratios: tuple[int, ...], leaves: Sequence[jax.Array], content: bytes
) -> Iterator[np.ndarray]:
    """Yields the arrays of a file."""
    first = 0
    for ratio, leaf in zip(ratios, leaves, strict=True):
        layers, _, rows, width = leaf.shape
        shape = (layers, STRETCH // ratio if ratio else rows, width)
        size = leaf.dtype.itemsize * layers * shape[1] * width
        yield np.frombuffer(content, np.uint8, size, first).view(leaf.dtype).reshape(shape)
        first += size


def digest(params) -> bytes:
    """A hash that is equal for equal weights, however they lie on devices."""
    found = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        array = np.asarray(leaf)
        found.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}".encode())
        found.update(np.ascontiguousarray(array).view(np.uint8).data)
    return found.digest()
