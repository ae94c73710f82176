"""Draw figures from run folders: ``python -m varshare_rl.report <name> ...``."""

from varshare_rl.commands.report import command

if __name__ == "__main__":
    command()
