"""One task of Meta-World at a time: settings of PPO that learn it."""
