"""Inputs of a batch run: folders, lists, tars and Parquet, as shards of samples."""
