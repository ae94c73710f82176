"""torch's compiler is imported by those who compile, and by nobody else."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from helpers import TINY, TINY_ALGORITHM

SCRIPT = """
import sys
from varshare_rl.entry import start

sys.argv[1:] = {arguments}
start("train")
loaded = lambda: "torch._dynamo.eval_frame" in sys.modules
assert not loaded()
import torch

compiled = torch.compile(lambda x: 2 * x + 1, backend="eager")
assert compiled(torch.ones(3)).tolist() == [3.0, 3.0, 3.0]
assert loaded()
assert torch._dynamo.__file__
model = torch.nn.Linear(2, 2)
adam = torch.optim.Adam(model.parameters())
model(torch.ones(1, 2)).sum().backward()
adam.step()
"""


def test_a_command_does_not_import_it_and_whoever_compiles_afterwards_can(tmp_path: Path) -> None:
    arguments = [*TINY, *TINY_ALGORITHM["ppo"], "total_transitions=640", "log.trackers=[]", "run_dir=run"]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(arguments=arguments)], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "summary.json").is_file()
