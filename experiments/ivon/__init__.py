"""A variational second-order optimiser for the factors, beside Adam."""
