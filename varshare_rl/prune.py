"""Remove residuals that are at their prior: ``python -m varshare_rl.prune run=runs/<folder>``."""

from varshare_rl.entry import start

if __name__ == "__main__":
    start("prune")
