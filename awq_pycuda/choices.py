"""What a format leaves to choose, by name: the config, formats and conventions speak of it alike."""

from enum import Enum


class Element(Enum):
    """What codes stand for: whole numbers, or the numbers of FP4, E2M1."""

    int = "int"
    e2m1 = "e2m1"


class Divisor(Enum):
    """Of the largest magnitude, for the step of symmetric integers: the largest code, or half of the codes' range."""

    largest = "largest"
    half_range = "half_range"


class ZeroPoint(Enum):
    """A code, or the weight that the code in the middle stands for."""

    integer = "integer"
    float = "float"


class ZeroOrder(Enum):
    """Whether an integer zero point is added to a rounded quotient, or before it is rounded."""

    round_first = "round_first"
    shift_first = "shift_first"


class StepDtype(Enum):
    """What steps are rounded to; `e8m0_up` is `e8m0` with the next power of two where 6 would be passed by far."""

    fp32 = "fp32"
    fp16 = "fp16"
    bf16 = "bf16"
    e4m3 = "e4m3"
    e8m0 = "e8m0"
    e8m0_up = "e8m0_up"


class ZeroStep(Enum):
    """The step of a group of zeros: 1, or the gap above 1 in the steps' type."""

    one = "one"
    epsilon = "epsilon"
