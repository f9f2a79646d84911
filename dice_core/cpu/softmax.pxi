"""The common case, `Spec.plain`: softmax, class labels, and no sums but I, P, Y and H.

Each function works on whole lines of voxels of a block. The softmax is kept as `e`, (classes, block), the exponentials,
and `scale`, (block,), one over their sum, which is 0 for ignored voxels. `row` and similar arguments are the distances,
in elements, between the channels of an array.
"""


# ---- softmax ---------------------------------------------------------------------------------------------------------

cdef inline vec softmax_shifted(
    const logit *x, Py_ssize_t row, Py_ssize_t channels, vec *e, Py_ssize_t e_row
) noexcept nogil:
    """e = exp(x - max x) for every class of one vector of voxels; returns their sum. x may be e.

    If the maximum is infinite, inf - inf makes the sum NaN. A single channel is the logit of the second of two classes,
    with logit 0 for the first; an infinite logit then gives the limit, 0 and 1.
    """
    cdef vec top, total, v, zero, lowest, largest
    cdef Py_ssize_t c
    set_zero(&zero)
    set_lowest_exp(&lowest)
    load(&top, x)
    if channels == 1:
        set_largest(&largest)
        v = top
        top = minimum(largest, maximum(zero, top))
        e[0] = exp(maximum(lowest, zero - top))
        e[e_row] = exp(minimum(zero, maximum(lowest, v - top)))
        return e[0] + e[e_row]
    for c in range(1, channels):
        load(&v, x + c * row)
        top = maximum(v, top)
    total = zero
    for _ in range(channels):
        load(&v, x)
        v = exp(maximum(lowest, v - top))
        e[0] = v
        total = total + v
        x += row
        e += e_row
    return total


cdef vec softmax_rare(
    const logit *x, Py_ssize_t row, Py_ssize_t channels, vec *e, Py_ssize_t e_row
) noexcept nogil:
    """`softmax_shifted`, out of line: for the few voxels whose sum of exponentials is above LARGEST_SUM."""
    return softmax_shifted(x, row, channels, e, e_row)


cdef inline vec exp_within(vec v) noexcept nogil:
    """exp(v) for any v: 0 if that is below the smallest normal number; exp(80), more than LARGEST_SUM, if v > 80."""
    cdef vec lowest
    set_lowest_exp(&lowest)
    return exp(minimum(constant(&lowest, 80), maximum(lowest, v)))


cdef inline void invert_sum(
    const Problem *q, const logit *x, Py_ssize_t row, vec label, vec *e, vec *scale
) noexcept nogil:
    """Replaces scale, the sum of e, by one over it, 0 for ignored voxels. Recomputes e if it is inexact."""
    cdef vec zero, total = scale[0]
    set_zero(&zero)
    if q.classes > 1 and any_greater(total, LARGEST_SUM):
        total = softmax_rare(x, row, q.channels, e, q.block // lanes(scale))
    scale[0] = andnot(less(label, zero), (zero + 1) / total)


cdef inline void softmax_few(
    const Problem *q, const logit *x, Py_ssize_t row, Py_ssize_t lines, const vec *label, vec *e, vec *scale,
    int classes,
) noexcept nogil:
    """The softmax for a constant number of classes, with the first logit in place of the maximum.

    That saves one exponential, and the exponentials need not wait for the maximum. The division is a loop of its own, so
    that the exponentials of the next voxels need not wait for it either.
    """
    cdef vec first, total, v, zero
    cdef Py_ssize_t e_row = q.block // lanes(scale)
    cdef Py_ssize_t i
    cdef const logit *at
    cdef int c
    set_zero(&zero)
    for i in range(lines * VECTORS):
        at = x + i * lanes(scale)
        first = zero
        if q.channels == classes:
            load(&first, at)
            at += row
        total = first * 0 + 1  # NaN if it is infinite
        e[i] = total
        for c in range(1, classes):
            load(&v, at)
            at += row
            v = exp_within(v - first)
            e[c * e_row + i] = v
            total = total + v
        scale[i] = total
    for i in range(lines * VECTORS):
        invert_sum(q, x + i * lanes(scale), row, label[i], e + i, scale + i)


cdef void softmax_many(
    const Problem *q, const logit *x, Py_ssize_t row, Py_ssize_t lines, const vec *label, vec *e, vec *scale
) noexcept nogil:
    """`softmax_few` for any number of classes, class by class.

    The hardware prefetcher does not follow the jump from one class to the next, so the same voxels of the next class
    are prefetched meanwhile; after the last class, the first one's of the next block.
    """
    cdef vec first, v, zero
    cdef Py_ssize_t e_row = q.block // lanes(scale)
    cdef Py_ssize_t i, j, c
    cdef const logit *at = x
    cdef const logit *following
    cdef vec *to = e
    cdef int k
    set_zero(&zero)
    for i in range(lines * VECTORS):
        scale[i] = zero
    for c in range(q.classes):
        following = at + row if c + 1 < q.classes else x + lines * VECTORS * lanes(scale)
        for i in range(lines):
            PREFETCH(following + i * VECTORS * lanes(scale))
            for k in range(VECTORS):
                j = i * VECTORS + k
                load(&first, x + j * lanes(scale))
                load(&v, at + j * lanes(scale))
                to[j] = exp_within(v - first)
                scale[j] = scale[j] + to[j]
        at += row
        to += e_row
    for i in range(lines * VECTORS):
        invert_sum(q, x + i * lanes(scale), row, label[i], e + i, scale + i)


# ---- negative log-likelihood -----------------------------------------------------------------------------------------

cdef vec nll_from_logits(const logit *x, Py_ssize_t row, Py_ssize_t channels, vec label) noexcept nogil:
    """-log of the probability of the voxels' own classes as log sum exp(x - max x) - (x_y - max x)."""
    cdef vec top, zero, lowest, which, own, total, v
    cdef Py_ssize_t c
    set_zero(&zero)
    set_lowest_exp(&lowest)
    load(&top, x)
    if channels == 1:  # log(1 + exp(v)) with v the logit of the other class; its limit, if that is infinite
        total = exp(maximum(lowest, zero - abs(top))) + 1
        v = select(less(zero, label), zero - top, top)
        return log(total, zero + 1 - total) + maximum(zero, v)
    for c in range(1, channels):
        load(&v, x + c * row)
        top = maximum(v, top)
    own = total = which = zero
    for c in range(channels):
        load(&v, x + c * row)
        own = own + and_mask(equal(label, which), v)
        total = total + exp(maximum(lowest, v - top))
        which = which + 1
    return log(total, zero + 1 - total) + total * 0 - (own - top)  # total * 0: the log of NaN is not NaN


cdef inline vec nll_of(
    vec own, vec rest, vec label, const logit *x, Py_ssize_t row, Py_ssize_t channels
) noexcept nogil:
    """-log(own): `own` are the probabilities of the voxels' own classes, `rest` those of all others together, x the
    logits. Arbitrary for ignored voxels.
    """
    cdef vec zero
    set_zero(&zero)
    own = own + and_mask(less(label, zero), zero + 1)
    if any_greater(zero - own, -SMALLEST_EXACT):
        return nll_from_logits(x, row, channels, label)
    return zero - log(own, rest)


cdef inline vec modulation(vec rest, double gamma, Py_ssize_t integer_gamma) noexcept nogil:
    """The focal modulation rest^gamma for 0 <= rest <= 1; `integer_gamma` is gamma if it is a small integer, else 0."""
    cdef vec zero, lowest
    if integer_gamma == 2:
        return rest * rest
    if integer_gamma:
        return power(rest, integer_gamma)
    set_zero(&zero)
    if gamma == 0:
        return zero + 1
    set_lowest_exp(&lowest)
    return exp(minimum(zero, maximum(lowest, constant(&lowest, gamma) * log(rest, zero + 1 - rest))))


cdef inline vec modulated_slope(
    vec nll, vec probability, vec rest, double gamma, Py_ssize_t integer_gamma
) noexcept nogil:
    """The derivative of rest^gamma nll for nll: rest^gamma (1 + gamma probability nll / rest)."""
    cdef vec largest
    if gamma == 0:
        return modulation(rest, gamma, integer_gamma)
    set_largest(&largest)
    nll = minimum(largest, nll) * probability / maximum(constant(&rest, SMALLEST_EXACT), rest)
    return (constant(&rest, gamma) * nll + 1) * modulation(rest, gamma, integer_gamma)


cdef void nll_lines(
    const Problem *q, const logit *x, Py_ssize_t row, Py_ssize_t lines, const vec *label, const vec *e,
    const vec *scale, vec *nll,
) noexcept nogil:
    """Each voxel's part of H, (1 - s)^gamma (-log s) of its own class; for the gradient its derivative for -log s."""
    cdef vec own, rest, which, mask, zero, h
    cdef Py_ssize_t c, i, e_row = q.block // lanes(scale)
    set_zero(&zero)
    for i in range(lines * VECTORS):
        own = rest = which = zero
        for c in range(q.classes):
            mask = equal(label[i], which)
            own = own + and_mask(mask, e[c * e_row + i])
            rest = rest + andnot(mask, e[c * e_row + i])
            which = which + 1
        own = own * scale[i]
        rest = rest * scale[i]
        h = nll_of(own, rest, label[i], x + i * lanes(scale), row, q.channels)
        if q.focal:
            if q.grad == NULL:
                h = h * modulation(rest, q.gamma, q.integer_gamma)
            else:
                h = modulated_slope(h, own, rest, q.gamma, q.integer_gamma)
        nll[i] = h


# ---- sums and gradient -----------------------------------------------------------------------------------------------

cdef inline void sum_lines(
    const Problem *q, Py_ssize_t lines, const vec *label, const vec *e, const vec *scale, const vec *nll, vec *sums,
    Py_ssize_t p, bint cross_entropy,
) noexcept nogil:
    """Adds I, P, Y and H to sums, (3 or 4, classes). Compile-time constants: p, if it is 1 or 2; whether there is an H."""
    cdef vec intersection[VECTORS]
    cdef vec pred_sum[VECTORS]
    cdef vec of_nll[VECTORS]
    cdef vec target_sum, which, mask, s
    cdef Py_ssize_t c, i, at
    cdef int k
    set_zero(&which)
    for c in range(q.classes):
        for k in range(VECTORS):
            set_zero(&intersection[k])
            set_zero(&pred_sum[k])
            set_zero(&of_nll[k])
        target_sum = sums[TARGET_SUM * q.classes + c]
        for i in range(lines):
            for k in range(VECTORS):
                at = i * VECTORS + k
                mask = equal(label[at], which)
                s = e[at] * scale[at]
                target_sum = count_mask(target_sum, mask)
                intersection[k] = intersection[k] + and_mask(mask, s)
                pred_sum[k] = pred_sum[k] + power(s, p)
                if cross_entropy:
                    of_nll[k] = of_nll[k] + and_mask(mask, nll[at])
        for k in range(VECTORS):
            sums[c] = sums[c] + intersection[k]
            sums[PRED_SUM * q.classes + c] = sums[PRED_SUM * q.classes + c] + pred_sum[k]
            if cross_entropy:
                sums[CROSS_ENTROPY * q.classes + c] = sums[CROSS_ENTROPY * q.classes + c] + of_nll[k]
        sums[TARGET_SUM * q.classes + c] = target_sum
        which = which + 1
        e += q.block // lanes(&s)


cdef inline vec complement_of_power(vec s, vec rest, Py_ssize_t p) noexcept nogil:
    """1 - s^p for p >= 1, given rest = 1 - s, without cancellation."""
    return rest if p == 1 else complement_by_squaring(s, rest, p)


cdef vec complement_by_squaring(vec s, vec rest, Py_ssize_t p) noexcept nogil:
    """1 - s^(2n) is (1 - s^n) (1 + s^n), and 1 - s^(n+1) is 1 - s + s (1 - s^n)."""
    cdef vec c = rest
    cdef Py_ssize_t bit = 1
    while bit <= p >> 1:
        bit <<= 1
    while bit > 1:
        bit >>= 1
        c = c * (2 - c)
        if p & bit:
            c = c * s + rest
    return c


cdef inline void grad_lines(
    const Problem *q, Py_ssize_t lines, const vec *label, const vec *e, const vec *scale, const vec *nll,
    const char *cotangent, logit *grad, Py_ssize_t row, Py_ssize_t p, bint cross_entropy, bint non_temporal,
) noexcept nogil:
    """Writes the gradient, which may overwrite e. Compile-time constants: p, if it is 1 or 2; whether there is an H; how
    to store.

    With d_c the derivative with respect to s_c, the gradient is s_c (d_c - sum s d) + h_o (s_c - [c=o]), o the voxel's own
    class. For near-perfect predictions nothing must cancel: 1 - s_o is the sum r of the others, the gradient of o is s_o
    (d_o r - dot) - h_o r with dot = sum s d over the others, and where s_o is near 1, d_o is not a_o + b_o s_o^(p-1) but
    (a + b)_o - b_o (1 - s_o^(p-1)).
    """
    cdef vec dot[VECTORS]
    cdef vec rest[VECTORS]  # the sum of the other classes' exponentials
    cdef vec own[VECTORS]  # the derivative with respect to the probability of the own class
    cdef vec own_a[VECTORS]
    cdef vec own_b[VECTORS]
    cdef vec own_e[VECTORS]
    cdef vec own_h[VECTORS]
    cdef vec s, slope, mask, a, b, h, which, zero, near_1
    cdef Py_ssize_t c, e_row = q.block // lanes(&s)
    cdef const vec *at
    cdef logit *to
    cdef int k
    set_zero(&zero)
    if p > 1:
        near_1 = constant(&zero, 0.5 / (p - 1))  # where the power is at least about 1/2
    for _ in range(lines):
        for k in range(VECTORS):
            dot[k] = rest[k] = own[k] = own_a[k] = own_b[k] = own_e[k] = own_h[k] = zero
        which = zero
        at = e
        for c in range(q.classes):
            broadcast(&a, cotangent, TARGET_SUM * q.classes + c)
            broadcast(&b, cotangent, PRED_SUM * q.classes + c)
            if p > 1:
                broadcast(&slope, cotangent, INTERSECTION * q.classes + c)
            if cross_entropy:
                broadcast(&h, cotangent, CROSS_ENTROPY * q.classes + c)
            for k in range(VECTORS):
                mask = equal(label[k], which)
                s = andnot(mask, at[k])
                rest[k] = rest[k] + s
                dot[k] = dot[k] + s * (b if p == 1 else b * power(at[k] * scale[k], p - 1))
                own[k] = own[k] + and_mask(mask, a)
                own_e[k] = own_e[k] + and_mask(mask, at[k])
                if p > 1:
                    own_a[k] = own_a[k] + and_mask(mask, slope)
                    own_b[k] = own_b[k] + and_mask(mask, b)
                if cross_entropy:
                    own_h[k] = own_h[k] + and_mask(mask, h)
            which = which + 1
            at += e_row
        for k in range(VECTORS):
            rest[k] = rest[k] * scale[k]
            s = own_e[k] * scale[k]
            if p > 1:
                own[k] = select(
                    less(rest[k], near_1), own[k] - own_b[k] * complement_of_power(s, rest[k], p - 1),
                    own_a[k] + own_b[k] * power(s, p - 1),
                )
            slope = dot[k] * scale[k]
            dot[k] = own[k] * rest[k] - slope  # of the own class,
            own[k] = own[k] * s + slope  # and of the others: sum s d
            if cross_entropy:
                if q.focal:
                    own_h[k] = own_h[k] * nll[k]
                own[k] = own[k] - own_h[k]
                rest[k] = own_h[k] * rest[k]
        which = zero
        at = e
        to = grad
        for c in range(q.classes):
            if c >= q.classes - q.channels:
                broadcast(&b, cotangent, PRED_SUM * q.classes + c)
                for k in range(VECTORS):
                    s = at[k] * scale[k]
                    mask = equal(label[k], which)
                    slope = b if p == 1 else b * power(s, p - 1)
                    s = s * select(mask, dot[k], slope - own[k])
                    if cross_entropy:
                        s = s - and_mask(mask, rest[k])
                    if non_temporal:
                        store_non_temporal(to + k * lanes(&s), s)
                    else:
                        store(to + k * lanes(&s), s)
                to += row
            which = which + 1
            at += e_row
        e += VECTORS
        label += VECTORS
        scale += VECTORS
        nll += VECTORS
        grad += VECTORS * lanes(&s)


# ---- two classes -----------------------------------------------------------------------------------------------------

cdef inline void two_classes(
    const Problem *q, const Scratch *t, const logit *x, Py_ssize_t x_row, Py_ssize_t lines, const vec *label,
    logit *grad, Py_ssize_t row, int channels, bint sums, bint cross_entropy, bint non_temporal,
) noexcept nogil:
    """Sums or gradient of two classes, p = 1 and gamma = 0, without a detour through scratch. The last four arguments
    are compile-time constants.

    The gradient of class 1 is s_0 s_1 (d_1 - d_0) + h_0 [y=0] s_1 - h_1 [y=1] s_0, that of class 0 its negative; d_c is
    the derivative with respect to s_c.
    """
    cdef vec s[2]
    cdef vec a[2]
    cdef vec b[2]
    cdef vec h[2]
    cdef vec difference[2]  # d_1 - d_0 of the voxels of each class
    cdef vec mask[2]
    cdef vec intersection[2]
    cdef vec pred_sum[2]
    cdef vec target_sum[2]
    cdef vec of_nll[2]
    cdef vec zero, first, v, total, scale
    cdef vec *out = <vec *>t.sums
    cdef Py_ssize_t i
    cdef int c
    set_zero(&zero)
    for c in range(2):
        intersection[c] = pred_sum[c] = of_nll[c] = zero
        target_sum[c] = out[2 * TARGET_SUM + c]
        broadcast(&a[c], t.cotangent, 2 * TARGET_SUM + c)
        broadcast(&b[c], t.cotangent, 2 * PRED_SUM + c)
        if cross_entropy:
            broadcast(&h[c], t.cotangent, 2 * CROSS_ENTROPY + c)
    difference[0] = b[1] - a[0]
    difference[1] = a[1] - b[0]
    for i in range(lines * VECTORS):
        first = zero
        if channels == 2:
            load(&first, x)
        load(&v, x + (channels - 1) * x_row)
        v = v - first
        s[0] = first * 0 + 1  # NaN if it is infinite
        s[1] = exp_within(v)
        total = s[0] + s[1]
        if any_greater(total, LARGEST_SUM):
            total = softmax_rare(x, x_row, channels, s, 1)
        scale = andnot(less(label[i], zero), (zero + 1) / total)
        for c in range(2):
            s[c] = s[c] * scale
            mask[c] = equal(label[i], zero + 1 if c else zero)
            if sums:
                intersection[c] = intersection[c] + and_mask(mask[c], s[c])
                pred_sum[c] = pred_sum[c] + s[c]
                target_sum[c] = count_mask(target_sum[c], mask[c])
        if sums and cross_entropy:
            v = nll_of(
                and_mask(mask[0], s[0]) + and_mask(mask[1], s[1]), andnot(mask[0], s[0]) + andnot(mask[1], s[1]),
                label[i], x, x_row, channels,
            )
            for c in range(2):
                of_nll[c] = of_nll[c] + and_mask(mask[c], v)
        if not sums:
            v = select(mask[0], difference[0], difference[1]) * (s[0] * s[1])
            if cross_entropy:
                v = v + (and_mask(mask[0], h[0] * s[1]) - and_mask(mask[1], h[1] * s[0]))
            if channels == 2:
                if non_temporal:
                    store_non_temporal(grad, zero - v)
                else:
                    store(grad, zero - v)
            if non_temporal:
                store_non_temporal(grad + (channels - 1) * row, v)
            else:
                store(grad + (channels - 1) * row, v)
            grad += lanes(&v)
        x += lanes(&v)
    if sums:
        for c in range(2):
            out[c] = out[c] + intersection[c]
            out[2 * PRED_SUM + c] = out[2 * PRED_SUM + c] + pred_sum[c]
            out[2 * TARGET_SUM + c] = target_sum[c]
            if cross_entropy:
                out[2 * CROSS_ENTROPY + c] = out[2 * CROSS_ENTROPY + c] + of_nll[c]


cdef inline void run_two_classes(
    const Problem *q, const Scratch *t, const logit *x, Py_ssize_t x_row, Py_ssize_t lines, const vec *label,
    logit *grad, Py_ssize_t grad_row, int channels, bint non_temporal,
) noexcept nogil:
    if q.grad == NULL:
        if q.cross_entropy:
            two_classes(q, t, x, x_row, lines, label, grad, grad_row, channels, True, True, False)
        else:
            two_classes(q, t, x, x_row, lines, label, grad, grad_row, channels, True, False, False)
    elif q.cross_entropy:
        if non_temporal:
            two_classes(q, t, x, x_row, lines, label, grad, grad_row, channels, False, True, True)
        else:
            two_classes(q, t, x, x_row, lines, label, grad, grad_row, channels, False, True, False)
    elif non_temporal:
        two_classes(q, t, x, x_row, lines, label, grad, grad_row, channels, False, False, True)
    else:
        two_classes(q, t, x, x_row, lines, label, grad, grad_row, channels, False, False, False)


# ---- any number of classes -------------------------------------------------------------------------------------------

cdef void run_softmax(
    const Problem *q, const logit *x, Py_ssize_t row, Py_ssize_t lines, const vec *label, vec *e, vec *scale
) noexcept nogil:
    if q.classes == 1:
        softmax_few(q, x, row, lines, label, e, scale, 1)
    elif q.classes == 2:
        softmax_few(q, x, row, lines, label, e, scale, 2)
    elif q.classes == 3:
        softmax_few(q, x, row, lines, label, e, scale, 3)
    elif q.classes == 4:
        softmax_few(q, x, row, lines, label, e, scale, 4)
    elif q.classes == 5:
        softmax_few(q, x, row, lines, label, e, scale, 5)
    elif q.classes == 6:
        softmax_few(q, x, row, lines, label, e, scale, 6)
    elif q.classes == 7:
        softmax_few(q, x, row, lines, label, e, scale, 7)
    elif q.classes == 8:
        softmax_few(q, x, row, lines, label, e, scale, 8)
    else:
        softmax_many(q, x, row, lines, label, e, scale)


cdef inline void run_lines_of_power(
    const Problem *q, const Scratch *t, Py_ssize_t lines, const vec *label, vec *e, logit *grad, Py_ssize_t row,
    Py_ssize_t p, bint non_temporal,
) noexcept nogil:
    cdef vec *scale = <vec *>t.scale
    cdef vec *nll = <vec *>t.nll
    if q.grad == NULL:
        if q.cross_entropy:
            sum_lines(q, lines, label, e, scale, nll, <vec *>t.sums, p, True)
        else:
            sum_lines(q, lines, label, e, scale, nll, <vec *>t.sums, p, False)
    elif q.cross_entropy:
        if non_temporal:
            grad_lines(q, lines, label, e, scale, nll, t.cotangent, grad, row, p, True, True)
        else:
            grad_lines(q, lines, label, e, scale, nll, t.cotangent, grad, row, p, True, False)
    elif non_temporal:
        grad_lines(q, lines, label, e, scale, nll, t.cotangent, grad, row, p, False, True)
    else:
        grad_lines(q, lines, label, e, scale, nll, t.cotangent, grad, row, p, False, False)


cdef void run_plain(
    const Problem *q, const Scratch *t, const logit *x, Py_ssize_t x_row, Py_ssize_t lines, const vec *label,
    vec *e, logit *grad, Py_ssize_t grad_row, bint non_temporal,
) noexcept nogil:
    """Adds the sums of whole lines of voxels to t.sums, or writes their gradient."""
    cdef vec *scale = <vec *>t.scale
    if q.classes == 2 and q.p == 1 and not q.focal:
        if q.channels == 1:
            run_two_classes(q, t, x, x_row, lines, label, grad, grad_row, 1, non_temporal)
        else:
            run_two_classes(q, t, x, x_row, lines, label, grad, grad_row, 2, non_temporal)
        return
    run_softmax(q, x, x_row, lines, label, e, scale)
    if q.cross_entropy and (q.grad == NULL or q.focal):
        nll_lines(q, x, x_row, lines, label, e, scale, <vec *>t.nll)
    if q.p == 1:
        run_lines_of_power(q, t, lines, label, e, grad, grad_row, 1, non_temporal)
    elif q.p == 2:
        run_lines_of_power(q, t, lines, label, e, grad, grad_row, 2, non_temporal)
    else:
        run_lines_of_power(q, t, lines, label, e, grad, grad_row, q.p, non_temporal)
