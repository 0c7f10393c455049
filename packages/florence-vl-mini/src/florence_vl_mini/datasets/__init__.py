"""Data sets of scenes as files: the named sets that the recipes read, and the formats they are written in."""
