"""Training and evaluation data: records, readers, mixtures, chat templates, packing, collation."""
