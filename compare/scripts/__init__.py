"""The parts of `python -m compare`: each yields its sections as they are found out, and words on how far it is."""
