"""Every architecture at equal capacity on two suites: success, parameters and the time of an update.

python -m experiments.architectures runs/<sweep> ... [--folder experiments/architectures]
python -m experiments.architectures time [--rounds 8] [--threads 1] [--folder experiments/architectures]
"""
