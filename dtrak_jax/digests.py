"""Short texts that differ where bytes, arrays, pytrees or programs differ."""

import dataclasses
import hashlib
from collections.abc import Callable, Iterator

import jax
import numpy as np
from jax.extend import core


def named_leaves(tree) -> dict[str, jax.Array]:
    """Returns the leaves of a pytree by path, {"conv/bias": leaf, ...}, in order."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree.leaves_with_path(tree)
    }


def digest(*parts: bytes | str, size: int = 16) -> str:
    """Returns the BLAKE2 hash of some parts, `size` bytes in hexadecimal.

    The length of each part is hashed with it, so that parts do not run together.
    """
    total = hashlib.blake2b(digest_size=size)
    for part in parts:
        content = part.encode() if isinstance(part, str) else part
        total.update(len(content).to_bytes(8, "little"))
        total.update(content)
    return total.hexdigest()


def short_digest(content: bytes, size: int = 4) -> str:
    """Returns the plain BLAKE2 hash of `size` bytes in hexadecimal, to name files."""
    return hashlib.blake2b(content, digest_size=size).hexdigest()


def digest_rows(array: np.ndarray) -> list[str]:
    """Returns the hash of each row's shape, type and content, read 64 at a time."""
    head = f"{array.dtype}{array.shape[1:]}"
    blocks = (np.asarray(array[i : i + 64]) for i in range(0, len(array), 64))
    return [digest(head, row.tobytes()) for block in blocks for row in block]


def digest_tree(tree) -> str:
    """Returns the hash of the paths, types, shapes and contents of all leaves."""
    parts = []
    for path, leaf in named_leaves(tree).items():
        array = np.asarray(leaf)
        head = f"{path} {array.dtype} {array.shape} "
        parts.append(digest(head, array.tobytes()))
    return digest(*parts)


def digest_program(function: Callable, *arguments) -> str:
    """Returns the hash of the StableHLO of a function at these shapes."""
    traced = jax.jit(function).trace(*arguments)
    constants = map(digest_tree, _constants(traced.jaxpr.jaxpr))
    return digest(traced.lower().as_text(), *constants)


def _constants(jaxpr) -> Iterator[np.ndarray]:
    """Yields the arrays that operations have in place of variables, as the switch
    jax_use_simplified_jaxpr_constants makes them; the text of a program has others."""
    for equation in jaxpr.eqns:
        for atom in equation.invars:
            if isinstance(atom, core.Literal) and np.ndim(atom.val):
                yield np.asarray(atom.val)
        for part in jax.tree.leaves(
            equation.params, is_leaf=lambda node: hasattr(node, "eqns")
        ):
            if hasattr(part, "eqns"):
                yield from _constants(getattr(part, "jaxpr", part))


def settings_text(settings: object) -> str:
    """Returns the fields of a dataclass with their values, whatever its `repr` shows."""
    fields = ((f.name, getattr(settings, f.name)) for f in dataclasses.fields(settings))
    text = ", ".join(f"{name}={value!r}" for name, value in fields)
    return f"{type(settings).__name__}({text})"
