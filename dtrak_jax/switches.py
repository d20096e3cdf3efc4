"""JAX's switches, which a user may have set for the rest of a program."""

import contextlib
from collections.abc import Iterator

import jax


@contextlib.contextmanager
def standard() -> Iterator[None]:
    """Gives the switches that change results, or break programs, JAX's defaults inside.

    It is a context or a decorator of functions that trace programs. The precision of
    products stays as it is set, since it may be meant; fingerprints have it. Random draws
    depend on no switch, see `rng`; the networks of a user may, if they draw.
    """
    with contextlib.ExitStack() as stack:
        for switch in (
            jax.enable_x64(False),
            jax.threefry_partitionable(True),
            jax.numpy_dtype_promotion("standard"),
            jax.numpy_rank_promotion("allow"),
            jax.disable_jit(False),
            # NaN stands for what is not there, and zeros for what was not computed.
            jax.debug_nans(False),
            jax.debug_infs(False),
            jax.transfer_guard("allow"),
        ):
            stack.enter_context(switch)
        yield
