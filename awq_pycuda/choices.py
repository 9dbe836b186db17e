"""What formats, conventions, inputs and results leave to choose, by name: the config speaks of it as they do."""

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


class ConventionChoice(Enum):
    """Whose way of choosing scales is followed; see `quant/conventions.py`."""

    day58 = "day58"
    llm_awq = "llm_awq"
    autoawq = "autoawq"
    llm_compressor = "llm_compressor"
    torchao = "torchao"
    gptqmodel = "gptqmodel"


class Objective(Enum):
    """What the scale search minimises."""

    diag = "diag"
    output = "output"


class Statistic(Enum):
    """What an input channel's scale is made of: the mean of |x| over the tokens, or the largest."""

    abs_mean = "abs_mean"
    abs_max = "abs_max"


class Formula(Enum):
    """What scales are made of: the activations' statistic to the power of gamma, divided by one of the weights.

    `plain`: by nothing. `duo`: by the weights' to the power of 1 - gamma. `both`: every gamma first plain, then duo.
    `gamma_beta`: by the weights' to the power of beta, which is searched, too.
    """

    plain = "plain"
    duo = "duo"
    both = "both"
    gamma_beta = "gamma_beta"


class Normalization(Enum):
    """How the scales of one candidate are brought to a common size."""

    mean = "mean"
    sqrt_max_min = "sqrt_max_min"


class Ties(Enum):
    """Which of the candidates with the lowest error is chosen."""

    smaller_gamma = "smaller_gamma"
    first = "first"


class Share(Enum):
    """Which layers have one scale for each input channel: none but itself, or all that have the same input."""

    layers = "layers"
    inputs = "inputs"


class WeightScale(Enum):
    """Size of synthetic weights: `unit` is U(-1, 1), `he` is U(-b, b) with b = sqrt(6 / in_features)."""

    unit = "unit"
    he = "he"


class Save(Enum):
    """What the result file holds: `full` adds the quantized weights."""

    summary = "summary"
    full = "full"


class Baselines(Enum):
    """What scales are measured against: `all` adds those of max|x| to none at all, which is RTN."""

    all = "all"
    rtn = "rtn"
