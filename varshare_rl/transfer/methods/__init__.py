"""Continual-learning methods, one file each; see :class:`varshare_rl.transfer.method.ContinualMethod`."""
