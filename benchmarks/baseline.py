"""The textbook way to train a Lipschitz network: the yardstick of every speed claim.

One network at a time, the way the method is written down: images go through PIL and a DataLoader
one by one; each step runs five power iterations per layer under autograd and builds the distances
||w_y - w_j|| sample by sample; after each epoch single power iterations go on until K moves by no
more than 1e-9, or 10,000 times (the published rule). Nothing is slowed down on purpose. Networks
and parameter files are the package's, so that a ratio compares the training and nothing else.
"""

import itertools
import math
import os

import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset
from torchvision import transforms

import cll
from cll import experiment

RUNS = (  # parameter files that it can train: CLL and GloRo, of dense and convolutional layers
    "figure4/moons-CLL-eps0.15",
    "figure4/moons-GloRo-eps0.15",
    "table2/cifar10-4C3F-CLL",
    "table2/cifar10-6C2F-CLL",
)


def setting(file):
    """(parameters, data) of one of RUNS; for images scikit-learn's digits, which need no download:
    time does not depend on what the pictures show."""
    params = cll.load_params(cll.ROOT / f"params/{file}.yaml", "paper")
    if params.model != "MLP":
        params = params.model_copy(update={"data": "digits"})
    return params, experiment.load_dataset(params)


class Pictures(Dataset):
    """uint8 images (N, 3, H, W) as PIL pictures through a transform, as torchvision.datasets do."""

    def __init__(self, images, targets, transform):
        self.images, self.targets = images.permute(0, 2, 3, 1).numpy(), targets
        self.transform = transform

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, i):
        return self.transform(Image.fromarray(self.images[i])), self.targets[i]


def loader(images, targets, augmentation, batch, workers=0):
    """The DataLoader of a training set; augmentation: of a parameter file (data.Augmentation);
    workers: processes that load, for a GPU."""
    options = {"shuffle": True, "drop_last": True}
    if workers:
        options |= {"num_workers": workers, "persistent_workers": True, "pin_memory": True}
    if images.is_floating_point():
        return DataLoader(TensorDataset(images, targets), batch, **options)
    a = augmentation
    transform = transforms.Compose(
        [
            transforms.RandomCrop(images.shape[-2:], padding=a.crop),
            transforms.RandomHorizontalFlip(),
            transforms.ColorJitter(a.jitter, a.jitter, a.jitter),
            transforms.RandomRotation(a.rotation),
            transforms.ToTensor(),
        ]
    )
    return DataLoader(Pictures(images, targets, transform), batch, **options)


class Norm:
    """The spectral norm of one Linear or Conv2d by power iteration, from a vector that is kept."""

    def __init__(self, layer, shape):
        self.layer, self.v = layer, torch.randn(1, *shape).to(layer.weight.device)

    def __call__(self, iterations):
        v = self.v
        for _ in range(iterations):
            u = self.forward(v)
            v = self.transposed(u / u.norm(), v.shape)
            v = v / v.norm()
        self.v = v.detach()
        return self.forward(v).norm()

    def forward(self, v):
        layer = self.layer
        if isinstance(layer, nn.Linear):
            return F.linear(v, layer.weight)
        return F.conv2d(v, layer.weight, None, layer.stride, layer.padding)

    def transposed(self, u, shape):
        layer = self.layer
        if isinstance(layer, nn.Linear):
            return F.linear(u, layer.weight.T)
        return nn.grad.conv2d_input(shape, layer.weight, u, layer.stride, layer.padding)


class Baseline:
    """One network in training; params: of a parameter file, data: a data.Dataset. On a GPU every
    core loads images."""

    def __init__(self, params, data, device="cpu"):
        torch.manual_seed(params.seed)
        self.params, self.loss, self.device = params, params.loss, device
        self.net = cll.build(params.model, data.num_classes, data.input_shape).to(device)
        self.norms, shape = [], tuple(data.input_shape)
        for layer in self.net.body:
            if isinstance(layer, nn.Linear | nn.Conv2d):
                self.norms.append(Norm(layer, shape))
            shape = tuple(layer(torch.zeros(1, *shape, device=device)).shape[1:])
        self.optimizer = torch.optim.Adam(self.net.parameters(), params.optimizer.lr)
        batch = min(params.batch_size, len(data.train_targets))
        workers = 0 if device == "cpu" else min(16, os.cpu_count())
        train = data.train_images, data.train_targets
        self.batches = loader(*train, params.augmentation, batch, workers)
        self.done, self.total = 0, params.epochs * len(self.batches)

    def endless(self):
        """Batches of one epoch after the other."""
        return itertools.chain.from_iterable(itertools.repeat(self.batches))

    def body_norm(self, iterations):
        product = 1.0
        for norm in self.norms:
            product = product * norm(iterations)
        return product

    def step(self, x, y):
        """One step on a batch; returns the loss."""
        x, y = x.to(self.device), y.to(self.device)
        W, f = self.net.head.weight, self.net(x)
        K = self.body_norm(self.params.power_iterations)
        pairs = (W[:, None] - W[None]).norm(dim=2)
        if self.loss.name == "GloRo":
            j = f.argmax(1)
            rows = K * (W[j][:, None] - W[None]).norm(dim=2)  # (N, C, D) on the way
            bottom = (f + self.loss.epsilon * rows).masked_fill(F.one_hot(j, len(W)) > 0, -math.inf)
            loss = F.cross_entropy(torch.cat([f, bottom.amax(1, keepdim=True)], 1), y)
        else:
            epsilon, p = self.loss.epsilon, self.slack()
            target = F.one_hot(y, len(W)) > 0
            rows = K.detach() * (W[y][:, None] - W[None]).norm(dim=2).detach()  # (N, C, D)
            distance = (f - f.gather(1, y[:, None])) / rows.masked_fill(target, 1.0)
            offset = torch.where(
                target, -epsilon if self.loss.offset == "two-sided" else 0, epsilon
            )
            sigma = epsilon / math.log((2 - p) / p)
            loss = F.cross_entropy((distance + offset) / sigma, y)
            loss = loss + self.loss.lam * (K * pairs.max()) ** 2
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.done += 1
        return loss.item()

    def slack(self):
        """The slack p of this step, annealed where the parameters say so."""
        if self.loss.p_start is None:
            return self.loss.p
        left = (1 - self.done / self.total) ** self.loss.p_power
        return self.loss.p + (self.loss.p_start - self.loss.p) * left

    @torch.no_grad()
    def converge(self):
        """K after an epoch: (K, number of iterations it took)."""
        before, K, iterations, W = math.inf, 0.0, 0, self.net.head.weight
        while abs(K - before) > 1e-9 and iterations < 10_000:
            before = K
            K = (self.body_norm(1) * (W[:, None] - W[None]).norm(dim=2).max()).item()
            iterations += 1
        return K, iterations

    @torch.no_grad()
    def certify(self, images, targets):
        """The radius of every image (0 where the prediction is wrong), batch by batch."""
        W, radii = self.net.head.weight, []
        K, _ = self.converge()
        K = K / (W[:, None] - W[None]).norm(dim=2).max()
        for x, y in DataLoader(TensorDataset(images, targets), self.params.batch_size):
            x, y = x.to(self.device), y.to(self.device)
            f = self.net(x)
            top = f.argmax(1)
            rows = K * (W[top][:, None] - W[None]).norm(dim=2)
            margin = (f.gather(1, top[:, None]) - f) / rows
            margin = margin.masked_fill(F.one_hot(top, len(W)) > 0, math.inf)
            radii.append(margin.amin(1) * (top == y))
        return torch.cat(radii)

    def epoch(self):
        """One epoch and the convergence after it: (K, number of iterations it took)."""
        for x, y in self.batches:
            self.step(x, y)
        return self.converge()
