"""All other activations, targets and sums, in one loop over the classes. Slower, but supports any combination."""


cdef inline vec logit_of(const Problem *q, const logit *x, Py_ssize_t row, Py_ssize_t c, vec like) noexcept nogil:
    """The logit of class c. Of the two classes of a single channel, the first has logit 0."""
    cdef vec v
    if q.classes != q.channels:
        set_zero(&v)
        if c == 0:
            return v
        c = 0
    load(&v, x + c * row)
    return v


cdef inline vec target_of(
    const Problem *q, const vec *target, vec label, vec which, mask_t *ignored
) noexcept nogil:
    """The targets of class `which`, 0 where ignored; sets `ignored` to the mask of ignored targets."""
    cdef vec zero
    set_zero(&zero)
    if q.soft_targets:
        ignored[0] = less(target[0], zero)
        return maximum(zero, target[0])
    ignored[0] = less(label, zero)
    return and_mask(equal(label, which), zero + 1)


cdef inline vec probability_of(const Problem *q, vec v, vec softmax, vec *slope, vec *rest) noexcept nogil:
    """The activation s of a logit v and, unless that is a softmax, its derivative with respect to v, and, for p > 1,
    1 - s.
    """
    cdef vec zero, e
    set_zero(&zero)
    if q.activation == SOFTMAX or q.activation == ARGMAX:
        return softmax
    slope[0] = zero + 1
    rest[0] = zero + 1 - v
    if q.activation == IDENTITY:
        return v
    if q.activation == THRESHOLD:
        return and_mask(less(zero, v), zero + 1)
    e = exp_minus_abs(v)
    slope[0] = e / ((e + 1) * (e + 1))
    if q.p > 1:
        rest[0] = sigmoid(zero - v, e)
    return sigmoid(v, e)


cdef void find_top(
    const Problem *q, const logit *x, Py_ssize_t row, Py_ssize_t lines, const vec *label, const vec *e,
    const vec *scale, vec *top,
) noexcept nogil:
    """Fills top, (3, block), with -log of the largest probability of each voxel, the logit it belongs to, and the sum
    of all other probabilities.
    """
    cdef vec own, rest, which, found, zero, largest, v
    cdef mask_t mask
    cdef Py_ssize_t c, i, e_row = q.block // lanes(scale)
    set_zero(&zero)
    for i in range(lines * VECTORS):
        largest = logit_of(q, x + i * lanes(scale), row, 0, zero)
        found = which = zero
        for c in range(1, q.classes):
            which = which + 1
            v = logit_of(q, x + i * lanes(scale), row, c, zero)
            mask = less(largest, v)
            largest = select(mask, v, largest)
            found = select(mask, which, found)
        own = rest = which = zero
        for c in range(q.classes):
            mask = equal(found, which)
            v = e[c * e_row + i]
            own = add_where(mask, own, v)
            rest = rest + andnot(mask, v)
            which = which + 1
        own = own * scale[i] + and_mask(less(label[i], zero), zero + 1)  # 1 for ignored voxels
        rest = rest * scale[i]
        top[i] = own * 0 - log(own, rest)  # own * 0: the log of NaN is not NaN
        top[e_row + i] = largest
        top[2 * e_row + i] = rest


cdef inline vec nll_by(const vec *top, Py_ssize_t e_row, vec v) noexcept nogil:
    """-log of the probability of the class with logit v: that of the most probable class plus the difference of the
    logits. Neither is negative, so there is no cancellation.
    """
    return top[0] + andnot(equal(v, top[e_row]), top[e_row] - v)


cdef void sum_general(
    const Problem *q, const logit *x, Py_ssize_t row, Py_ssize_t lines, const vec *label, const vec *e,
    const vec *scale, const vec *target, const vec *top, vec *sums,
) noexcept nogil:
    """Adds the requested sums to sums, (K, classes)."""
    cdef vec total[ROWS]
    cdef vec zero, which, t, s, v, softmax, h, z, u, slope
    cdef mask_t ignored, half
    cdef Py_ssize_t c, i, k, at, e_row = q.block // lanes(scale)
    set_zero(&zero)
    which = zero
    softmax = zero
    for c in range(q.classes):
        for k in range(ROWS):
            total[k] = zero
        for i in range(lines * VECTORS):
            t = target_of(q, target + c * e_row + i, label[i], which, &ignored)
            v = logit_of(q, x + i * lanes(scale), row, c, t)
            if q.activation == SOFTMAX or q.activation == ARGMAX or q.cross_entropy:
                softmax = e[c * e_row + i] * scale[i]
            s = probability_of(q, v, softmax, &slope, &u)
            total[INTERSECTION] = total[INTERSECTION] + andnot(ignored, t * s)
            total[PRED_SUM] = total[PRED_SUM] + andnot(ignored, s if q.p == 1 else power(s, q.p))
            total[TARGET_SUM] = total[TARGET_SUM] + t
            total[VOXELS] = total[VOXELS] + andnot(ignored, zero + 1)
            if q.target_square:
                total[TARGET_SQUARE] = total[TARGET_SQUARE] + t * t
            if q.cross_entropy or q.nll:
                h = nll_by(top + i, e_row, v)
                total[NLL] = total[NLL] + andnot(ignored, h)
                if q.cross_entropy:
                    u = select(less(constant(&zero, 0.5), softmax), top[2 * e_row + i], zero + 1 - softmax)
                    h = t * modulation(u, q.gamma, q.integer_gamma) * h
                    # Masked, since h may be infinite where t is 0; but NaN must propagate to every class.
                    total[CROSS_ENTROPY] = add_where(less(zero, t), total[CROSS_ENTROPY], h)
                    total[CROSS_ENTROPY] = total[CROSS_ENTROPY] + andnot(ignored, softmax * 0)
            if q.binary_cross_entropy:
                z = zero - logit_of(q, x + i * lanes(scale), row, 1, t) if c < q.classes - q.channels else v
                u = exp_minus_abs(z)
                if not q.soft_targets:  # t is 0 or 1, and one of the halves is 0
                    half = less(zero, t)
                    z = select(half, zero - z, z)
                    h = negative_part(z, u, q.binary_gamma, q.integer_binary_gamma) + zero_or_nan(z, half)
                    total[POSITIVE] = add_where(half, total[POSITIVE], h)
                    total[NEGATIVE] = total[NEGATIVE] + andnot(ignored, andnot(half, h))
                    continue
                h = negative_part(zero - z, u, q.binary_gamma, q.integer_binary_gamma)
                h = t * h + and_mask(equal(t, zero + 1), z * 0)
                total[POSITIVE] = total[POSITIVE] + andnot(ignored, and_mask(less(zero, t), h))
                h = negative_part(z, u, q.binary_gamma, q.integer_binary_gamma)
                h = (zero + 1 - t) * h + minimum(zero, z) * 0
                total[NEGATIVE] = total[NEGATIVE] + andnot(ignored, and_mask(less(t, zero + 1), h))
        for k in range(ROWS):
            if q.row[k] >= 0:
                at = q.row[k] * q.classes + c
                sums[at] = sums[at] + total[k]
        which = which + 1


cdef inline vec binary_slope(const Problem *q, vec z, vec target, vec positive, vec negative) noexcept nogil:
    """The derivative for the logit z of its parts in B+ and B-, whose cotangents are `positive` and `negative`."""
    cdef vec zero, e
    cdef mask_t mask
    set_zero(&zero)
    e = exp_minus_abs(z)
    if not q.soft_targets:  # the target is 0 or 1, and one of the halves is 0
        mask = less(zero, target)
        z = select(mask, zero - z, z)
        z = negative_slope(z, e, q.binary_gamma, q.integer_binary_gamma)
        return andnot(mask, negative * z) - and_mask(mask, positive * z)
    negative = negative * (zero + 1 - target) * negative_slope(z, e, q.binary_gamma, q.integer_binary_gamma)
    return negative - positive * target * negative_slope(zero - z, e, q.binary_gamma, q.integer_binary_gamma)


cdef inline vec overlap_slope(
    const Problem *q, const char *cotangent, Py_ssize_t c, vec t, vec s, vec rest, mask_t ignored
) noexcept nogil:
    """The derivative of the parts in I and P for the probability s, with rest = 1 - s: a t + b s^(p-1). Where s is near
    1 and t above 1/2, these may cancel; there it is (a + b) t + b (1 - t) - b (1 - s^(p-1)).
    """
    cdef vec zero, a, b, both
    cdef mask_t near_1
    set_zero(&zero)
    broadcast(&a, cotangent, INTERSECTION * q.classes + c)
    broadcast(&b, cotangent, PRED_SUM * q.classes + c)
    a = and_mask(less(zero, t), a * t)  # the factor may be infinite, such as 2 / den of a class without targets
    if q.p == 1:
        return andnot(ignored, a + b)
    broadcast(&both, cotangent, TARGET_SUM * q.classes + c)
    both = both * t + b * ((zero + 1 - t) - complement_of_power(s, rest, q.p - 1))
    near_1 = less(constant(&zero, 0.5), t) & less(rest, constant(&zero, 0.5 / (q.p - 1)))
    return andnot(ignored, select(near_1, both, a + b * power(s, q.p - 1)))


cdef void grad_general(
    const Problem *q, const logit *x, Py_ssize_t x_row, Py_ssize_t lines, const vec *label, const vec *e,
    const vec *scale, const vec *target, const vec *top, const char *cotangent, logit *grad, Py_ssize_t row,
) noexcept nogil:
    """Writes the gradient of all sums of `sum_general`; it may overwrite x.

    For a softmax, a first pass over the classes computes the sums that every class's gradient depends on: with d the
    derivatives with respect to the probabilities s and u those with respect to the nll, the gradient is s (d - sum s d)
    + softmax sum u - u. If a probability is above 1/2, its class o is treated separately, so that nothing cancels: with
    D = sum s_c (d_c - d_o), the gradient of the others is s (d - d_o - D) + softmax sum u - u, and that of o is -s D +
    softmax (the others' sum u) - u (1 - softmax).
    """
    cdef vec zero, which, t, s, v, softmax, h, z, slope, factor, d, u, dot, before, valid
    cdef mask_t ignored, likely
    cdef vec others, rest, likely_d, likely_u, others_u
    cdef Py_ssize_t c, i, e_row = q.block // lanes(scale)
    cdef int turn, first = 0 if q.needs_softmax else 1
    cdef bint complements = q.p > 1 or q.focal  # whether 1 - s is needed
    cdef const logit *at
    cdef logit *to
    set_zero(&zero)
    softmax = slope = h = rest = zero
    likely = less(zero, zero)
    for i in range(lines * VECTORS):
        at = x + i * lanes(scale)
        dot = before = valid = likely_d = likely_u = others_u = zero
        others = zero  # the sum of the probabilities up to 1/2: those of all classes but o
        if q.needs_softmax and complements:
            for c in range(q.classes):
                softmax = e[c * e_row + i] * scale[i]
                others = others + andnot(less(constant(&zero, 0.5), softmax), softmax)
        for turn in range(first, 2):
            to = grad + i * lanes(scale)
            which = zero
            for c in range(q.classes):
                t = target_of(q, target + c * e_row + i, label[i], which, &ignored)
                v = logit_of(q, at, x_row, c, t)
                if q.needs_softmax:
                    softmax = e[c * e_row + i] * scale[i]
                    likely = less(constant(&zero, 0.5), softmax)
                if complements:
                    h = rest = select(likely, others, zero + 1 - softmax)
                s = probability_of(q, v, softmax, &slope, &rest)
                d = overlap_slope(q, cotangent, c, t, s, rest, ignored)
                u = zero
                if q.cross_entropy:
                    h = modulated_slope(nll_by(top + i, e_row, v), softmax, h, q.gamma, q.integer_gamma)
                    broadcast(&factor, cotangent, CROSS_ENTROPY * q.classes + c)
                    u = and_mask(less(zero, t), factor * t * h)
                if q.nll:
                    broadcast(&factor, cotangent, NLL * q.classes + c)
                    u = u + andnot(ignored, factor)
                if turn == 0:
                    dot = dot + andnot(likely, s * d)
                    likely_d = add_where(likely, likely_d, d)
                    likely_u = add_where(likely, likely_u, u)
                    others_u = others_u + andnot(likely, u)
                    if not complements:
                        others = others + andnot(likely, softmax)
                    valid = valid + andnot(ignored, zero + 1)
                else:
                    if q.activation == SOFTMAX:
                        s = s * select(likely, zero - dot, d - likely_d - dot)
                    else:
                        s = andnot(ignored, d * slope)
                    if q.cross_entropy or q.nll:
                        s = s + softmax * others_u
                        s = s + select(likely, zero - likely_u * others, softmax * likely_u - u)
                    if q.needs_softmax:
                        s = and_mask(less(zero, valid), s)  # all channels ignored: 0, whatever the logits
                    if q.binary_cross_entropy:
                        z = zero - logit_of(q, at, x_row, 1, t) if c < q.classes - q.channels else v
                        broadcast(&factor, cotangent, POSITIVE * q.classes + c)
                        broadcast(&d, cotangent, NEGATIVE * q.classes + c)
                        z = andnot(ignored, binary_slope(q, z, t, factor, d))
                        s = s + (z - before)
                        before = z  # of two classes of one channel, the first's logit is minus the second's
                    if c >= q.classes - q.channels:
                        store(to, s)
                        to += row
                        before = zero
                which = which + 1
            dot = dot - likely_d * others


cdef void decide(
    const Problem *q, const logit *x, Py_ssize_t row, Py_ssize_t lines, const vec *label, vec *e, vec *scale
) noexcept nogil:
    """The argmax in place of the softmax: 1 for the largest logit (the first of several), else 0. NaN ranks as +inf."""
    cdef vec zero, infinity, top, found, which, v
    cdef mask_t larger
    cdef Py_ssize_t c, i, e_row = q.block // lanes(scale)
    set_zero(&zero)
    set_largest(&infinity)
    infinity = infinity + infinity
    for i in range(lines * VECTORS):
        top = zero - infinity
        found = zero
        which = zero - 1
        for c in range(q.classes):
            which = which + 1
            v = logit_of(q, x + i * lanes(scale), row, c, zero)
            v = select(equal(v, v), v, infinity)
            larger = less(top, v)
            top = select(larger, v, top)
            found = select(larger, which, found)
        which = zero
        for c in range(q.classes):
            e[c * e_row + i] = and_mask(equal(found, which), zero + 1)
            which = which + 1
        scale[i] = andnot(less(label[i], zero), zero + 1)


cdef void run_general(
    const Problem *q, const Scratch *t, const logit *x, Py_ssize_t x_row, Py_ssize_t lines, const vec *label,
    vec *e, logit *grad, Py_ssize_t grad_row,
) noexcept nogil:
    """`run_plain` for all other cases."""
    cdef vec *scale = <vec *>t.scale
    cdef vec *target = <vec *>t.targets
    cdef vec *top = <vec *>t.top
    if q.activation == ARGMAX:
        decide(q, x, x_row, lines, label, e, scale)
    elif q.needs_softmax:
        run_softmax(q, x, x_row, lines, label, e, scale)
    if q.cross_entropy or q.nll:
        find_top(q, x, x_row, lines, label, e, scale, top)
    if q.grad == NULL:
        sum_general(q, x, x_row, lines, label, e, scale, target, top, <vec *>t.sums)
    else:
        grad_general(q, x, x_row, lines, label, e, scale, target, top, t.cotangent, grad, grad_row)
