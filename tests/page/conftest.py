"""The page of the bundled tokenizer, written once for all tests in a browser."""

import pytest
from support.web import RUNTIME

import dyntok
from dyntok.page import write_page


@pytest.fixture(scope="session")
def bundled_site(tmp_path_factory):
    pytest.importorskip("playwright")
    return write_page(dyntok.load(), tmp_path_factory.mktemp("site"), runtime=RUNTIME)
