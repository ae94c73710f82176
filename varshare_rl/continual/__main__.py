"""Learn one task after another: ``python -m varshare_rl.continual env=light8 method=share``."""

from varshare_rl.entry import start

if __name__ == "__main__":
    start("continual")
