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
    """`softmax_shifted`, out of line: for the few voxels whose logits differ by more than MAX_SHIFT."""
    return softmax_shifted(x, row, channels, e, e_row)


cdef inline void softmax_few(
    const Problem *q, const logit *x, Py_ssize_t row, Py_ssize_t lines, const vec *label, vec *e, vec *scale,
    int classes,
) noexcept nogil:
    """The softmax for a constant number of classes, with the first logit in place of the maximum.

    That saves one exponential, and the exponentials need not wait for the maximum.
    """
    cdef vec first, total, v, shift, zero
    cdef Py_ssize_t e_row = q.block // lanes(scale)
    cdef Py_ssize_t i
    cdef const logit *at
    cdef int c
    set_zero(&zero)
    for i in range(lines * VECTORS):
        at = x
        first = zero
        if q.channels == classes:
            load(&first, at)
            at += row
        shift = zero
        total = zero + 1
        if classes == 1:
            total = total + first * 0  # the softmax of one infinite logit is NaN, as of several
        e[i] = total
        for c in range(1, classes):
            load(&v, at)
            at += row
            v = v - first
            shift = maximum(shift, abs(v))
            v = exp(v)
            e[c * e_row + i] = v
            total = total + v
        if any_greater(shift, MAX_SHIFT):
            total = softmax_rare(x, row, q.channels, e + i, e_row)
        scale[i] = andnot(less(label[i], zero), (zero + 1) / total)
        x += lanes(scale)


cdef void softmax_many(
    const Problem *q, const logit *x, Py_ssize_t row, Py_ssize_t lines, const vec *label, vec *e, vec *scale
) noexcept nogil:
    """`softmax_few` for any number of classes, a line at a time to read whole cache lines."""
    cdef vec first[VECTORS]
    cdef vec total[VECTORS]
    cdef vec shift[VECTORS]
    cdef vec v, zero
    cdef Py_ssize_t e_row = q.block // lanes(scale)
    cdef const logit *at
    cdef vec *to
    cdef int k
    set_zero(&zero)
    for _ in range(lines):
        at = x
        to = e
        for k in range(VECTORS):
            load(&first[k], at + k * lanes(scale))
            shift[k] = total[k] = zero
        for _ in range(q.classes):
            PREFETCH(<const char *>at + PREFETCH_BYTES)
            for k in range(VECTORS):
                load(&v, at + k * lanes(scale))
                v = v - first[k]
                shift[k] = maximum(shift[k], abs(v))
                v = exp(v)
                to[k] = v
                total[k] = total[k] + v
            at += row
            to += e_row
        for k in range(VECTORS):
            if any_greater(shift[k], MAX_SHIFT):
                total[k] = softmax_rare(x + k * lanes(scale), row, q.channels, e + k, e_row)
            scale[k] = andnot(less(label[k], zero), (zero + 1) / total[k])
        x += VECTORS * lanes(scale)
        e += VECTORS
        label += VECTORS
        scale += VECTORS


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
    bint linear, bint cross_entropy,
) noexcept nogil:
    """Adds I, P, Y and H to sums, (3 or 4, classes). Compile-time constants: whether p is 1, whether there is an H."""
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
                pred_sum[k] = pred_sum[k] + (s if linear else power(s, q.p))
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


cdef inline void grad_lines(
    const Problem *q, Py_ssize_t lines, const vec *label, const vec *e, const vec *scale, const vec *nll,
    const char *cotangent, logit *grad, Py_ssize_t row, bint linear, bint cross_entropy, bint non_temporal,
) noexcept nogil:
    """Writes the gradient, which may overwrite e. Compile-time constants: whether p is 1, whether there is an H, how to
    store.
    """
    cdef vec dot[VECTORS]
    cdef vec of_own[VECTORS]  # the factor of s - [y=c]
    cdef vec s, slope, mask, a, b, h, which
    cdef Py_ssize_t c, e_row = q.block // lanes(&s)
    cdef const vec *at
    cdef logit *to
    cdef int k
    for _ in range(lines):
        for k in range(VECTORS):
            set_zero(&dot[k])
            set_zero(&of_own[k])
        set_zero(&which)
        at = e
        for c in range(q.classes):
            broadcast(&a, cotangent, c)
            broadcast(&b, cotangent, PRED_SUM * q.classes + c)
            if cross_entropy:
                broadcast(&h, cotangent, CROSS_ENTROPY * q.classes + c)
            for k in range(VECTORS):
                mask = equal(label[k], which)
                slope = b if linear else b * power(at[k] * scale[k], q.p - 1)
                dot[k] = dot[k] + at[k] * (and_mask(mask, a) + slope)
                if cross_entropy:
                    of_own[k] = of_own[k] + and_mask(mask, h)
            which = which + 1
            at += e_row
        for k in range(VECTORS):
            dot[k] = dot[k] * scale[k]
            if cross_entropy:
                if q.focal:
                    of_own[k] = of_own[k] * nll[k]
                dot[k] = dot[k] - of_own[k]
        set_zero(&which)
        at = e
        to = grad
        for c in range(q.classes):
            if c >= q.classes - q.channels:
                broadcast(&a, cotangent, c)
                broadcast(&b, cotangent, PRED_SUM * q.classes + c)
                for k in range(VECTORS):
                    s = at[k] * scale[k]
                    mask = equal(label[k], which)
                    slope = b if linear else b * power(s, q.p - 1)
                    s = s * (and_mask(mask, a) + (slope - dot[k]))
                    if cross_entropy:
                        s = s - and_mask(mask, of_own[k])
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

    With t_c = a_c [y=c] + b_c the gradient of class 1 is s_0 s_1 (t_1 - t_0) + h_0 [y=0] s_1 - h_1 [y=1] s_0, that of
    class 0 its negative.
    """
    cdef vec s[2]
    cdef vec a[2]
    cdef vec b[2]
    cdef vec h[2]
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
        broadcast(&a[c], t.cotangent, c)
        broadcast(&b[c], t.cotangent, 2 * PRED_SUM + c)
        if cross_entropy:
            broadcast(&h[c], t.cotangent, 2 * CROSS_ENTROPY + c)
    for i in range(lines * VECTORS):
        first = zero
        if channels == 2:
            load(&first, x)
        load(&v, x + (channels - 1) * x_row)
        v = v - first
        s[0] = zero + 1
        s[1] = exp(v)
        total = s[0] + s[1]
        if any_greater(abs(v), MAX_SHIFT):
            total = softmax_rare(x, x_row, channels, s, 1)
        scale = andnot(less(label[i], zero), (zero + 1) / total)
        v = b[1] - b[0]
        for c in range(2):
            s[c] = s[c] * scale
            mask[c] = equal(label[i], zero + 1 if c else zero)
            if sums:
                intersection[c] = intersection[c] + and_mask(mask[c], s[c])
                pred_sum[c] = pred_sum[c] + s[c]
                target_sum[c] = count_mask(target_sum[c], mask[c])
            elif c == 0:
                v = v - and_mask(mask[c], a[c])
            else:
                v = v + and_mask(mask[c], a[c])
        if sums and cross_entropy:
            v = nll_of(
                and_mask(mask[0], s[0]) + and_mask(mask[1], s[1]), andnot(mask[0], s[0]) + andnot(mask[1], s[1]),
                label[i], x, x_row, channels,
            )
            for c in range(2):
                of_nll[c] = of_nll[c] + and_mask(mask[c], v)
        if not sums:
            v = v * (s[0] * s[1])
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


cdef void run_plain(
    const Problem *q, const Scratch *t, const logit *x, Py_ssize_t x_row, Py_ssize_t lines, const vec *label,
    vec *e, logit *grad, Py_ssize_t grad_row, bint non_temporal,
) noexcept nogil:
    """Adds the sums of whole lines of voxels to t.sums, or writes their gradient."""
    cdef vec *scale = <vec *>t.scale
    cdef vec *nll = <vec *>t.nll
    if q.classes == 2 and q.p == 1 and not q.focal:
        if q.channels == 1:
            run_two_classes(q, t, x, x_row, lines, label, grad, grad_row, 1, non_temporal)
        else:
            run_two_classes(q, t, x, x_row, lines, label, grad, grad_row, 2, non_temporal)
        return
    run_softmax(q, x, x_row, lines, label, e, scale)
    if q.cross_entropy and (q.grad == NULL or q.focal):
        nll_lines(q, x, x_row, lines, label, e, scale, nll)
    if q.grad == NULL:
        if q.cross_entropy:
            if q.p == 1:
                sum_lines(q, lines, label, e, scale, nll, <vec *>t.sums, True, True)
            else:
                sum_lines(q, lines, label, e, scale, nll, <vec *>t.sums, False, True)
        elif q.p == 1:
            sum_lines(q, lines, label, e, scale, nll, <vec *>t.sums, True, False)
        else:
            sum_lines(q, lines, label, e, scale, nll, <vec *>t.sums, False, False)
    elif q.cross_entropy:
        if q.p != 1:
            grad_lines(q, lines, label, e, scale, nll, t.cotangent, grad, grad_row, False, True, False)
        elif non_temporal:
            grad_lines(q, lines, label, e, scale, nll, t.cotangent, grad, grad_row, True, True, True)
        else:
            grad_lines(q, lines, label, e, scale, nll, t.cotangent, grad, grad_row, True, True, False)
    elif q.p != 1:
        grad_lines(q, lines, label, e, scale, nll, t.cotangent, grad, grad_row, False, False, False)
    elif non_temporal:
        grad_lines(q, lines, label, e, scale, nll, t.cotangent, grad, grad_row, True, False, True)
    else:
        grad_lines(q, lines, label, e, scale, nll, t.cotangent, grad, grad_row, True, False, False)
