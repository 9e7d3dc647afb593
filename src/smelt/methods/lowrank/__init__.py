"""Layers as chains of thinner layers."""
