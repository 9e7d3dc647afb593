"""Weights that vary less from one to the next."""
