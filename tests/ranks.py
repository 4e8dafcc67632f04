"""Two ranks on gloo, started as torchrun starts them."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def on_two_ranks(code, folder):
    """Run a program on both; each leaves `done-RANK` in the folder."""
    script = folder / "work.py"
    script.write_text(code)
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *launch], cwd=ROOT, env=environment, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr.decode()[-6000:]
    assert (folder / "done-0").exists() and (folder / "done-1").exists()
