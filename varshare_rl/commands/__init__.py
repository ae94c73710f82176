"""Commands, one file each: options, a function that does the work and is called from Python too, the command."""
