"""Put many LoRA adapters into one basis: ``python -m varshare_rl.share consolidate adapters/* out=basis``."""

from varshare_rl.entry import start

if __name__ == "__main__":
    start("share")
