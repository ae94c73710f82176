"""The benchmark: interleaved rounds of contenders in processes of their own, ratios first.

python -m experiments.bench [engine layer update train scale start memory] [--rounds 8] [--quick]
"""
