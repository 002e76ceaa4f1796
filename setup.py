"""The parts of the build that pyproject.toml can't state: two source roots, and links of the README made absolute."""

import os
import re
from pathlib import Path

from setuptools import find_packages, setup

ADDRESS = os.environ.get("DYNTOK_URL", "").rstrip("/")  # of the repository, stated by whoever builds a release


def readme() -> str:
    """Returns README.md for a package index, where relative links lead nowhere: absolute, or as plain text."""
    text = Path(__file__).with_name("README.md").read_text(encoding="utf-8")
    if ADDRESS:
        text = re.sub(r"(!\[[^\]]*\]\()(?!https?:)", rf"\1{ADDRESS}/raw/HEAD/", text)
        return re.sub(r"(?<!!)(\[[^\]]*\]\()(?!https?:)", rf"\1{ADDRESS}/blob/HEAD/", text)
    text = re.sub(r"!\[[^\]]*\]\((?!https?:)[^)]+\)\n*", "", text)
    return re.sub(r"\[([^\]]*)\]\((?!https?:)[^)]+\)", r"\1", text)


setup(
    long_description=readme(),
    long_description_content_type="text/markdown",
    project_urls={"Source": ADDRESS} if ADDRESS else {},
    packages=find_packages(include=["dyntok", "dyntok.*"]) + find_packages("kernels"),
    package_dir={"dyntok_kernels": "kernels/dyntok_kernels"},
    package_data={
        "dyntok": ["py.typed", "pretrained/*/*", "training/recipes/*.yaml", "assets/*", "page/site/*", "page/site/*/*"],
        "dyntok_kernels": ["py.typed"],
    },
)
