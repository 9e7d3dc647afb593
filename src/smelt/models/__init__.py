"""Built-in models: one file each, named by its path, with one function `build(**arguments) -> nn.Module`.

The arguments are plain data, so that a file can name a builder and its arguments instead of holding code.
`_open.open_model` also takes functions of other modules, and loads weights.
"""
