"""Coding: leaves at rest in fewer bytes, without loss."""
