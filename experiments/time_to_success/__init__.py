"""How long until the tasks are solved: by the clock, and in transitions."""
