"""List and run the commands: ``python -m varshare_rl``, and ``varshare`` where the package is installed."""

from varshare_rl.entry import main

if __name__ == "__main__":
    main()
