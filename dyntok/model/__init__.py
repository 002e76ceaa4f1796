"""The networks, one file per box of the paper's figure: backbone, selector, merger, codebook, decoder, pixel head.

They take and return tensors. Not here: files, pictures, LaVIT's released weights.
"""
