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


diffusion = ["diffusers>=0.30"]
train = ["torch>=2.9", "accelerate>=1.0", "pyyaml>=6.0", "scikit-image>=0.22", "scikit-learn>=1.3", "scipy>=1.11"]
export = ["torch>=2.9", "onnx>=1.17", "onnxscript>=0.5"]
transformers = ["transformers>=5.0", "tokenizers>=0.22", "pyarrow>=16.0"]
batch = ["pyarrow>=16.0", "fsspec>=2024.2", "braceexpand>=0.1.7", "matplotlib>=3.8"]
ray = [*batch, "ray[data]>=2.40"]
s3 = [*batch, "s3fs>=2024.2"]
docs = ["mkdocs-material>=9.5", "mkdocstrings[python]>=0.27"]
test = [
    *train,
    *diffusion,
    *export,
    *transformers,
    *ray,
    *s3,
    "datasets>=3.0",
    "webdataset>=0.2.86",
    "megatron-core>=0.9",
    "moto[server]>=5.0",
    "torchdata>=0.11",
    "onnxruntime>=1.20",
    "pytest>=8.0",
    "pytest-cov>=5.0",
    "pytest-timeout>=2.3",
    "hypothesis>=6.100",
    "setuptools>=77",
]

setup(
    name="dyntok",
    version="0.1.0",
    description="Dynamic discrete visual tokenizer: an image as a short sequence of integers whose length follows the picture.",
    long_description=readme(),
    project_urls={"Source": ADDRESS} if ADDRESS else {},
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["dyntok", "dyntok.*"]) + find_packages("kernels"),
    package_dir={"dyntok_kernels": "kernels/dyntok_kernels"},
    package_data={"dyntok": ["pretrained/*/*", "training/recipes/*.yaml", "assets/*"]},
    install_requires=[
        "torch>=2.4",
        "timm>=1.0.11",
        "einops>=0.7",
        "safetensors>=0.4.3",
        "huggingface_hub>=0.30",
        "numpy>=1.26",
        "Pillow>=10.1",
        "tqdm>=4.60",
    ],
    extras_require={
        "train": train,
        "diffusion": diffusion,
        "export": export,
        "transformers": transformers,
        "batch": batch,
        "ray": ray,
        "s3": s3,
        "docs": docs,
        "test": test,
        "dev": [*test, *docs, "ruff>=0.9"],
    },
    entry_points={"console_scripts": ["dyntok = dyntok.cli.main:main"]},
    classifiers=[
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Topic :: Scientific/Engineering :: Image Processing",
    ],
)
