"""The version of the package; the version of the file format stands in `formats/`."""

__version__ = "0.1.0"
