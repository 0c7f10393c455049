"""Data sets of scenes as files: the named sets of the recipes, and the supported formats."""
