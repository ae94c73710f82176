"""MT10 with PPO: which settings learn soonest, and how far the best one comes."""
