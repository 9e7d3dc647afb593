"""What is faster than a dense layer here, measured: one file per kernel, named by its path."""
