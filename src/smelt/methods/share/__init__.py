"""Sharing: many elements take few values."""
