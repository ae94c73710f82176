"""Sweeps: many runs of one command, here or on many machines, that go on when the command is given again."""
