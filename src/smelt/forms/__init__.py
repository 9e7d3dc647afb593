"""How tensors are stored: one file per form, decode only.  Files, kernels and exporters know these, never methods."""
