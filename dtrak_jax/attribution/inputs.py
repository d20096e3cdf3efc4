"""Features as attribution takes them: in memory, in a store, or plain arrays.

They are [T, n, k], kept apart for each pair of a timestep and a noise draw, or [n, k],
averaged.
"""

from collections.abc import Iterator, Mapping, Sequence

import jax.numpy as jnp
import numpy as np

from dtrak_jax import files
from dtrak_jax.features.fingerprint import EXAMPLES
from dtrak_jax.features.store import Features, concatenated

Array = Features | np.ndarray


def by_pair(features: Array) -> Iterator[np.ndarray]:
    """Yields the features [n, k] of each pair; of averaged features the one array."""
    if isinstance(features, Features):
        return features.by_pair()
    features = np.asarray(features)
    if not np.isfinite(features).all():
        raise ValueError("features have entries that are not finite.")
    return iter(features if features.ndim == 3 else features[None])


def as_features(features) -> Array:
    """Returns features as they are, or an array of what else NumPy reads as one."""
    if isinstance(features, Features):
        return features
    if isinstance(features, Mapping):
        raise TypeError(
            f"features are a dict of {', '.join(map(repr, features))}; give one of them."
        )
    array = np.asarray(features)
    if not (jnp.issubdtype(array.dtype, np.number) or array.dtype == bool):
        raise ValueError(f"features are {array.dtype}; they must be numbers.")
    return array


def example_ids(features: Array) -> np.ndarray:
    """Returns the ids, str [n]; of an array "0", "1", ..."""
    if isinstance(features, Features):
        return np.array(features.ids)
    return np.array([str(i) for i in range(features.shape[-2])])


def joined(sets: Sequence[Array]) -> Array:
    """Returns the features of all sets of examples, one set after the other."""
    if all(isinstance(features, Features) for features in sets):
        return concatenated(sets)
    return np.concatenate([np.asarray(features) for features in sets], axis=-2)


def check_features(
    train: Array, query: Array, probed: bool = False
) -> tuple[Array, Array]:
    """Returns both as features or arrays, or raises a ValueError unless they fit.

    They must have the shapes [T, n, k] and [T, q, k], or [n, k] and [q, k], with
    nothing empty; and come from the same task, parameters and projection, but for the
    noise of cyclic queries and their weights of layers; `probed` queries are of a probe,
    whatever the training set's measurement. Independent noise that both may share is an
    error.
    """
    train, query = as_features(train), as_features(query)
    t, q = tuple(train.shape), tuple(query.shape)
    for name, shape in (("train", t), ("query", q)):
        if len(shape) not in (2, 3) or 0 in shape:
            raise ValueError(
                f"{name} features have shape {shape}; it must be [T, n, k] or [n, k], "
                "with nothing empty."
            )
    if (len(t), t[:-2], t[-1]) != (len(q), q[:-2], q[-1]):
        raise ValueError(
            f"train features have shape {t} and query features {q}; they may differ "
            "in the number of examples only."
        )
    if not (isinstance(train, Features) and isinstance(query, Features)):
        return train, query
    if (train.role, query.role) == ("query", "train"):
        raise ValueError(
            "the training features were made with role='query' and the query features "
            "with role='train': they are in each other's place."
        )
    free = dict.fromkeys((*EXAMPLES, "noise_of"))
    roles = [features.fingerprint.get("noise_of") for features in (train, query)]
    same = all(train.fingerprint.get(f) == query.fingerprint.get(f) for f in EXAMPLES)
    if roles in (["train", "train"], ["query", "query"]) and not same:
        raise ValueError(
            f"training and query features were both made with role={roles[0]!r}, so that "
            "examples of one id share their independent noise; query features need "
            "role='query', and those of the training set role='train'."
        )
    if (train.fingerprint["noise"], query.fingerprint["noise"]) == ("common", "cyclic"):
        free["noise"] = None
    of_train, of_query = train.fingerprint | free, query.fingerprint | free
    # Weights of layers are on the query's side alone.
    of_query.pop("layer_weights", None)
    _check_kind(query, probed)
    if probed:
        of_query["measurements"] = of_train["measurements"]
    differing = files.differences(of_train, of_query)
    if differing:
        raise ValueError(
            "training (there) and query (here) features do not belong together: "
            f"{differing[0]}."
        )
    return train, query


def _check_kind(query: Features, probed: bool) -> None:
    """Raises a ValueError unless features are of a probe where those are asked for, and
    elsewhere of a measurement of whole gradients."""
    name = query.measurement
    # A probe's program is its name.
    is_probe = query.fingerprint.get("measurements") == {name: name}
    needed = None
    if probed and not is_probe:
        needed = "das takes those of dtrak_jax.probes(count) as the task's measurement"
    elif is_probe and not probed:
        needed = "only method 'das' takes those of probes, with curvature=..."
    elif "/" in name:
        needed = (
            "of groups of layers give dtrak_jax.layer_weights(train, by_layer).query"
        )
    if needed:
        raise ValueError(f"query features are of {name!r}; {needed}.")
