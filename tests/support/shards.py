"""Checkpoints in several files, without gigabytes of weights."""

import pytest

from dyntok.checkpoint import format as checkpoint


def save_in_shards(size, folder, config, state, **options):
    """`checkpoint.save` with shards of at most `size` bytes."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(checkpoint, "_MAX_SHARD_BYTES", size)
        return checkpoint.save(folder, config, state, **options)
