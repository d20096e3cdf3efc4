"""Numbers that NumPy makes of a seed, beside PyTorch and beside JAX alike.

A golden file that holds a seed instead of parameters, and sums of gradients along
random directions instead of gradients, is small, and an error shows in it as well.
"""

import zlib

import numpy as np

DIRECTIONS = 4


def rng(seed, name):
    return np.random.default_rng([seed, zlib.crc32(name.encode())])


def parameter(rng, name, shape):
    """Values of about the size of PyTorch's own initialisation, norms included."""
    if "norm" in name:
        return name.endswith("weight") + 0.3 * rng.standard_normal(shape)
    fan_in = np.prod(shape[1:])
    return rng.uniform(-1, 1, shape) / np.sqrt(fan_in)


def parameters(seed, shapes):
    """{name: values} for {name: shape}, exact in float32."""
    params = {
        name: parameter(rng(seed, name), name, shape) for name, shape in shapes.items()
    }
    if "quant_conv.bias" in params:
        # Some logarithms of variances are to be clipped.
        params["quant_conv.bias"] *= 40
    return {name: value.astype(np.float32) for name, value in params.items()}


def values(seed, name, shape):
    """Normal numbers, exact in float32."""
    return rng(seed, name).standard_normal(shape).astype(np.float32)


def along_directions(seed, gradients):
    """Each gradient's norm and its sums along directions, sorted by name: [n, 5]."""
    sums = []
    for name, gradient in sorted(gradients.items()):
        gradient = np.ravel(np.asarray(gradient, np.float64))
        generator = rng(seed, f"along {name}")
        directions = generator.standard_normal((DIRECTIONS, gradient.size))
        sums.append([np.linalg.norm(gradient), *directions @ gradient])
    return np.array(sums)
