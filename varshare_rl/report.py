"""Draw figures from run folders: ``python -m varshare_rl.report <name> ...``."""

from varshare_rl.entry import start

if __name__ == "__main__":
    start("report")
