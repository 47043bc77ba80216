"""Time to prove the norms of a network, and how tight the proofs are, layer by layer.

    python benchmarks/norms.py                       4C3F, 6C2F, 8C2F with random weights
    python benchmarks/norms.py resnet18 --images 2   ResNet-18 at 224 x 224, minutes on two cores
    python benchmarks/norms.py outputs/quick/runs/*  networks of finished runs
    ... --method tight                               within a permille, later
    ... --images 10000                               also certify that many random images

gap is upper / lower - 1, both proven: the norm lies between. ResNet-18 is torchvision's, with
random weights and random BatchNorm statistics, seed 0.
"""

import functools
import time
from pathlib import Path

import clock
import torch
import torchvision
from torch import nn

import cll
from cll import experiment
from cll.bounds.linear import PROOFS
from paper.records import markdown

SHAPES = {"4C3F": (3, 32, 32), "6C2F": (3, 32, 32), "8C2F": (3, 64, 64)}


def network(name):
    """A network with random weights by its name, or that of a run's folder."""
    torch.manual_seed(0)
    if name in SHAPES:
        return cll.build(name, 10, SHAPES[name])
    if name == "resnet18":
        return cll.as_lipschitz_net(resnet18(), (3, 224, 224))
    return experiment.load_model(Path(name))


def resnet18():
    """The network as an nn.Sequential, its skip connections written with cll.Residual."""
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
    parser = clock.parser(__doc__)
    parser.add_argument("networks", nargs="*", default=list(SHAPES), help="names or run folders")
    parser.add_argument("--method", choices=PROOFS, default="guaranteed")
    parser.add_argument("--images", type=int, default=0, help="images to certify, of random noise")
    args = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {args.method} proofs")
    for name in args.networks:
        net, wall, cpu = network(name), time.perf_counter(), time.process_time()
        table = cll.layer_bounds(net, progress=False, method=args.method)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        table["gap"] = table["upper"] / table["lower"] - 1
        print(f"\n{name}\n\n{markdown(table)}\nproven in {wall:.1f} s, {cpu:.1f} CPU s")
        if args.images:
            shape, random = (args.images, *net.input_shape), torch.Generator().manual_seed(0)
            images = torch.randint(256, shape, dtype=torch.uint8, generator=random)
            data = images, torch.zeros(args.images, dtype=torch.long)
            work = functools.partial(cll.certify, net, data, method=args.method, progress=False)
            wall = clock.seconds(work)
            print(f"{args.images} images certified in {wall:.1f} s more")
        print(f"at most {clock.highest() / 2**10:.1f} GiB held so far", flush=True)


if __name__ == "__main__":
    main()
