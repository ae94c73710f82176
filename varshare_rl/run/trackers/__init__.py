"""Trackers, one per file: where a run's metrics go besides ``metrics.jsonl``."""
