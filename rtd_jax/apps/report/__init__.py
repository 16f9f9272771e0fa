"""report.json as pictures and one page."""
