"""What is exact, how far rounding may go, and the verdict on two arrays: NumPy and SciPy alone."""
