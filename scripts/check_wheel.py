"""Build the wheel, install it alone in a new environment, and use it there: numpy is all that it may bring.

python scripts/check_wheel.py    # needs the package registry; about a minute
"""

import json
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MAX_IMPORT_MS = 150
OWN = {"pip", "setuptools", "routing-replay"}

USE = """
import base64, io, json, sys
from pathlib import Path
import numpy as np
from routing_replay.trace import ModelRouting
from routing_replay.trace.importers import import_vllm

folder = Path(sys.argv[1])
config = {"model_type": "mixtral", "num_hidden_layers": 4, "num_local_experts": 8, "num_experts_per_tok": 2}
(folder / "config.json").write_text(json.dumps(config))
ids = np.random.default_rng(0).random((9, 4, 8)).argsort(-1)[..., :2].astype(np.uint8)
buffer = io.BytesIO()
np.save(buffer, ids)
field = base64.b64encode(buffer.getvalue()).decode()
trace = import_vllm(field, token_ids=range(10), routing=ModelRouting.from_config(config))
assert (trace.ids == ids).all()
choice = {"token_ids": [7, 8, 9], "routed_experts": field}
body = {"prompt_token_ids": [0, 1, 2, 3, 4, 5, 6], "choices": [choice]}
(folder / "good.json").write_text(json.dumps(body))
ids[:, 2] = 0
buffer = io.BytesIO()
np.save(buffer, ids)
choice["routed_experts"] = base64.b64encode(buffer.getvalue()).decode()
(folder / "bad.json").write_text(json.dumps(body))
"""
TIMED = (
    "import time; t = time.perf_counter(); import routing_replay.trace.importers; "
    "print(1000 * (time.perf_counter() - t))"
)


def run(*words: object) -> subprocess.CompletedProcess[str]:
    """Run a program and keep what it says."""
    return subprocess.run(list(map(str, words)), capture_output=True, text=True, check=False)


def need(done: subprocess.CompletedProcess[str], code: int = 0) -> str:
    """Return what a program printed, once it ended as it should."""
    if done.returncode != code:
        sys.exit(f"exit code {done.returncode}, expected {code}: {done.args}\n{done.stderr}")
    return done.stdout


def main() -> None:
    """Check the wheel; exits with 1 and a reason where something is wrong."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
        need(run(*pip, "wheel", "--no-deps", "--wheel-dir", folder, ROOT))
        (wheel,) = folder.glob("*.whl")
        venv.create(folder / "venv", with_pip=True)
        python = folder / "venv" / "bin" / "python"
        need(run(python, "-m", "pip", "--quiet", "install", wheel))
        listed = json.loads(need(run(python, "-m", "pip", "list", "--format", "json")))
        brought = {item["name"] for item in listed} - OWN
        if brought != {"numpy"}:
            sys.exit(f"the wheel brought {sorted(brought)}, not numpy alone")
        need(run(python, "-c", USE, folder))
        command = folder / "venv" / "bin" / "routing-replay"
        config = folder / "config.json"
        good = need(run(command, "inspect", folder / "good.json", "--config", config))
        bad = need(run(command, "inspect", folder / "bad.json", "--config", config), code=1)
        if "yes" not in good or "zero_layers" not in bad:
            sys.exit(f"inspect said:\n{good}\n{bad}")
        times = sorted(float(need(run(python, "-c", TIMED))) for _ in range(11))
        print(
            f"{wheel.name}: numpy alone; importers and inspect work; import takes {times[5]:.0f} ms (fastest "
            f"{times[0]:.0f} ms, goal {MAX_IMPORT_MS})"
        )


if __name__ == "__main__":
    main()
