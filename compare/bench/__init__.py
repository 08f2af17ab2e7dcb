"""How fast: attention beside its peers, and checkpoints beside plain library calls."""
