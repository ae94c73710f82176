"""Train one agent on many tasks: ``python -m varshare_rl.train env=mt10``."""

import sys
from importlib import import_module

from varshare_rl.entry import start

if __name__ == "__main__":
    start("train")
else:  # an import by this name must not put a module where the function ``varshare_rl.train`` is
    sys.modules[__name__] = import_module("varshare_rl.api").train
