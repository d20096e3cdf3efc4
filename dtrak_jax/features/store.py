"""Features in memory or on disk, written a chunk of rows at a time."""

import dataclasses
import math
from collections.abc import Collection, Iterator, Sequence

import numpy as np
import tensorstore as ts
from etils import epath

from dtrak_jax import files, parallel


def chunks_of(n: int, rows: int) -> list[slice]:
    """Returns the chunks of `rows` rows, the last one perhaps shorter, of n rows."""
    return [slice(start, min(start + rows, n)) for start in range(0, n, rows)]


@dataclasses.dataclass(frozen=True)
class Features:
    """The features of one measurement; `np.asarray` gives the array, an index a part."""

    measurement: str
    ids: tuple[str, ...]
    phi: ts.TensorStore
    """float32 [T, n, k], T pairs of a timestep and a draw kept apart, or [n, k] averaged.
    Rows are read when they are needed."""
    squared_norms: np.ndarray
    """|g|^2 of the gradients before projection, [T, n] or [n]; where they are not formed
    ("factorized"), of the sketches that are, right in expectation."""
    losses: np.ndarray
    """The mean squared error of every noised image [T, n]; the residual's norm is
    sqrt(d * losses), d the number of outputs."""
    fingerprint: dict
    """All that decides the values."""
    folder: epath.Path | None = None
    """The store; None in memory."""
    role: str | None = None
    """The role that `featurize` was given; None if nobody said it."""

    def __repr__(self) -> str:
        *pairs, n, k = self.shape
        parts = [f"{n} images"]
        for count in pairs:
            draws = self.fingerprint.get("draws", 1)
            steps = count // draws
            parts.append(f"{steps} timestep{'s' * (steps > 1)}")
            parts += [f"{draws} draws"] if draws > 1 else []
        shape = " × ".join([*parts, str(k)])
        where = f"{self.folder}/" if self.folder else "in memory"
        size = files.size_text(4 * math.prod(self.shape))
        return f"Features({self.measurement}, {shape}, {where}, {size})"

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape [T, n, k], or [n, k]."""
        return tuple(self.phi.shape)

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        return np.asarray(self[...], dtype=dtype)

    def __getitem__(self, index) -> np.ndarray:
        store = f"their store {self.folder}" if self.folder else "their store"
        try:
            array = self.phi[index].read().result()
        except ValueError as error:
            raise ValueError(
                f"the features {self.measurement!r} are damaged: {error}. Delete {store} "
                "and run featurize again."
            ) from error
        if np.isfinite(array).all():
            return array
        if self.folder and not (self.folder / "metadata.json").exists():
            raise FileNotFoundError(
                f"the features {self.measurement!r} cannot be read: {store} is gone; run "
                "featurize again."
            )
        raise ValueError(
            f"rows of the features {self.measurement!r} are missing; delete {store} and "
            "run featurize again."
        )

    def by_pair(self) -> Iterator[np.ndarray]:
        """Yields each pair's features [n, k] in turn; just one array if averaged."""
        pairs = [...] if self.phi.ndim == 2 else range(self.phi.shape[0])
        yield from map(self.__getitem__, pairs)

    @classmethod
    def load(cls, store: epath.PathLike, measurement: str) -> "Features":
        """Opens finished features.

        Raises:
          FileNotFoundError: there is no store, or not this measurement in it.
          ValueError: it is unfinished or damaged.
        """
        saved = Store.load(store)
        if measurement not in saved.phi:
            raise FileNotFoundError(
                f"the store {store} has no features of {measurement!r}; it has "
                f"those of {', '.join(saved.phi)}."
            )
        return saved.features([measurement])[measurement]


def concatenated(parts: Sequence[Features]) -> Features:
    """Returns the features of all parts' examples, to be read where they are."""
    return dataclasses.replace(
        parts[0],
        ids=tuple(name for part in parts for name in part.ids),
        phi=ts.concat([part.phi for part in parts], axis=-2),
        squared_norms=np.concatenate([part.squared_norms for part in parts], axis=-1),
        losses=np.concatenate([part.losses for part in parts], axis=-1),
        folder=None,
    )


@dataclasses.dataclass(frozen=True)
class Store:
    """The arrays of several measurements of the same examples.

    `losses` is written last, so its chunks tell which rows are done.
    """

    metadata: dict
    folder: epath.Path | None  # None in memory, where the arrays go with the store
    phi: dict[str, ts.TensorStore]
    squared_norms: dict[str, ts.TensorStore]
    losses: ts.TensorStore

    @classmethod
    def open_or_create(cls, folder: epath.PathLike | None, metadata: dict) -> "Store":
        """Continues the store in the folder, or starts it there; or in memory if None.

        All processes must call it together. What is there must be the same features.
        """
        if folder is None:
            return cls.open(None, metadata)
        folder = files.check_folder("store", folder)
        path = folder / "metadata.json"
        if parallel.is_main_process() and not path.exists():
            if not files.is_empty(folder):
                raise ValueError(
                    f"{folder} is not empty and holds no feature store; name another "
                    "store, or delete it."
                )
            files.write_json(path, metadata)
        parallel.barrier(f"create {folder}")
        saved = files.read_json(path)
        differs = files.differences(saved["fingerprint"], metadata["fingerprint"])
        if differs:
            raise ValueError(
                f"the store {folder} holds other features: {differs[0]}. Name another "
                "store, or delete it."
            )
        return cls.open(folder, saved)

    @classmethod
    def load(cls, folder: epath.PathLike) -> "Store":
        """Opens the store in the folder, or raises a FileNotFoundError."""
        path = files.at(folder) / "metadata.json"
        if not path.exists():
            raise FileNotFoundError(
                f"there is no feature store in {folder}; run `dtrak-jax featurize` "
                "with this config and workdir first."
            )
        return cls.open(path.parent, files.read_json(path))

    @classmethod
    def open(cls, folder: epath.Path | None, metadata: dict) -> "Store":
        """Opens the arrays, given their metadata."""
        names = metadata["fingerprint"]["measurements"]
        *pairs, n, k = metadata["shape"]
        rows = min(metadata["rows_per_chunk"], n)

        def array(name: str, lead: list[int], *rest: int) -> ts.TensorStore:
            shape = [*lead, n, *rest]
            if folder is None:
                return ts.array(np.full(shape, np.nan, np.float32))
            return _zarr(folder / name, shape, [*lead, rows, *rest])

        return cls(
            metadata,
            folder,
            {name: array(f"{name}/phi", pairs, k) for name in names},
            {name: array(f"{name}/squared_norms", pairs) for name in names},
            array("losses", [metadata["pairs"]]),
        )

    @property
    def is_whole(self) -> bool:
        """True if it has the features of every example.

        Processes may see different answers while others write.
        """
        return bool(self._done().all())

    def _done(self) -> np.ndarray:
        """Returns True for each row that is there."""
        return np.isfinite(self.losses.read().result()).all(axis=0)

    def missing_chunks(self) -> list[slice]:
        """Returns the missing chunks of rows that this process is to write.

        All processes must call it together: none may write before all have seen the
        same chunks missing. A store in memory is this process's alone.
        """
        done = self._done()
        chunks = chunks_of(len(done), self.metadata["rows_per_chunk"])
        missing = [chunk for chunk in chunks if not done[chunk].all()]
        if self.folder is None:
            return missing
        parallel.barrier(f"share out {self.folder}")
        return parallel.of_process(missing)

    def write(
        self,
        rows: slice,
        phi: dict[str, np.ndarray],
        squared_norms: dict[str, np.ndarray],
        losses: np.ndarray,
    ) -> None:
        """Writes one chunk of rows; it counts as done only when all of it is there."""
        norms = squared_norms.items()
        pending = [self.phi[n][..., rows, :].write(a) for n, a in phi.items()]
        pending += [self.squared_norms[n][..., rows].write(a) for n, a in norms]
        try:
            for future in pending:
                future.result()
            self.losses[:, rows].write(losses).result()
        except ValueError as error:
            raise OSError(
                f"examples {rows.start} to {rows.stop - 1} could not be stored: {error}. "
                "All before them are safe; free space or mend the permissions, then "
                "rerun to continue."
            ) from error

    def features(self, measurements: Collection[str]) -> dict[str, Features]:
        """Returns {measurement: features}, or raises a ValueError if rows are missing."""
        ids, missing = tuple(self.metadata["ids"]), np.count_nonzero(~self._done())
        if missing:
            raise ValueError(
                f"{missing} of {len(ids)} examples have no features yet; run featurize "
                "again to finish them."
            )
        fingerprint, losses = self.metadata["fingerprint"], self.losses.read().result()
        programs = fingerprint["measurements"]
        # By layer there is also a digest of each group's parameters.
        groups = {
            name.rpartition("/")[2]: made[1]
            for name, made in programs.items()
            if isinstance(made, list)
        }
        shared = fingerprint | ({"groups": groups} if groups else {})

        def features(name: str) -> Features:
            norms = self.squared_norms[name].read().result()
            alone = {"measurements": {name: programs[name]}}
            return Features(
                *(name, ids, self.phi[name], norms, losses),
                shared | alone,
                self.folder,
                self.metadata.get("role"),
            )

        return {name: features(name) for name in measurements}


def _zarr(path: epath.Path, shape: list[int], chunk: list[int]) -> ts.TensorStore:
    """Opens or creates a float32 Zarr array, all NaN at first.

    Features do not compress; a checksum finds damage.
    """
    kvstore = {"driver": "file", "path": f"{path}/"}
    if files.is_remote(path):
        _, _, bucket, *names = path.parts
        kvstore = {"driver": "gcs", "bucket": bucket, "path": f"{'/'.join(names)}/"}
    metadata = {
        "shape": shape,
        "data_type": "float32",
        "fill_value": "NaN",
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": chunk}},
        "codecs": [
            {"name": "bytes", "configuration": {"endian": "little"}},
            {"name": "crc32c"},
        ],
    }
    spec = {"driver": "zarr3", "kvstore": kvstore, "metadata": metadata}
    try:
        return ts.open(spec, open=True, create=True).result()
    except ValueError as error:
        raise ValueError(
            f"{path} is damaged ({error}); delete its store and run featurize again."
        ) from error
