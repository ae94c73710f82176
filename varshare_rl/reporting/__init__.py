"""From numbers to pictures: pure functions on JSON and numpy that know neither torch nor the learner."""
