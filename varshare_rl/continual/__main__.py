"""``python -m varshare_rl.continual env=light8 method=share``: learn one task after another."""

from varshare_rl.continual.command import command

if __name__ == "__main__":
    command()
