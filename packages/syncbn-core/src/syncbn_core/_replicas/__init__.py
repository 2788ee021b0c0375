"""How the replicas of one forward meet."""
