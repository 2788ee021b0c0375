"""How the replicas of one forward synchronize."""
