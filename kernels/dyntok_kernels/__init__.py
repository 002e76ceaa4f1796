"""The operations of dyntok: ragged attention, code search, compaction, merging. `reference` has naive versions."""

from dyntok_kernels.cpu import lengths_of as lengths_of
from dyntok_kernels.ops import codebook_stats as codebook_stats
from dyntok_kernels.ops import compact as compact
from dyntok_kernels.ops import gather_rows as gather_rows
from dyntok_kernels.ops import merge_similar as merge_similar
from dyntok_kernels.ops import nearest_code as nearest_code
from dyntok_kernels.ops import scatter_rows as scatter_rows
from dyntok_kernels.ops import total_of as total_of
from dyntok_kernels.ops import varlen_attention as varlen_attention
from dyntok_kernels.soft_masked_attention import soft_masked_attention as soft_masked_attention
