"""Exchanging what a network is made of for something that does the same."""
