"""Evaluate a trained agent: ``python -m varshare_rl.evaluate run=runs/<folder>``."""

from varshare_rl.entry import start

if __name__ == "__main__":
    start("evaluate")
