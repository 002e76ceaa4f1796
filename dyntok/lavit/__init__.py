"""Everything that only LaVIT's released files need."""
