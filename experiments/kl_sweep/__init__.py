"""Success, nats and sharing against the weight of the divergence: one CSV, one figure.

python -m experiments.kl_sweep runs/<sweep> runs/<sweep> ... [--folder experiments/kl_sweep]
"""
