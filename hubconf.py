"""The committed image networks for torch.hub, from a checkout:

    net = torch.hub.load("path/to/checkout", "cifar10_4C3F_CLL", source="local")

cll.reference.images() names them all; README.md in the folder of its run is the model card of each.
"""

import cll

dependencies = ["torch", "numpy", "safetensors"]


def _entry(name):
    """The function without arguments that loads a committed network."""
    record = cll.experiment.reference.read_record(cll.reference.names()[name])

    def network():
        return cll.load_reference(name)

    network.__doc__ = f"""{record["model"]} on {record["data"]}, trained with {record["method"]}: a
    cll.LipschitzNet in evaluation mode, for images {tuple(record["input_shape"])} in [0, 1].
    `cll.certify(net, (images, labels))` gives the certified radius of each image.
    The same as cll.load_reference("{name}"). Raises ValueError for damaged weights."""
    return network


globals().update({key: _entry(name) for key, name in cll.reference.images().items()})
