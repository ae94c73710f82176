"""Learning one task after another: what ``python -m varshare_rl.continual`` runs."""
