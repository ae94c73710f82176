"""How much the gradient of each estimator varies on a fixed batch, and what a pass costs.

python -m experiments.estimators [--draws 400] [--rounds 12] [--folder experiments/estimators]
"""
