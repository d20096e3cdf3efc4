"""Names of the leaves of a pytree."""

import jax


def named_leaves(tree) -> dict[str, jax.Array]:
    """{"mid_block/conv/kernel": leaf, ...}, in the order of the leaves."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in leaves
    }
