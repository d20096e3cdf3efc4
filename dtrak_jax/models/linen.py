"""The layers of any flax.linen network, marked without changing it."""

import contextlib

import flax.linen as nn
from flax.linen.linear import canonicalize_padding

from dtrak_jax.layers import layer


def marking_layers() -> contextlib.AbstractContextManager:
    """Within it, each Dense, DenseGeneral and Conv marks itself by `layers.layer`.

    Not marked are layers that compute something else with their kernel: with groups, a
    mask, batched kernels, padding other than by zeros, or a product of the user's; nor
    subclasses, which may do anything. No effect on networks without flax.
    """
    return nn.intercept_methods(_mark)


def _mark(call, args, kwargs, context):
    outputs = call(*args, **kwargs)
    module = context.module
    mark = MARKS.get(type(module))
    if mark is None or context.method_name != "__call__":
        return outputs
    kernel = nn.meta.unbox(module.get_variable("params", "kernel"))
    inputs = args[0] if args else kwargs["inputs"]
    return mark(module, kernel, inputs, outputs)


def _dense(module, kernel, inputs, outputs):
    if module.dot_general or module.dot_general_cls:
        return outputs
    return layer(kernel, inputs, outputs)


def _dense_general(module, kernel, inputs, outputs):
    """As a product of flattened axes."""
    axes = (module.axis,) if isinstance(module.axis, int) else tuple(module.axis)
    last = tuple(range(inputs.ndim - len(axes), inputs.ndim))
    if tuple(axis % inputs.ndim for axis in axes) != last or module.batch_dims:
        return outputs
    lead = inputs.shape[: inputs.ndim - len(axes)]
    product = outputs.reshape(*lead, -1)
    marked = _dense(module, kernel, inputs.reshape(*lead, -1), product)
    return marked.reshape(outputs.shape)


def _conv(module, kernel, inputs, outputs):
    size = module.kernel_size
    axes = 1 if isinstance(size, int) else len(size)
    padding = canonicalize_padding(module.padding, axes)
    own = module.conv_general_dilated or module.conv_general_dilated_cls
    zeros = not isinstance(padding, str) or padding in ("SAME", "VALID")
    if own or not zeros or module.feature_group_count != 1 or module.mask is not None:
        return outputs
    return layer(
        kernel,
        inputs,
        outputs,
        padding=padding,
        strides=module.strides or 1,
        dilation=module.kernel_dilation or 1,
        input_dilation=module.input_dilation or 1,
    )


MARKS = {nn.Dense: _dense, nn.DenseGeneral: _dense_general, nn.Conv: _conv}
