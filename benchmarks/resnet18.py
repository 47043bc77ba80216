"""Prove the bounds of ResNet-18 at 224 x 224, layer by layer, and certify two images.

    python benchmarks/resnet18.py                  # minutes on two cores
    python benchmarks/resnet18.py --method fast    # the cheapest proofs

Prints each layer with its proven interval, then the largest gap, wall time, CPU time and the peak
of memory. torchvision's network with random weights and random BatchNorm statistics, seed 0.
"""

import argparse
import resource
import time

import torch
import torchvision
from torch import nn

import cll
from cll.bounds.linear import PROOFS

SHAPE = (3, 224, 224)


def resnet18():
    """The network as an nn.Sequential, its skip connections written with cll.Residual."""
    torch.manual_seed(0)
    net = torchvision.models.resnet18().eval()
    with torch.no_grad():
        for layer in net.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.running_mean.normal_(0, 0.1)
                layer.running_var.uniform_(0.5, 2)
                layer.weight.uniform_(0.3, 1.2)
    layers = [net.conv1, net.bn1, nn.ReLU(), net.maxpool]
    for block in (*net.layer1, *net.layer2, *net.layer3, *net.layer4):
        branch = nn.Sequential(block.conv1, block.bn1, nn.ReLU(), block.conv2, block.bn2)
        layers += [cll.Residual(branch, block.downsample), nn.ReLU()]
    return nn.Sequential(*layers, net.avgpool, nn.Flatten(), net.fc).eval()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--method", choices=PROOFS, default="guaranteed")
    method = parser.parse_args().method
    model, start = resnet18(), time.time()
    table = cll.layer_bounds(model, method=method, input_shape=SHAPE)
    print(table.to_string())
    proven = table[table["proof"] != "by construction"]
    gap = (proven["upper"] / proven["lower"] - 1).max()
    images = torch.rand(2, *SHAPE), torch.zeros(2, dtype=torch.long)
    cll.certify(model, images, method=method, progress=False)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(
        f"{method}: largest gap {100 * gap:.2f} %, {time.time() - start:.0f} s, "
        f"{time.process_time():.0f} CPU s on {torch.get_num_threads()} threads, {peak:.1f} GiB"
    )


if __name__ == "__main__":
    main()
