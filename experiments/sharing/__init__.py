"""Where the nats are: identical tasks, conflicting tasks, and a budget that is held.

python -m experiments.sharing runs/<identical sweep> runs/<conflict sweep> runs/<budget sweep>
"""
