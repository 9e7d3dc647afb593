"""Built-in data sets: one file each, named by its path, with one function `load(...) -> Data` of plain arguments.

`_read.open_data` also opens files, folders and functions.
"""
