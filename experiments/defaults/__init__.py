"""The ELBO's defaults, one changed at a time."""
