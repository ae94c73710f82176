"""Task suites and the engine that steps them. Knows neither torch nor the learner."""
