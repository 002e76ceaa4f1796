"""Weights on disk and on the hub: the file format, the fingerprint, saving and loading."""
