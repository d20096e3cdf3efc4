"""Devices to plan for: those at hand, or a slice of a TPU pod that is not."""

import importlib.util
import os
from typing import NamedTuple

import jax
from jax.experimental import topologies


class Chip(NamedTuple):
    """What one JAX device has."""

    memory: float
    """Bytes."""
    flops: float
    """Of bfloat16 products a second, at most."""
    bandwidth: float
    """Bytes a second between its memory and its cores, at most."""


CHIPS = {
    # cloud.google.com/tpu/docs/v4, docs/v5e, docs/v5p and docs/v6e, read in 2026. Where
    # a chip has two cores, JAX has one device for both.
    "TPU v4": Chip(32 * 2**30, 275e12, 1200e9),
    "TPU v5 lite": Chip(16 * 2**30, 197e12, 819e9),
    "TPU v5": Chip(95 * 2**30, 459e12, 2765e9),
    "TPU v6 lite": Chip(32 * 2**30, 918e12, 1638e9),
}
"""By `jax.Device.device_kind`."""

ALLOWED = (
    "v4:2x2x1 to 16x16x16, v5e:2x2 to 16x16, v5p:2x2x1 to 16x20x28, v6e:2x2 to 16x16"
)
AXES = {"v4": 3, "v5e": 2, "v5p": 3, "v6e": 2}
"""Of the slices of a kind of chip."""

COMPILER = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    # Decide nothing, but without them libtpu prints errors that are none.
    "TPU_ACCELERATOR_TYPE": "v4-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
}
"""Environment of libtpu where there is no TPU, unless it is set."""


class Topology(NamedTuple):
    """The devices of all processes."""

    name: str
    devices: tuple[jax.Device, ...]

    @property
    def local(self) -> list[jax.Device]:
        """Those of one process."""
        first = self.devices[0].process_index
        return [d for d in self.devices if d.process_index == first]

    @property
    def processes(self) -> int:
        """How many there are, each on a host of its own."""
        return len({d.process_index for d in self.devices})

    @property
    def kind(self) -> str:
        """The devices' name."""
        return self.devices[0].device_kind

    @property
    def described(self) -> str:
        """Such as "8 x TPU v4, 2 processes"."""
        return f"{len(self.devices)} x {self.kind}, {self.processes} processes"

    @property
    def chip(self) -> Chip | None:
        """What a device has, where that is known."""
        return CHIPS.get(self.kind)


def find(name: str | None) -> Topology:
    """The slice of that name, such as "v5e:4x4"; the devices at hand if None.

    Nothing can run on the devices of a slice that is not there, but XLA compiles for
    them.

    Raises:
      ValueError: there is no such slice; says which there are.
      ModuleNotFoundError: libtpu, the compiler, is not installed.
    """
    if name is None:
        return Topology("the devices at hand", tuple(jax.devices()))
    family, _, layout = name.partition(":")
    if layout.count("x") + 1 != AXES.get(family):
        raise ValueError(f"--topology is {name!r}; it must be one of: {ALLOWED}.")
    if importlib.util.find_spec("libtpu") is None:
        raise ModuleNotFoundError(
            f"--topology is {name!r}, and compiling for a TPU needs libtpu: run "
            '`pip install "dtrak-jax[plan]"`, or leave the flag out to plan for the '
            "devices at hand."
        )
    # No chip is looked for or taken, and other processes may do the same.
    jax.config.update("jax_platforms", "cpu")
    for variable, value in COMPILER.items():
        os.environ.setdefault(variable, value)
    # Without it a v4 chip would be two devices, which it is not where JAX runs on it.
    options = {"chip_config_name": "megacore"} if family == "v4" else {}
    try:
        found = topologies.get_topology_desc(name, platform="tpu", **options)
    except jax.errors.JaxRuntimeError as error:
        said = str(error).splitlines()[0]
        raise ValueError(
            f"--topology is {name!r}; it must be one of: {ALLOWED} ({said})."
        ) from error
    return Topology(name, tuple(found.devices))
