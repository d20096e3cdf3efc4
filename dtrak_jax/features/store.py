"""Features in memory or on disk, written a chunk of rows at a time."""

import dataclasses
from collections.abc import Iterator

import jax
import numpy as np
import tensorstore as ts
from etils import epath

from dtrak_jax import files, parallel


@dataclasses.dataclass(frozen=True)
class Features:
    """The features of one measurement; `np.asarray` gives the array.

    Attributes:
      measurement: its name.
      ids: of the n examples.
      phi: float32 [T, n, k], T pairs of a timestep and a draw kept apart, or [n, k]
        averaged. A TensorStore, so that rows are read when they are needed.
      squared_norms: |g|^2 of the gradients before projection, [T, n] or [n]; where they
        are not formed ("factorized"), of the sketches that are, right in expectation.
      losses: mean squared error of every noised image [T, n]; the residual's norm is
        sqrt(d * losses), d the number of outputs.
      fingerprint: what the values depend on.
    """

    measurement: str
    ids: tuple[str, ...]
    phi: ts.TensorStore
    squared_norms: np.ndarray
    losses: np.ndarray
    fingerprint: dict

    @property
    def shape(self) -> tuple[int, ...]:
        """[T, n, k], or [n, k]."""
        return tuple(self.phi.shape)

    def __len__(self) -> int:
        return len(self.ids)

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        return np.asarray(self._read(...), dtype=dtype)

    def kernels(self) -> Iterator[np.ndarray]:
        """Each pair's features [n, k] in turn; just one array if averaged."""
        if self.phi.ndim == 2:
            yield self._read(...)
        else:
            for pair in range(self.phi.shape[0]):
                yield self._read(pair)

    def rows(self, rows: slice) -> np.ndarray:
        """The features of some examples alone, [T, rows, k] or [rows, k]."""
        return self._read((..., rows, slice(None)))

    def pairs(self, positions: list[int]) -> np.ndarray:
        """The features of some pairs alone, [len(positions), n, k]."""
        return self._read(positions)

    def _read(self, index) -> np.ndarray:
        try:
            array = self.phi[index].read().result()
        except ValueError as error:
            raise ValueError(
                f"the features {self.measurement!r} are damaged: {error}. Delete their "
                "store and run featurize again."
            ) from error
        if not np.isfinite(array).all():
            raise ValueError(
                f"rows of the features {self.measurement!r} are missing; delete their "
                "store and run featurize again."
            )
        return array

    @classmethod
    def load(cls, store: epath.PathLike, measurement: str) -> "Features":
        """Opens finished features.

        Raises:
          FileNotFoundError: there is no store, or not this measurement in it.
          ValueError: it is unfinished or damaged.
        """
        stored = Store.load(store)
        known = stored.metadata["fingerprint"]["measurements"]
        if measurement not in known:
            raise FileNotFoundError(
                f"the store {store} has no features of {measurement!r}; it has "
                f"those of {', '.join(known)}."
            )
        return stored.features(measurement)


@dataclasses.dataclass(frozen=True)
class Store:
    """The arrays of several measurements of the same examples.

    `losses` is written last, so its chunks tell which rows are done.
    """

    metadata: dict
    phi: dict[str, ts.TensorStore]
    squared_norms: dict[str, ts.TensorStore]
    losses: ts.TensorStore

    @classmethod
    def in_memory(cls, metadata: dict) -> "Store":
        """An empty store that goes when it is no longer used."""

        def array(name: str, shape: tuple[int, ...], row_axis: int) -> ts.TensorStore:
            return ts.array(np.full(shape, np.nan, np.float32))

        return cls._make(metadata, array)

    @classmethod
    def open_or_create(cls, folder: epath.PathLike, metadata: dict) -> "Store":
        """Continues the store in the folder, or starts it there.

        Raises:
          ValueError: it holds other features (names the field that differs), or
            something that is no feature store.
        """
        folder = files.at(folder)
        path = folder / "metadata.json"
        if parallel.is_primary() and not path.exists():
            if not files.is_empty(folder):
                raise ValueError(
                    f"{folder} is not empty and holds no feature store; name another "
                    "store, or delete it."
                )
            files.write_json(path, metadata)
        parallel.wait_for_all(f"create {folder}")
        found = files.read_json(path)
        differs = files.differences(found["fingerprint"], metadata["fingerprint"])
        if differs:
            raise ValueError(
                f"the store {folder} holds other features: {differs[0]}. Name another "
                "store, or delete it."
            )
        return cls.open(folder, found)

    @classmethod
    def load(cls, folder: epath.PathLike) -> "Store":
        """The store in the folder.

        Raises:
          FileNotFoundError: there is none.
          ValueError: it is damaged.
        """
        path = files.at(folder) / "metadata.json"
        if not path.exists():
            raise FileNotFoundError(
                f"there is no feature store in {folder}; run `dtrak-jax featurize` "
                "with this config and workdir first."
            )
        return cls.open(path.parent, files.read_json(path))

    @classmethod
    def open(cls, folder: epath.Path, metadata: dict) -> "Store":
        """The store in a folder, given its metadata."""

        def array(name: str, shape: tuple[int, ...], row_axis: int) -> ts.TensorStore:
            chunk = list(shape)
            chunk[row_axis] = min(metadata["rows_per_chunk"], shape[row_axis])
            try:
                return _zarr(folder / name, shape, chunk)
            except ValueError as error:
                raise ValueError(
                    f"the store {folder} is damaged ({error}); delete it and run "
                    "featurize again."
                ) from error

        return cls._make(metadata, array)

    @classmethod
    def _make(cls, metadata: dict, array) -> "Store":
        names = metadata["fingerprint"]["measurements"]
        shape, axis = tuple(metadata["shape"]), len(metadata["shape"]) - 2
        losses = (metadata["pairs"], len(metadata["ids"]))
        return cls(
            metadata,
            {n: array(f"{n}/phi", shape, axis) for n in names},
            {n: array(f"{n}/squared_norms", shape[:-1], axis) for n in names},
            array("losses", losses, 1),
        )

    def missing_chunks(self) -> list[slice]:
        """The chunks of rows that are not written yet."""
        n, rows = len(self.metadata["ids"]), self.metadata["rows_per_chunk"]
        done = np.isfinite(self.losses.read().result()).all(axis=0)
        chunks = [slice(start, min(start + rows, n)) for start in range(0, n, rows)]
        return [chunk for chunk in chunks if not done[chunk].all()]

    def write(
        self,
        rows: slice,
        phi: dict[str, np.ndarray],
        squared_norms: dict[str, np.ndarray],
        losses: np.ndarray,
    ) -> None:
        """Writes one chunk of rows; it counts as done only when all of it is there.

        Raises:
          OSError: the disk is full or not writable; chunks before this one are safe.
        """
        pending = [self.phi[n][..., rows, :].write(a) for n, a in phi.items()]
        pending += [
            self.squared_norms[n][..., rows].write(a) for n, a in squared_norms.items()
        ]
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

    def my_missing_chunks(self, name: str) -> list[slice]:
        """Those that this process is to write; all must call it, with the same name.

        The other processes read from the disk what this one writes. None may start
        before all have seen the same chunks missing.
        """
        missing = self.missing_chunks()
        parallel.wait_for_all(f"share out {name}")
        return missing[jax.process_index() :: jax.process_count()]

    def features(self, measurement: str) -> Features:
        """The finished features of one measurement.

        Raises:
          ValueError: rows are missing.
        """
        missing = sum(chunk.stop - chunk.start for chunk in self.missing_chunks())
        if missing:
            raise ValueError(
                f"{missing} of {len(self.metadata['ids'])} examples have no features "
                "yet; run featurize again to finish them."
            )
        fingerprint = self.metadata["fingerprint"]
        return Features(
            measurement=measurement,
            ids=tuple(self.metadata["ids"]),
            phi=self.phi[measurement],
            squared_norms=self.squared_norms[measurement].read().result(),
            losses=self.losses.read().result(),
            fingerprint=fingerprint
            | {"measurements": {measurement: fingerprint["measurements"][measurement]}},
        )


def _zarr(path: epath.Path, shape: tuple[int, ...], chunk: list[int]) -> ts.TensorStore:
    """A float32 Zarr array, created if it is not there.

    NaN is what was not written. Features do not compress; a checksum finds damage.
    """
    kvstore = {"driver": "file", "path": f"{path}/"}
    if files.is_remote(path):
        _, _, bucket, *names = path.parts
        kvstore = {"driver": "gcs", "bucket": bucket, "path": f"{'/'.join(names)}/"}
    return ts.open(
        {
            "driver": "zarr3",
            "kvstore": kvstore,
            "metadata": {
                "shape": shape,
                "data_type": "float32",
                "fill_value": "NaN",
                "chunk_grid": {
                    "name": "regular",
                    "configuration": {"chunk_shape": chunk},
                },
                "codecs": [
                    {"name": "bytes", "configuration": {"endian": "little"}},
                    {"name": "crc32c"},
                ],
            },
        },
        open=True,
        create=True,
    ).result()
