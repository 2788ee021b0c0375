"""The autograd graph of a layer: one node for all replicas, or three nodes for each."""
