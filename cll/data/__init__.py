"""Data sets in memory, and their augmentation."""

from .augment import Augmentation, augment, draw, to_float
from .sources import SOURCES, DataNotFound, Dataset, check_values, load
