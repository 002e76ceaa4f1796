"""The tokenizer as a web page: a static folder whose page encodes and decodes in the visitor's browser.

Not here: the command line (`cli/page.py`).
"""

from dyntok.page.build import write_page as write_page
