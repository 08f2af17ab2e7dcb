"""Show a report: on the terminal, as JSON, as one HTML page."""
