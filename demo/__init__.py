"""A busy database and its files, copied while they stand still: ``make demo``."""
