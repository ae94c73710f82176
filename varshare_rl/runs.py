"""List, show and remove runs: ``python -m varshare_rl.runs <list|show|rm> ...``."""

from varshare_rl.entry import start

if __name__ == "__main__":
    start("runs")
