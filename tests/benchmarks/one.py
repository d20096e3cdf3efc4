"""Runs one comparison in this process; `python -m tests.benchmarks` starts it."""

import argparse
import importlib
import platform
from importlib import metadata

import jax

from dtrak_jax import files
from tests.benchmarks import PEERS, cores, missing_peers

PACKAGES = ("dtrak-jax", "jax", "jaxlib", "numpy", "scipy", *PEERS.values())


def machine() -> dict:
    """What the numbers depend on beside the code."""
    known = {d.metadata["Name"].lower() for d in metadata.distributions()}
    described = {
        "cores": cores(),
        "processor": platform.machine(),
        "python": platform.python_version(),
        "jax_devices": [str(device) for device in jax.local_devices()],
        "versions": {
            name: metadata.version(name) for name in PACKAGES if name in known
        },
    }
    if "torch" not in missing_peers():
        import torch

        described["torch_threads"] = torch.get_num_threads()
    return described


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("name")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--repetitions", type=int, required=True)
    parser.add_argument("--json", required=True)
    arguments = parser.parse_args()
    if "torch" not in missing_peers():
        import torch

        torch.set_num_threads(cores())
    module = importlib.import_module(f"tests.benchmarks.{arguments.name}")
    rows = module.measure(arguments.small, arguments.repetitions)
    for row in rows:
        print(f"  {row}", flush=True)
    files.write_json(
        arguments.json,
        {
            "small": arguments.small,
            "machine": machine(),
            "rows": [row.as_dict() for row in rows],
        },
    )


if __name__ == "__main__":
    main()
