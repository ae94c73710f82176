"""Remove residuals that are at their prior: ``python -m varshare_rl.prune run=runs/<folder>``."""

from varshare_rl.commands.prune import command

if __name__ == "__main__":
    command()
