"""All sums that `plain` does not compute: activations other than softmax, soft targets, label
smoothing and binary cross-entropy.

Logits stay in registers until the gradient replaces them: values derived from a logit are computed
where needed, and again in the gradient's second pass.
"""

from __future__ import annotations

from typing import Any

from .plan import Plan


def general_voxels(plan: Plan, gradient: bool, ops: Any) -> tuple[Any, Any, Any]:
    """Like `plain.plain_voxels`, for any `Spec`."""
    cuda, real, int32 = ops.cuda, ops.real, ops.int32
    power, lower_power, power_complement = ops.power, ops.lower_power, ops.power_complement
    exp, log, reciprocal, fmax = ops.exp, ops.log, ops.reciprocal, ops.fmax
    shuffle, label_type = ops.shuffle, ops.label
    modulation, modulation_slope = ops.modulation, ops.modulation_slope
    sigmoids, binary_modulation = ops.sigmoids, ops.binary_modulation
    spec = plan.spec
    V, LABELS, GRADIENT = plan.voxels, plan.label_limit, gradient
    WORD, SPACING = plan.word_voxels, plan.spacing
    SOFT = spec.soft_targets
    CROSS_ENTROPY, FOCAL, NLL = spec.gamma is not None, bool(spec.gamma), spec.nll
    BINARY, SQUARE = spec.binary_gamma is not None, spec.soft_targets and spec.target_square
    SOFTMAX, SIGMOID = spec.activation == "softmax", spec.activation == "sigmoid"
    ARGMAX, THRESHOLD = spec.activation == "argmax", spec.activation == "threshold"
    NEEDS_SOFTMAX, NEEDS_NLL = spec.needs_softmax, CROSS_ENTROPY or NLL
    REST, LINEAR = NEEDS_SOFTMAX and (FOCAL or GRADIENT), spec.p == 1
    FIRST_PASS = 0 if GRADIENT and NEEDS_SOFTMAX else 1  # pass 0 reduces over the classes
    BACKGROUND, PART, WIDTH = plan.background, plan.lane_classes, plan.factor_width
    NLL_ROW = 3 + CROSS_ENTROPY
    BINARY_ROW = NLL_ROW + NLL
    SQUARE_ROW, VOXELS_ROW = plan.fields - 2, plan.fields - 1
    BINARY_GAMMA = min(spec.binary_gamma or 0.0, ops.largest)
    SHUFFLES, FULL_MASK, LARGEST = plan.lanes.bit_length() - 1, 0xFFFFFFFF, ops.largest
    LOWEST, SMALLEST = float("-inf"), ops.smallest

    @ops.inlined
    def own_factors(factor, first_class):  # type: ignore[no-untyped-def]
        return factor

    @ops.inlined
    def voxels(  # type: ignore[no-untyped-def]
        value,
        target,
        labels,
        sums,
        factor,
        own_factor,
        left,
        first_class,
        ignored,
        excused,
        out_of_range,
    ):
        if GRADIENT and NEEDS_SOFTMAX:  # from pass 0 to pass 1
            slopes = cuda.local.array(PART, real)
            nll_factors = cuda.local.array(PART, real)
        for j in range(V):
            if not SOFT:
                label = labels[j]
                in_range = (label >= label_type(0)) & (label < label_type(LABELS))
                inside = left > int32(j // WORD * SPACING)
                valid = inside & in_range & (label != ignored)
                lane_label = int32(int32(label) - first_class) if valid else int32(-1)
                if not GRADIENT and inside and not in_range and label != excused:
                    out_of_range = int32(out_of_range + int32(1))
            if NEEDS_SOFTMAX:
                top = value[j]
                for c in range(1, PART):
                    top = fmax(top, value[c * V + j])
                for k in range(SHUFFLES):
                    top = fmax(top, shuffle(FULL_MASK, top, 1 << k))
                total, rest = real(-0.0), real(0)  # -0.0: the additive identity
                for c in range(PART):
                    below = value[c * V + j] - top
                    if BACKGROUND and c > 0:  # a logit of +inf has probability 1
                        below = real(0) if value[c * V + j] >= top else below
                    e = exp(below)
                    total += e
                    if REST and e < real(1):
                        rest += e
                for k in range(SHUFFLES):
                    total += shuffle(FULL_MASK, total, 1 << k)
                    if REST:
                        rest += shuffle(FULL_MASK, rest, 1 << k)
                inverse = reciprocal(total)
            if NEEDS_NLL:
                log_total = log(total)
                if FOCAL and total < real(2):
                    log_total += (rest - (total - real(1))) * inverse  # total's rounding error
            if REST:  # the probability of all classes but one above 1/2
                rest *= inverse
            if ARGMAX:  # the first of equal logits; NaN ranks as +inf
                top = real(LOWEST)
                winner = first_class
                for c in range(PART):
                    v = value[c * V + j]
                    v = v if v <= real(LARGEST) else real(-LOWEST)
                    if v > top:
                        top = v
                        winner = first_class + int32(c)
                for k in range(SHUFFLES):
                    other = shuffle(FULL_MASK, top, 1 << k)
                    index = shuffle(FULL_MASK, winner, 1 << k)
                    if other > top or (other == top and index < winner):
                        top = other
                        winner = index

            if SOFT and NEEDS_SOFTMAX:
                valid_classes = int32(0)
                for c in range(PART):
                    valid_classes += int32(1) if target[c * V + j] >= real(0) else int32(0)
                for k in range(SHUFFLES):
                    valid_classes += shuffle(FULL_MASK, valid_classes, 1 << k)
            # The gradient is s (slope - sum s slope) through the probabilities s of a softmax,
            # and q sum nll_factor - nll_factor through -log q. If a class is likely, above 1/2,
            # then dot = sum s (slope - likely_slope) and nll_total = sum nll_factor over the
            # others, and the gradient of the likely one is -s dot + q nll_total - (1 - q)
            # likely_nll, where nothing cancels.
            dot, nll_total, likely_slope, likely_nll = real(0), real(0), real(0), real(0)
            for this_pass in range(FIRST_PASS, 2):
                for c in range(PART):
                    v = value[c * V + j]
                    if SOFT:
                        valid = target[c * V + j] >= real(0)
                        t = fmax(target[c * V + j], real(0))
                    else:
                        t = real(1) if lane_label == int32(c) else real(0)
                    if NEEDS_SOFTMAX:
                        below = v - top
                        if BACKGROUND and c > 0:
                            below = real(0) if v >= top else below
                        e = exp(below)
                    if REST:
                        likely = e + e > total
                        not_q = rest if likely else real(1) - e * inverse
                    if SIGMOID or BINARY:
                        z = value[V + j] if c < BACKGROUND else v
                        b, not_b, positive, negative = sigmoids(z)  # -log b, -log(1 - b)
                        if c < BACKGROUND:  # one exponential for both classes of a channel
                            z, b, not_b = -z, not_b, b
                            positive, negative = negative, positive
                    if SOFTMAX:
                        s = e * inverse
                    elif SIGMOID:
                        s = b
                    elif ARGMAX:
                        s = real(1) if winner == first_class + int32(c) else real(0)
                    elif THRESHOLD:
                        s = real(1) if v > real(0) else real(0)
                    else:
                        s = v
                    if NEEDS_NLL:
                        nll = log_total - below
                    if FOCAL:  # kept above 0, where every power of it is finite
                        complement = fmax(not_q, real(SMALLEST))

                    if BINARY:
                        positive_modulation = binary_modulation(not_b, negative)
                        negative_modulation = binary_modulation(b, positive)

                    if not GRADIENT:
                        if valid:
                            sums[c] += s * t
                            sums[PART + c] += power(s)
                            sums[2 * PART + c] += t
                            if NLL:
                                sums[NLL_ROW * PART + c] += nll
                            if SQUARE:
                                sums[SQUARE_ROW * PART + c] += t * t
                            if SOFT:
                                sums[VOXELS_ROW * PART + c] += real(1)
                            # NaN where torch's (1 - t) z + softplus(-z) is 0 * inf or inf - inf
                            if BINARY and t < real(1):
                                negative += fmax(-z, real(0)) * real(0)
                                sums[(BINARY_ROW + 1) * PART + c] += (real(1) - t) * (
                                    negative_modulation * negative
                                )
                        if t > real(0):
                            if BINARY:
                                positive += z * real(0)
                                sums[BINARY_ROW * PART + c] += t * (positive_modulation * positive)
                            if FOCAL:
                                nll *= modulation(complement)
                            if CROSS_ENTROPY:
                                sums[3 * PART + c] += t * nll
                        continue

                    at_class = first_class + int32(c)
                    not_s = not_b if SIGMOID else not_q if SOFTMAX else real(1) - s
                    # a t + b p s^(p-1) as (a + b p) t + b p (s^(p-1) - t). Where t is 0, the
                    # first factor may be infinite, such as 2 / (P + Y).
                    difference = real(1) - t
                    if not LINEAR:
                        near_1 = difference - power_complement(not_s)
                        difference = near_1 if t > real(0.5) else lower_power(s) - t
                    difference = difference if valid else real(0)
                    slope = factor[int32(WIDTH) + at_class] * difference
                    own_slope = factor[at_class] * t
                    slope = slope + own_slope if t > real(0) else slope
                    nll_factor = real(0)
                    if CROSS_ENTROPY and t > real(0):
                        nll_factor = factor[int32(2 * WIDTH) + at_class] * t
                        if FOCAL:
                            product = e * inverse * nll if e > real(0) else real(0)
                            nll_factor *= (
                                modulation(complement) + modulation_slope(complement) * product
                            )
                    if NLL and valid:
                        nll_factor += factor[int32((NLL_ROW - 1) * WIDTH) + at_class]
                    if NEEDS_SOFTMAX and this_pass == 0:
                        slopes[c] = slope
                        nll_factors[c] = nll_factor
                        likely_slope = slope if likely else likely_slope
                        likely_nll = nll_factor if likely else likely_nll
                        dot += real(0) if likely else s * slope
                        nll_total += real(0) if likely else nll_factor
                        continue

                    if NEEDS_SOFTMAX:
                        slope, nll_factor = slopes[c], nll_factors[c]
                    if SOFTMAX:
                        dx = s * (-dot if likely else slope - likely_slope - dot)
                    else:
                        dx = slope * (s * not_s) if SIGMOID else slope
                    if NEEDS_NLL:
                        q = e * inverse
                        others_nll = nll_factor - q * likely_nll
                        dx += q * nll_total - (likely_nll * rest if likely else others_nll)
                    if BINARY:
                        positive_factor = factor[int32((BINARY_ROW - 1) * WIDTH) + at_class]
                        negative_factor = factor[int32(BINARY_ROW * WIDTH) + at_class]
                        # With w(r) = r^g:  positive_factor * -t w(1-b) (1-b + g b (-log b))
                        # + negative_factor * (1-t) w(b) (b + g (1-b) (-log(1-b))). The last
                        # factors of either are 0 where the logarithm is infinite.
                        binary_dx = real(0)
                        if t > real(0):
                            bound = real(LARGEST) if positive > real(LARGEST) else positive
                            bound *= real(BINARY_GAMMA) * b
                            binary_dx -= t * positive_modulation * (not_b + bound) * positive_factor
                        if valid and t < real(1):
                            bound = real(LARGEST) if negative > real(LARGEST) else negative
                            bound *= real(BINARY_GAMMA) * not_b
                            binary_dx += (
                                (real(1) - t) * negative_modulation * (b + bound) * negative_factor
                            )
                        if c < BACKGROUND:  # its logit is the negative of the channel's
                            background_dx = binary_dx
                        elif BACKGROUND:
                            dx += binary_dx - background_dx
                        else:
                            dx += binary_dx
                    keep = valid_classes > int32(0) if SOFT and NEEDS_SOFTMAX else valid
                    value[c * V + j] = dx if keep else real(0)

                if NEEDS_SOFTMAX and this_pass == 0:
                    for k in range(SHUFFLES):
                        if SOFTMAX:
                            dot += shuffle(FULL_MASK, dot, 1 << k)
                            likely_slope += shuffle(FULL_MASK, likely_slope, 1 << k)
                        if NEEDS_NLL:
                            nll_total += shuffle(FULL_MASK, nll_total, 1 << k)
                            likely_nll += shuffle(FULL_MASK, likely_nll, 1 << k)
                    dot -= likely_slope * rest
        return out_of_range

    @ops.inlined
    def complete(sums):  # type: ignore[no-untyped-def]
        pass

    return own_factors, voxels, complete
