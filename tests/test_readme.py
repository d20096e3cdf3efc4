"""What the README shows works as it is shown."""

import re
import runpy
from pathlib import Path

README = Path(__file__).parent.parent / "README.md"


def test_your_own_model(capsys, tmp_path):
    """The script of the README; every query finds itself first."""
    scripts = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    (script,) = [script for script in scripts if "def apply" in script]
    (tmp_path / "script.py").write_text(script)
    runpy.run_path(str(tmp_path / "script.py"))
    printed = re.findall(r"'(\d+)'", capsys.readouterr().out)
    assert printed[::3] == ["0", "1", "2"]
