"""Files: one file per format, named by its path, with `save` and, where the format can be read again, `load`."""
