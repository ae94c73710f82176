"""Train one agent on many tasks: ``python -m varshare_rl.train env=mt10``."""

from varshare_rl.commands import start

if __name__ == "__main__":
    start("train")
