"""The exact reference, the rounding bounds and the comparison of arrays, in NumPy and SciPy."""
