"""What a reader sees of a `Report`: `terminal.py` draws while it runs and in tables, `html.py` writes one page."""
