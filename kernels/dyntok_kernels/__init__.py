"""Operations of dyntok: ragged attention and code search. `reference` holds their naive twins."""

from dyntok_kernels.ops import lengths_of as lengths_of
from dyntok_kernels.ops import nearest_code as nearest_code
from dyntok_kernels.ops import varlen_attention as varlen_attention
from dyntok_kernels.ops import weighted_attention as weighted_attention
