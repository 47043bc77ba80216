"""Packages that a certificate does not need, and training or the exhibits do: the extra `kit`."""

import importlib


def kit(module):
    """The module, imported; ModuleNotFoundError that names the extra, where it is missing."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module.split(".")[0]:  # it is there, and something else is not
            raise
        raise ModuleNotFoundError(
            f"this needs {error.name}, from the extra `kit` of cll: pip install -e '.[kit]' in the "
            "checkout",
            name=error.name,
        ) from None
