"""From losses per task to a step of the optimiser: the ELBO's penalty and the combination of tasks."""
