"""What memory a run takes at its peak, told before it begins; arithmetic only."""

from __future__ import annotations

from collections.abc import Sequence

from awq_pycuda.choices import Objective, Save, StepDtype
from awq_pycuda.config import Export, SearchPlace
from awq_pycuda.engine.arrays import kept_bytes, searched_rows
from awq_pycuda.engine.spec import RunSpec
from awq_pycuda.kernels import table
from awq_pycuda.kernels.variant import Device
from awq_pycuda.layers.inputs import LayerSpec
from awq_pycuda.layers.rows import StoredRows
from awq_pycuda.parallel import SEARCH_TOKENS, host_threads, product_rows, working_elements
from awq_pycuda.quant import for_kernels
from awq_pycuda.quant.conventions import Convention
from awq_pycuda.quant.format import Format
from awq_pycuda.quant.packing import AT_ONCE

# A thread draws so many numbers at a time, with so many bytes of intermediate words each.
_DRAWN_AT_ONCE, _DRAWING_BYTES = 1 << 16, 32
# What rounding to the numbers of FP4 makes of each weight: how large it is, a condition, and two distances of numbers.
_ROUNDING_BYTES = 13


def required_bytes(run: RunSpec, device: Device | None) -> tuple[int, int]:
    """Memory that a run takes at its peak, in bytes, with the host threads that are set.

    Beside the arrays that the run keeps there is only what one step of one layer makes: the largest such step counts.

    Args:
        run: what is to run.
        device: whose memory the arrays live in; None for the host.

    Returns:
        What the run takes of the device, and of the host.
    """
    specs, convention, on_device = run.layers, run.convention, device is not None
    searching = not on_device or run.search is SearchPlace.host
    kept = kept_bytes(specs, convention)
    step = max(_host_step(spec, convention, searching, on_device) for spec in specs)
    checking = max(_checking(spec, convention) for spec in specs) if run.verify else 0
    results = sum(_result(spec, convention.quantizer, run.keeps_codes) for spec in specs)
    codes = sum(spec.out_features * spec.in_features for spec in specs) if run.save is Save.full else 0
    blocks = max(_kept_blocks(spec, convention, searching, on_device) for spec in specs)
    steps = [step, checking, 2 * codes, _exporting(run)]  # in the end codes are in the file's image and its bytes, too
    if device is not None:
        read = sum(_read_on_host(spec, convention.quantizer, run.verify, searching) for spec in specs)
        return kept + _scratch(run, device), read + results + blocks + max(steps)
    steps += [_stage(spec, convention.quantizer) for spec in specs]
    return 0, kept + results + max(blocks + max(steps), *(_drawing(spec) for spec in specs))


def _result(spec: LayerSpec, form: Format, keeps_codes: bool) -> int:
    """The host's copies of a layer's statistics, scales and steps, and of its codes where they are asked for."""
    n, k = spec.out_features, spec.in_features
    return 4 * (4 * k + n * _of_groups(form, k)) + (n * k if keeps_codes else 0)


def _of_groups(form: Format, in_features: int) -> int:
    """Numbers that the groups of a row have: a step each, and a zero point where there are any."""
    return form.groups(in_features) * (1 if form.symmetric else 2)


def _exporting(run: RunSpec) -> int:
    """A checkpoint before it is written: all tensors, and the file's bytes or a layer's codes in other orders."""
    if run.export is Export.none:
        return 0
    form = run.convention.quantizer
    sizes = [(spec.out_features, spec.in_features) for spec in run.layers]
    tensors = sum(n * (form.bits * k // 8 + 5 * form.groups(k)) for n, k in sizes)
    largest = max(n * k for n, k in sizes)
    return tensors + max(tensors, 3 * largest + 8 * min(largest, AT_ONCE))


def _read_on_host(spec: LayerSpec, form: Format, verify: bool, searching: bool) -> int:
    """Of what lives on a device, what the host reads or writes, too: the driver keeps a second copy of it."""
    m, n, k = spec.tokens, spec.out_features, spec.in_features
    # The weights; the codes, for the metrics; the steps, which a search on the host makes for the layer's trial, too.
    always = 4 * n * k + n * k + (8 if searching else 4) * n * _of_groups(form, k)
    own = 0 if spec.activations is None else 4 * m * k
    return always + (own + 8 * m * n if verify else 0)


def _kept_blocks(spec: LayerSpec, convention: Convention, searching: bool, on_device: bool) -> int:
    """The blocks that every thread keeps from call to call: `parallel.scratch`, for the stages on the host."""
    m, n, k = spec.tokens, spec.out_features, spec.in_features
    jointly = _is_joint(spec, convention)
    arrays = 0 if not searching else 3 if convention.objective is Objective.diag and not jointly else 1
    kept = arrays * working_elements((n, k))
    if not on_device:
        kept = max(kept, min(n, product_rows(n) * host_threads()) * k if n >= m else 0)
        if convention.objective is Objective.output and not jointly:
            kept = max(kept, _trial_rows(spec, convention) * (k + min(m, SEARCH_TOKENS)))
    return 4 * kept


def _trial_rows(spec: LayerSpec, convention: Convention) -> int:
    """Rows of weights that the CPU's search for the output's error has at work at one time."""
    rows = product_rows(spec.out_features)
    blocks = -(-spec.out_features // rows) * convention.grid.size
    return min(rows, spec.out_features) * min(host_threads(), blocks)


def _host_step(spec: LayerSpec, convention: Convention, searching: bool, on_device: bool) -> int:
    """The most that the metrics, and the search where it is there, make on the host and let go of."""
    n, k = spec.out_features, spec.in_features
    block = working_elements((n, k))
    weight_error = max(8 * block, _clipping(spec, convention))  # in float64
    if not searching:
        return weight_error
    # Every candidate's scales, importance and weights in float64 and float32; the steps of the blocks at work.
    candidates = 44 * k * convention.grid.size + 28 * block * convention.quantizer.groups(k) // k
    rounding = _ROUNDING_BYTES if convention.quantizer.is_e2m1 else 0
    candidates += rounding * block
    making_steps = 4 * n * _of_groups(convention.quantizer, k)
    trials = 0
    if _is_joint(spec, convention):
        trials = 4 * k * convention.grid.size + _judging(spec, convention)
    elif convention.objective is Objective.output and not on_device:
        # All candidates, and of the blocks at work magnitudes in float32 or products in float64.
        of_row = max(4 * k, rounding * k, 8 * min(spec.tokens, SEARCH_TOKENS))
        trials = 8 * k * convention.grid.size + of_row * _trial_rows(spec, convention)
        if spec.chunk is not None:
            trials += 4 * k * min(spec.tokens, spec.at_once(spec.tokens) + SEARCH_TOKENS)
    return max(candidates, weight_error, making_steps, trials)


def _clipping(spec: LayerSpec, convention: Convention) -> int:
    """The most that clipping makes on the host and lets go of."""
    if convention.clip is None or not convention.clips(spec.name):
        return 0
    n, k, form = spec.out_features, spec.in_features, convention.quantizer
    tokens = _looked_at(spec, convention)
    size, block = form.size(k), working_elements((n, k))
    # Activations and their products, made in float64; then, of the blocks at work, weights as they are clipped, rounded
    # and compared, and what becomes of the outputs.
    products = form.groups(k) * size * min(size, tokens)
    outputs = block * min(size, tokens) // size
    comparing = (12 + (_ROUNDING_BYTES if form.is_e2m1 else 0)) * block + 4 * outputs
    choosing = 4 * tokens * k + 4 * products + max(8 * (tokens * k + products), comparing)
    choosing += 0 if spec.chunk is None else 4 * tokens * k
    return max(choosing, 4 * n * k + 8 * block)  # in the end all weights are held, before they are stored


def _looked_at(spec: LayerSpec, convention: Convention) -> int:
    """The tokens that shares are chosen by."""
    assert convention.clip is not None
    return len(range(0, spec.tokens, max(1, spec.tokens // convention.clip.tokens)))


def _is_joint(spec: LayerSpec, convention: Convention) -> bool:
    """Whether the layer's scales are searched jointly with its clipping."""
    return convention.clip is not None and convention.clip.joint and convention.clips(spec.name)


def _judging(spec: LayerSpec, convention: Convention) -> int:
    """What a joint search makes on the host for a candidate and lets go of, beside what it keeps of the best one."""
    n, k, form = spec.out_features, spec.in_features, convention.quantizer
    rows = min(n, product_rows(n) * host_threads())
    # Scaled weights and what is added to them; beside these magnitudes, or how they are rounded, and then squares in
    # float64 or a product.
    making = max(4, _ROUNDING_BYTES if form.is_e2m1 else 0) * k
    judged = 4 * spec.tokens if convention.objective is Objective.output else 8 * k
    ratios = 12 * n * form.groups(k)
    return ratios + max(_clipping(spec, convention), (8 * k + max(making, judged)) * rows)


def _stage(spec: LayerSpec, form: Format) -> int:
    """The most that the other stages and metrics make on the CPU backend and let go of."""
    m, n, k = max(spec.tokens, spec.held_out_tokens), spec.out_features, spec.in_features
    dequantized = 4 * n * k if n < m else 0
    statistics = 12 * working_elements((m, k))  # |x| in float32 and float64
    sums = 16 * working_elements((m, n))  # both sides of a comparison in float64
    codes = _ROUNDING_BYTES * working_elements((n, k)) if form.is_e2m1 else 0
    if not isinstance(spec.activations, StoredRows):
        return max(dequantized, statistics, sums, codes)
    # Activations as they are read, the outputs of a block of sums that parts share, and what is kept of the file.
    part = 4 * k * max(spec.at_once(spec.tokens), spec.at_once(spec.held_out_tokens))
    statistics += statistics // 3
    sums *= 2
    return spec.activations.cache_bytes + max(part + dequantized, statistics, part + sums, codes)


def _drawing(spec: LayerSpec) -> int:
    """Inputs while they are drawn on the host, once more in float32."""
    tokens = max(spec.tokens, spec.held_out_tokens)
    activations = 0 if spec.activations is None or spec.chunk is not None else tokens * spec.in_features
    drawn = max(spec.out_features * spec.in_features, activations)
    return 4 * drawn + _DRAWING_BYTES * min(drawn, _DRAWN_AT_ONCE * host_threads())


def _checking(spec: LayerSpec, convention: Convention) -> int:
    """verify: what the oracle has in float64, by its steps."""
    m, n, k = spec.tokens, spec.out_features, spec.in_features
    rows = min(n, product_rows(n) * host_threads())
    means = 3 * working_elements((m, k))
    product = m * k + m * n + rows * k
    compared = m * n + 4 * working_elements((m, n))
    block, form, by_output = working_elements((n, k)), convention.quantizer, convention.objective is Objective.output
    codes = (6 if form.is_e2m1 else 5) * block
    # Of each row of weights what it is, its codes and what rounding takes from them, and where ties are; its steps, and
    # those that float32 may have come to instead.
    curve = 4 * block + (5 if form.step_dtype is StepDtype.fp32 else 10) * block * form.groups(k) // k
    # The nearest number of FP4 is looked up. Many of its codes are so far from what they stand for that a tie may be.
    looking_up = 0 if not form.is_e2m1 else 4 * block if by_output else 2 * block
    curve += m * k + max(m * block // k, looking_up) if by_output else looking_up
    joint = _checking_jointly(spec, convention) if _is_joint(spec, convention) else 0
    return 8 * max(means, product, compared, codes, curve, joint)


def _checking_jointly(spec: LayerSpec, convention: Convention) -> int:
    """verify: numbers that the oracle of a joint search has in float64."""
    m, n, k, form = spec.tokens, spec.out_features, spec.in_features, convention.quantizer
    tokens, block = _looked_at(spec, convention), working_elements((n, k))
    assert convention.clip is not None
    # Of each group what it may become at every ratio: limits, ends, steps and zero points, by how these were rounded.
    fits = (1 if form.step_dtype is StepDtype.fp32 else 3) * (1 if form.symmetric else 3)
    options = 9 * fits * convention.clip.ratios.size * form.groups(k) * block // k
    activations = 4 * tokens * k + (2 * m * k if convention.objective is Objective.output else 0)
    # Scaled weights, held ones, what rounding adds and what all adds, where float32 may have come to something else of
    # these, too, and what becomes of the outputs.
    of_weights = (7 if fits == 1 else 10) * block
    return activations + options + of_weights + block * min(tokens, form.size(k)) // form.size(k) + m * block // k


def kernel_sizes(spec: LayerSpec, convention: Convention) -> dict[str, int]:
    """The sizes that a layer's kernels follow from, by the names of their table."""
    return {
        "tokens": spec.tokens,
        "out_features": spec.out_features,
        "in_features": spec.in_features,
        "candidates": convention.grid.size,
        **for_kernels.values(convention.quantizer, spec.in_features),
    }


def search_sizes(specs: Sequence[LayerSpec], convention: Convention) -> list[dict[str, int]]:
    """The sizes that the kernels of each search of a run follow from: those of layers that share it are one matrix."""
    found = []
    for index, spec in enumerate(specs):
        if rows := searched_rows(specs, index, convention):
            found.append(kernel_sizes(spec, convention) | {"out_features": rows})
    return found


def _scratch(run: RunSpec, device: Device) -> int:
    """What the kernels of one stage share between them: the workspace of the stage and layer that need most."""
    layers = [kernel_sizes(spec, run.convention) for spec in run.layers]
    sizes = dict.fromkeys((stage for stage in table.stages() if stage not in table.OF_SEARCHES), layers)
    if run.search is not SearchPlace.host:
        searching = table.SEARCHES[run.convention.objective.name], *run.convention.asks_weights * ("weight_means",)
        sizes |= dict.fromkeys(searching, search_sizes(run.layers, run.convention))
    needed = [0]
    for stage, of_stage in sizes.items():
        for each in of_stage:
            given = each | {"TILE": run.tile, "memory_bytes": device.memory_bytes}
            for variant in table.candidates(stage, run.variants.get(stage)):
                values = variant.complete(given)
                if variant.obstacle(values, device) is None:
                    needed.append(sum(nbytes(values) for nbytes in variant.scratch.values()))
                    break
    return max(needed)
