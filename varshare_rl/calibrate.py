"""Compare the critic's uncertainty with its errors: ``python -m varshare_rl.calibrate run=runs/<folder>``."""

from varshare_rl.entry import start

if __name__ == "__main__":
    start("calibrate")
