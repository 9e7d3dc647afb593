"""What runs a model: one file per runtime, named by its path; see `smelt.core.runtime`."""
