"""python -m tests.benchmarks [NAME ...] [--small] [--json FILE] [--repetitions N]"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.benchmarks import COMPARISONS, cores, missing_peers


def main() -> None:
    """Each comparison in a process of its own, so that none sees another's caches."""
    about = "\n".join(f"  {name:<12} {c.about}" for name, c in COMPARISONS.items())
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks",
        description="dtrak_jax against the reference's way in PyTorch, and itself.",
        epilog=f"comparisons (all of them if none is named):\n{about}\n\n"
        "`python -m tests.benchmarks.growth` plots how time and memory grow;\n"
        "`python -m tests.benchmarks.digits` retrains models on digits for minutes.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="what to compare")
    parser.add_argument(
        "--small", action="store_true", help="tiny sizes: shows that it runs, no more"
    )
    parser.add_argument(
        "--json",
        type=Path,
        default=Path("runs/benchmarks.json"),
        help="gets the results; those of other comparisons in it stay (%(default)s)",
    )
    parser.add_argument("--repetitions", type=int, default=5, help="(%(default)s)")
    arguments = parser.parse_args()
    unknown = set(arguments.names) - COMPARISONS.keys()
    if unknown:
        parser.error(f"no comparison {', '.join(unknown)}; see --help")

    failed, written = [], False
    for name in arguments.names or COMPARISONS:
        print(f"{name}: {COMPARISONS[name].about}", flush=True)
        missing = missing_peers()
        if missing and COMPARISONS[name].peers:
            print(
                f"  skipped: it needs {', '.join(missing)}; "
                'pip install ".[benchmark]" installs them.'
            )
            continue
        result = run(name, arguments.small, arguments.repetitions)
        if result is None:
            failed.append(name)
            continue
        found = {}
        if arguments.json.exists():
            found = json.loads(arguments.json.read_text())
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(found | {name: result}, indent=1) + "\n")
        written = True
    if written:
        print(f"results are in {arguments.json}")
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


def run(name: str, small: bool, repetitions: int) -> dict | None:
    """The results of one comparison; None if it failed, which it has then said."""
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            # As the command line has it.
            "JAX_NUM_CPU_DEVICES": str(cores()),
            "TMPDIR": folder,
            "TQDM_DISABLE": "1",
        }
        path = Path(folder) / "rows.json"
        command = [sys.executable, "-m", "tests.benchmarks.one", name]
        command += ["--repetitions", str(repetitions), "--json", str(path)]
        command += ["--small"] * small
        if subprocess.run(command, env=environment, check=False).returncode:
            return None
        return json.loads(path.read_text())


if __name__ == "__main__":
    main()
