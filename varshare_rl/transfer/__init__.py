"""Transfer: what an agent that has learnt some tasks does with the next one."""
