"""Run one of the three implementations, NumPy in and out."""
