"""A softmax and class labels (`Spec.plain`): the sums of a thread's voxels, or their gradient.

Exponentials, probabilities and the gradient replace the logits, one after another.
"""

from __future__ import annotations

from typing import Any

from .plan import Plan


def plain_voxels(plan: Plan, gradient: bool, ops: Any) -> tuple[Any, Any, Any]:
    """What `kernels.voxel_kernel` needs of a kind of sums, three functions that numba inlines:

    - (factor, first_class): the factors of the thread's own classes, read once for all voxels;
    - (value, target, labels, ...): adds the sums of the voxels whose logits are in `value`, or
      replaces them by their gradient; returns the number of labels out of range until now;
    - (sums,): completes the sums of a thread.
    """
    cuda, real, int32 = ops.cuda, ops.real, ops.int32
    power, lower_power, power_complement = ops.power, ops.lower_power, ops.power_complement
    exp, log, reciprocal, fma, fmax = ops.exp, ops.log, ops.reciprocal, ops.fma, ops.fmax
    shuffle, label_type = ops.shuffle, ops.label
    modulation, modulation_slope = ops.modulation, ops.modulation_slope
    V, LABELS, GRADIENT = plan.voxels, plan.label_limit, gradient
    WORD, SPACING = plan.word_voxels, plan.spacing
    CROSS_ENTROPY, FOCAL = plan.spec.gamma is not None, bool(plan.spec.gamma)
    NLL = FOCAL or (CROSS_ENTROPY and not GRADIENT)  # needs -log of the label's probability,
    REST = FOCAL or GRADIENT  # and those of all other classes together
    LINEAR = plan.spec.p == 1
    BACKGROUND, PART, WIDTH = plan.background, plan.lane_classes, plan.factor_width
    SHUFFLES, FULL_MASK, SMALLEST = plan.lanes.bit_length() - 1, 0xFFFFFFFF, ops.smallest

    @ops.inlined
    def own_factors(factor, first_class):  # type: ignore[no-untyped-def]
        pred_factor = cuda.local.array(PART, real)
        for c in range(PART):
            pred_factor[c] = factor[int32(WIDTH) + first_class + int32(c)]
        return pred_factor

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
        if NLL:  # a separate loop: the compiler would not unroll the next one otherwise
            label_logit = cuda.local.array(V, real)
            for j in range(V):
                logit = real(0)
                for c in range(PART):
                    if int32(int32(labels[j]) - first_class) == int32(c):
                        logit = value[c * V + j]
                for k in range(SHUFFLES):
                    logit += shuffle(FULL_MASK, logit, 1 << k)
                label_logit[j] = logit
        for j in range(V):
            label = labels[j]
            in_range = (label >= label_type(0)) & (label < label_type(LABELS))
            inside = left > int32(j // WORD * SPACING)
            valid = inside & in_range & (label != ignored)
            lane_label = int32(int32(label) - first_class)
            top = value[j]
            for c in range(1, PART):
                top = fmax(top, value[c * V + j])
            for k in range(SHUFFLES):
                top = fmax(top, shuffle(FULL_MASK, top, 1 << k))
            # -0.0: the additive identity, so that the first addition is elided
            total, own, rest, dot = real(-0.0), real(0), real(-0.0), real(-0.0)
            for c in range(PART):
                below = value[c * V + j] - top
                if BACKGROUND and c > 0:  # a logit of +inf has probability 1 beside the logit 0
                    below = real(0) if value[c * V + j] >= top else below
                e = exp(below)
                value[c * V + j] = e
                if not REST:
                    total += e
                elif lane_label == int32(c):
                    own = e
                else:
                    rest += e
                    if GRADIENT and LINEAR:
                        dot += e * own_factor[c]
            if REST:
                for k in range(SHUFFLES):
                    own += shuffle(FULL_MASK, own, 1 << k)
                    rest += shuffle(FULL_MASK, rest, 1 << k)
                total = own + rest
            else:
                for k in range(SHUFFLES):
                    total += shuffle(FULL_MASK, total, 1 << k)
            inverse = reciprocal(total)

            if NLL:
                below = label_logit[j] - top
                if BACKGROUND:
                    below = real(0) if label_logit[j] >= top else below
                nll = log(total) - below  # finite even if the probability underflows
            if FOCAL:
                nll += (rest - (total - own)) * inverse  # the rounding error of total
            own *= inverse
            rest *= inverse
            if FOCAL:  # kept above 0, where every power of it is finite
                complement = fmax(rest, real(SMALLEST))

            # With d_c the derivative with respect to s_c, o the label's class, r the sum of all
            # s but s_o, and D = sum s_c (d_c - d_o), the gradient is s_c (d_c - sum s d + h),
            # but for o: -s_o D - h r. Of a near-perfect prediction, D and r are small, and
            # would be lost in differences from d_o and from 1.
            if GRADIENT:
                index = int32(label) if in_range else int32(0)
                own_slope = factor[index]
                if not LINEAR:
                    own_slope -= factor[int32(WIDTH) + index] * power_complement(rest)
                if LINEAR:
                    dot *= inverse
                else:
                    for c in range(PART):
                        s = value[c * V + j] * inverse
                        if lane_label != int32(c):
                            dot += s * (own_factor[c] * lower_power(s))
                for k in range(SHUFFLES):
                    dot += shuffle(FULL_MASK, dot, 1 << k)
                own_dx = own * (own_slope * rest - dot)
                dot += own * own_slope
                if CROSS_ENTROPY:
                    nll_factor = factor[int32(2 * WIDTH) + index]
                    if FOCAL:
                        product = own * nll if own > real(0) else real(0)
                        nll_factor *= (
                            modulation(complement) + modulation_slope(complement) * product
                        )
                    own_dx -= nll_factor * rest
                    dot -= nll_factor
                for c in range(BACKGROUND, PART):
                    s = value[c * V + j] * inverse
                    dx = s * (own_factor[c] * lower_power(s) - dot)
                    dx = own_dx if lane_label == int32(c) else dx
                    value[c * V + j] = dx if valid else real(0)
            elif valid:
                if FOCAL:
                    nll *= modulation(complement)
                for c in range(PART):
                    e = value[c * V + j]
                    if lane_label == int32(c):
                        sums[c] = fma(e, inverse, sums[c])
                        sums[2 * PART + c] += real(1)
                        if CROSS_ENTROPY:
                            sums[3 * PART + c] += nll
                    if LINEAR:
                        sums[PART + c] = fma(e, inverse, sums[PART + c])
                    else:
                        sums[PART + c] += power(e * inverse)
            elif inside and not in_range and label != excused:
                out_of_range = int32(out_of_range + int32(1))
        return out_of_range

    @ops.inlined
    def complete(sums):  # type: ignore[no-untyped-def]
        for c in range(PART):  # where the probabilities are NaN, s [y=c] is so for every class
            sums[c] += sums[PART + c] * real(0)
            if CROSS_ENTROPY:
                sums[3 * PART + c] += sums[PART + c] * real(0)

    return own_factors, voxels, complete
