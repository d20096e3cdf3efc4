"""Devices to plan for: those at hand, or a slice of a TPU pod that is not."""

import importlib.util
import os
from typing import NamedTuple

import jax
from jax.experimental import topologies


class Chip(NamedTuple):
    """The memory and the peak rates of a JAX device."""

    memory: float  # bytes
    flops: float  # the most operations a second, of bfloat16 products
    bandwidth: float  # the most bytes a second between its memory and its cores


CHIPS = {
    # cloud.google.com/tpu/docs/v4, docs/v5e, docs/v5p and docs/v6e, read in 2026. Where
    # a chip has two cores, JAX has one device for both.
    "TPU v4": Chip(32 * 2**30, 275e12, 1200e9),
    "TPU v5 lite": Chip(16 * 2**30, 197e12, 819e9),
    "TPU v5": Chip(95 * 2**30, 459e12, 2765e9),
    "TPU v6 lite": Chip(32 * 2**30, 918e12, 1638e9),
}
"""The chips that are known, by `jax.Device.device_kind`."""

ALLOWED = (
    "v4:2x2x1 to 16x16x16, v5e:2x2 to 16x16, v5p:2x2x1 to 16x20x28, v6e:2x2 to 16x16"
)
AXES = {"v4": 3, "v5e": 2, "v5p": 3, "v6e": 2}
"""The number of dimensions of a slice, by kind of chip."""

COMPILER = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    # Decide nothing, but without them libtpu prints errors that are none.
    "TPU_ACCELERATOR_TYPE": "v4-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
}
"""Variables of the environment that libtpu gets where there is no TPU."""


class Topology(NamedTuple):
    """The devices of all processes, each on a host of its own, and their name."""

    name: str
    devices: tuple[jax.Device, ...]

    @property
    def local(self) -> list[jax.Device]:
        """The devices of the first process."""
        first = self.devices[0].process_index
        return [d for d in self.devices if d.process_index == first]

    @property
    def processes(self) -> int:
        return len({d.process_index for d in self.devices})

    @property
    def kind(self) -> str:
        return self.devices[0].device_kind

    @property
    def chip(self) -> Chip | None:
        """The memory and rates of a device; None where they are not known."""
        return CHIPS.get(self.kind)

    def __str__(self) -> str:
        size = f"{len(self.devices)} x {self.kind}, {self.processes} processes"
        return f"{self.name}: {size}"


def find(name: str | None) -> Topology:
    """Returns the slice of that name, such as "v5e:4x4"; without one the devices at hand.

    Nothing can run on the devices of a slice that is not there, but XLA compiles for
    them.

    Raises:
      ValueError: there is no such slice; says which there are.
      ModuleNotFoundError: libtpu, the compiler, is not installed.
    """
    if not name:
        return Topology("the devices at hand", tuple(jax.devices()))
    family, _, layout = name.partition(":")
    wrong = f"--topology is {name!r}; it must be one of: {ALLOWED}"
    if layout.count("x") + 1 != AXES.get(family):
        raise ValueError(f"{wrong}.")
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
    # Without this a v4 chip would be two devices; where JAX runs on it, it is one.
    options = {"chip_config_name": "megacore"} if family == "v4" else {}
    try:
        described = topologies.get_topology_desc(name, platform="tpu", **options)
    except jax.errors.JaxRuntimeError as error:
        raise ValueError(f"{wrong} ({str(error).splitlines()[0]}).") from error
    return Topology(name, tuple(described.devices))
