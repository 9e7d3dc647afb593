"""How the layers of a model hang together."""
