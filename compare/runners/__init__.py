"""Run one of the three implementations, with NumPy arrays as inputs and outputs."""
