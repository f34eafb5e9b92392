"""The figures in README and model card are those of the committed results."""

import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
SCRIPT = REPOSITORY / "scripts" / "update_tables.py"


def test_documented_figures_equal_the_committed_results():
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_figure_check_sees_a_changed_number(tmp_path: Path):
    for name in (
        "README.md",
        "docs/results/demo.json",
        "src/routing_replay/assets/tiny_moe/README.md",
    ):
        copy = tmp_path / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text((REPOSITORY / name).read_text())
    script = tmp_path / "scripts" / "update_tables.py"
    script.parent.mkdir()
    script.write_text(SCRIPT.read_text())
    readme = tmp_path / "README.md"
    readme.write_text(readme.read_text().replace("coverage 100%", "coverage 99%"))
    done = subprocess.run(
        [sys.executable, str(script), "--check"], capture_output=True, text=True, check=False
    )
    assert "README.md differ" in done.stderr
