"""What `verify=true` leaves in a result file: a part of the schema's table."""

# Stage, unit of its worst error, what that is, and the schema version that first has it.
VERIFIED = (
    ("abs_mean", "1", "relative error of the mean of |x|", 1),
    ("sq_mean", "1", "relative error of the mean of x²", 1),
    ("abs_max", "1", "relative error of the largest |x|", 6),
    (
        "error_curve",
        "steps",
        "error of the search's curve in quantization steps, of a joint search the worse of its two; of layers "
        "that share it the first one has it, of older files those with `diag` only",
        1,
    ),
    ("s", "1", "relative error of the scales", 1),
    ("scale_b", "1", "relative error of the steps", 1),
    ("zero_points", "steps", "error of the zero points", 5),
    ("clipped", "1", "relative error of the clipped weights", 5),
    ("codes_off_tie", "codes", "codes that differ away from a rounding tie", 1),
    ("codes_off_by_more_than_1", "codes", "codes that differ by more than one", 1),
    ("output", "1", "relative error of the product", 1),
    ("relu", "1", "relative error of the layer's output", 1),
)
