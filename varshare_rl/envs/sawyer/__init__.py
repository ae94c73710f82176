"""The package ``metaworld`` and its robot arm: imported when a suite has tasks of it, which takes a second."""

#: Entries of an observation.
OBSERVATION_SIZE = 39
