"""Check a port of somebody's own module: is the Flax module the same function as the torch one?"""
