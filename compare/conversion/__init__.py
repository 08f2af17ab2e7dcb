"""State from one framework to another, in memory."""
