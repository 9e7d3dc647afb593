"""Files: one file per format, named by its path, with what writes it and, where it can be read again, what reads it."""
