"""The `florence-vl` command: one module per sub-command, imported only when called."""
