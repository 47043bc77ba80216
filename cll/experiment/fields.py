"""Kinds of values in a parameter file, each with the range that it may lie in."""

from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field


class Record(BaseModel):
    """Keys and values that are checked once and stay: an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)


def _numbers(value, name=""):
    """The value; ValueError where it holds true or false, which Python counts as 1 or 0."""
    if isinstance(value, bool):
        raise ValueError(f"{name}true or false is no number")
    held = dict(enumerate(value)) if isinstance(value, list | tuple) else value
    for key, number in held.items() if isinstance(held, dict) else ():
        if isinstance(key, int) or key in IN_AUGMENTATION:
            _numbers(number, f"{key}: " * isinstance(key, str))
    return value


IN_AUGMENTATION = ("crop", "rotation", "jitter", "brightness", "contrast", "saturation", "hue")
Number = BeforeValidator(_numbers)
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False), Number]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False), Number]
Finite = Annotated[float, Field(allow_inf_nan=False), Number]
Slack = Annotated[float, Field(gt=0, lt=1), Number]
Share = Annotated[float, Field(gt=0, le=1), Number]  # of training, or of a size
Start = Annotated[float, Field(ge=0, lt=1), Number]  # a moment of training
Count = Annotated[int, Field(gt=0), Number]
