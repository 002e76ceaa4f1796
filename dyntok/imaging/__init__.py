"""Decodes image files to upright 8-bit RGB, independent of their metadata and of other libraries' settings."""
