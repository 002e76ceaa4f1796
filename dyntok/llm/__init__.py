"""Images as a foreign language: codes that any causal language model reads and writes.

Needs torch. transformers is imported only by the functions that use it.
"""

from dyntok.llm.documents import Document as Document
from dyntok.llm.documents import ImageCodes as ImageCodes
from dyntok.llm.documents import in_drawn_order as in_drawn_order
from dyntok.llm.documents import read_documents as read_documents
from dyntok.llm.extend import extend_model as extend_model
from dyntok.llm.extend import extend_tokenizer as extend_tokenizer
from dyntok.llm.fetch import fetch_image as fetch_image
from dyntok.llm.grammar import GrammarState as GrammarState
from dyntok.llm.grammar import ImageGrammar as ImageGrammar
from dyntok.llm.logits_processor import ImageLogitsProcessor as ImageLogitsProcessor
from dyntok.llm.mask import GrammarMask as GrammarMask
from dyntok.llm.packing import PackedRow as PackedRow
from dyntok.llm.packing import Packer as Packer
from dyntok.llm.parsing import Segment as Segment
from dyntok.llm.parsing import parse_ids as parse_ids
from dyntok.llm.parsing import parse_text as parse_text
from dyntok.llm.prefix import Prefixed as Prefixed
from dyntok.llm.prefix import VisualPrefix as VisualPrefix
from dyntok.llm.processor import VisualProcessor as VisualProcessor
from dyntok.llm.rows import PackedDataset as PackedDataset
from dyntok.llm.rows import collate_rows as collate_rows
from dyntok.llm.rows import flatten_rows as flatten_rows
from dyntok.llm.separation import check_packing as check_packing
from dyntok.llm.separation import document_leak as document_leak
