"""Rank, scale, rate, dropout and layers of LoRA, one at a time."""
