"""Convert state between frameworks, in memory."""
