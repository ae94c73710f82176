"""Pure tensor functions: Gaussians, squashed and categorical policies, advantages and losses."""
