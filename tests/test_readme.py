"""What the README shows works as it is shown."""

import collections
import re
import runpy
from pathlib import Path

from conftest import PLANS

from dtrak_jax import files

README = Path(__file__).parent.parent / "README.md"


def test_your_own_model(capsys, tmp_path):
    """The script of the README; every query finds itself first."""
    scripts = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    (script,) = [script for script in scripts if "def apply" in script]
    (tmp_path / "script.py").write_text(script)
    runpy.run_path(str(tmp_path / "script.py"))
    printed = re.findall(r"'(\d+)'", capsys.readouterr().out)
    assert printed[::3] == ["0", "1", "2"]


def test_plans():
    """Every plan has its line in the table, with the figures that it has."""
    shown = README.read_text()
    for path in PLANS:
        plan = files.read_json(path)
        name, features, _ = path.stem.split("_")
        hours, useful = collections.Counter(), 0
        for row in plan["stages"]:
            hours[row["stage"].partition(" ")[0]] += row["seconds"] / 3600
            useful = row["useful"] or useful
        memory = max(row["memory"] for row in plan["stages"]) / 2**30
        stages = ("train", "featurize", "retrain", "measure")
        cells = [
            *(name, features, plan["topology"]),
            *(f"{memory:.1f}", f"{useful:.1%}".replace(".0", "")),
            *(f"{hours[stage]:.2g}" if stage in hours else "" for stage in stages),
        ]
        line = "| " + " | ".join(cells) + " |"
        assert " ".join(line.split()) in " ".join(shown.split()), line
