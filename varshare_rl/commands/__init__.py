"""Commands, one file each; ``varshare_rl/<name>.py`` starts them as ``python -m varshare_rl.<name>``."""
