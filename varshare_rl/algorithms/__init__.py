"""Algorithms: what to do with experience. The loop is elsewhere and is the same for all."""
