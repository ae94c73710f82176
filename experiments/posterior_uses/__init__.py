"""What posteriors are good for besides returns: pruning, and a critic that knows how wrong it is."""
