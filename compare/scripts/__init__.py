"""The parts of `python -m compare`: each yields its sections as they are found out."""
