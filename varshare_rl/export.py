"""Write a task's policy for others: ``python -m varshare_rl.export run=runs/<folder> task=<name> format=torch``."""

from varshare_rl.entry import start

if __name__ == "__main__":
    start("export")
