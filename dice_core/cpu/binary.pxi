"""Binary cross-entropy and binary focal terms: the parts of one logit in B+ and B-, and the sums and gradient of class
labels beside a softmax, whose exponentials they share.
"""


# ---- one logit -------------------------------------------------------------------------------------------------------

cdef inline vec exp_minus_abs(vec v) noexcept nogil:
    """exp(-|v|), from which sigmoid and softplus follow without overflow."""
    cdef vec zero, lowest
    set_zero(&zero)
    set_lowest_exp(&lowest)
    return exp(maximum(lowest, zero - abs(v)))


cdef inline vec sigmoid(vec v, vec e) noexcept nogil:
    """1 / (1 + exp(-v)), with e = exp(-|v|)."""
    cdef vec zero
    set_zero(&zero)
    return select(less(v, zero), e, zero + 1) * ((zero + 1) / (e + 1))  # sigmoid(-v) shares the quotient


cdef inline vec softplus(vec v, vec e) noexcept nogil:
    """log(1 + exp(v)), which is -log(sigmoid(-v)), with e = exp(-|v|)."""
    cdef vec zero
    set_zero(&zero)
    return maximum(zero, v) + log_of_sum(e)


cdef inline vec negative_part(vec z, vec e, double gamma, Py_ssize_t integer_gamma) noexcept nogil:
    """sigmoid(z)^gamma softplus(z), with e = exp(-|z|): the part in B- of a logit z with target 0, and in B+ of a logit
    -z with target 1.
    """
    return modulation(sigmoid(z, e), gamma, integer_gamma) * softplus(z, e)


cdef inline vec negative_slope(vec z, vec e, double gamma, Py_ssize_t integer_gamma) noexcept nogil:
    """The derivative of `negative_part` for z: with s = sigmoid(z), s^gamma (s + gamma (1 - s) softplus(z))."""
    cdef vec zero, largest, s = sigmoid(z, e)
    if gamma == 0:
        return s
    set_zero(&zero)
    set_largest(&largest)
    z = constant(&s, gamma) * (sigmoid(zero - z, e) * minimum(largest, softplus(z, e)))
    return modulation(s, gamma, integer_gamma) * (s + z)


cdef inline vec zero_or_nan(vec z, mask_t own) noexcept nogil:
    """Added to `negative_part`: 0, or NaN for those infinite logits for which torch's (1 - t) x + log(1 + exp(-x)) is.
    z is the logit, negated where the mask `own` of targets 1 is set.
    """
    cdef vec zero
    set_zero(&zero)
    return select(own, z, minimum(zero, z)) * 0


# ---- class labels beside a softmax -----------------------------------------------------------------------------------

cdef inline void invert_unshifted(
    const Problem *q, const logit *x, Py_ssize_t row, vec label, vec *e, vec *scale
) noexcept nogil:
    """`invert_sum` of e = exp(x). Small probabilities are 0 unless some logit is large enough."""
    cdef vec zero, total = scale[0]
    set_zero(&zero)
    if any_greater(total, LARGEST_UNSHIFTED_SUM) or any_greater(zero - total, -SMALLEST_UNSHIFTED_SUM):
        total = softmax_rare(x, row, q.channels, e, q.block // lanes(scale))
    scale[0] = andnot(less(label, zero), (zero + 1) / total)


cdef inline void binary_classes(
    const Problem *q, const Scratch *t, const logit *x, Py_ssize_t row, Py_ssize_t lines, const vec *label, vec *e,
    vec *scale, double gamma, Py_ssize_t integer_gamma, bint sums,
) noexcept nogil:
    """`softmax_many` that also adds B+ and B- to t.sums, or writes their gradient to t.binary, (classes, block).

    Both need exp(-|x|): exp(x) is that or one over it. The last three arguments are compile-time constants.
    """
    cdef vec positive[VECTORS]
    cdef vec negative[VECTORS]
    cdef vec zero, which, u, v, z, own_factor, factor
    cdef mask_t own, ignored
    cdef vec *out = <vec *>t.sums
    cdef vec *to = <vec *>t.binary
    cdef Py_ssize_t c, i, j, e_row = q.block // lanes(scale)
    cdef const logit *at = x
    cdef const logit *following
    cdef int k
    set_zero(&zero)
    which = own_factor = factor = zero
    for i in range(lines * VECTORS):
        scale[i] = zero
    for c in range(q.classes):
        following = at + row if c + 1 < q.classes else x + lines * VECTORS * lanes(scale)
        for k in range(VECTORS):
            positive[k] = negative[k] = zero
        if not sums:
            broadcast(&own_factor, t.cotangent, POSITIVE * q.classes + c)
            broadcast(&factor, t.cotangent, NEGATIVE * q.classes + c)
            own_factor = zero - own_factor
        for i in range(lines):
            PREFETCH(following + i * VECTORS * lanes(scale))
            for k in range(VECTORS):
                j = i * VECTORS + k
                load(&v, at + j * lanes(scale))
                u = exp_minus_abs(v)
                to[j] = u
                e[j] = select(less(v, zero), u, (zero + 1) / u)
                scale[j] = scale[j] + e[j]
        for i in range(lines):
            for k in range(VECTORS):
                j = i * VECTORS + k
                load(&v, at + j * lanes(scale))
                u = to[j]
                own = equal(label[j], which)
                ignored = less(label[j], zero)
                z = select(own, zero - v, v)
                if sums:
                    v = negative_part(z, u, gamma, integer_gamma) + zero_or_nan(z, own)
                    positive[k] = add_where(own, positive[k], v)
                    negative[k] = negative[k] + andnot(ignored, andnot(own, v))
                else:
                    v = select(own, own_factor, factor) * negative_slope(z, u, gamma, integer_gamma)
                    to[j] = andnot(ignored, v)
        if sums:
            i = q.row[POSITIVE] * q.classes + c
            j = q.row[NEGATIVE] * q.classes + c
            for k in range(VECTORS):
                out[i] = out[i] + positive[k]
                out[j] = out[j] + negative[k]
        which = which + 1
        at += row
        e += e_row
        if not sums:
            to += e_row
    e -= q.classes * e_row
    for i in range(lines * VECTORS):
        invert_unshifted(q, x + i * lanes(scale), row, label[i], e + i, scale + i)


cdef inline void binary_channel(
    const Problem *q, const Scratch *t, const logit *x, Py_ssize_t lines, const vec *label, const vec *e,
    double gamma, Py_ssize_t integer_gamma, bint sums,
) noexcept nogil:
    """`binary_classes` of a single channel x, after `softmax_two`. The classes' logits are -x and x: what one adds to
    B+, the other adds to B-, and the gradient is the difference of theirs.
    """
    cdef vec positive[2]
    cdef vec negative[2]
    cdef vec zero, u, v, z, h, own_factor, factor
    cdef mask_t own, ignored
    cdef vec *out = <vec *>t.sums
    cdef vec *to = <vec *>t.binary
    cdef Py_ssize_t i, e_row = q.block // lanes(&v)
    cdef int c
    set_zero(&zero)
    own_factor = factor = zero
    for c in range(2):
        positive[c] = negative[c] = zero
    if not sums:  # of a voxel of class 1, and of class 0
        for c in range(2):
            broadcast(&positive[c], t.cotangent, 2 * POSITIVE + c)
            broadcast(&negative[c], t.cotangent, 2 * NEGATIVE + c)
        own_factor = zero - (positive[1] + negative[0])
        factor = positive[0] + negative[1]
    for i in range(lines * VECTORS):
        load(&v, x + i * lanes(&v))
        u = minimum(e[i], e[e_row + i])
        ignored = less(label[i], zero)
        own = equal(label[i], zero + 1)
        z = select(own, zero - v, v)
        if sums:
            h = negative_part(z, u, gamma, integer_gamma)
            v = andnot(ignored, h + z * 0)
            h = andnot(ignored, h + minimum(zero, z) * 0)
            positive[1] = add_where(own, positive[1], v)
            negative[0] = add_where(own, negative[0], h)
            positive[0] = positive[0] + andnot(own, v)
            negative[1] = negative[1] + andnot(own, h)
        else:
            v = select(own, own_factor, factor) * negative_slope(z, u, gamma, integer_gamma)
            to[e_row + i] = andnot(ignored, v)
    if sums:
        for c in range(2):
            i = 2 * q.row[POSITIVE] + c
            out[i] = out[i] + positive[c]
            i = 2 * q.row[NEGATIVE] + c
            out[i] = out[i] + negative[c]


cdef inline void run_binary_of(
    const Problem *q, const Scratch *t, const logit *x, Py_ssize_t row, Py_ssize_t lines, const vec *label, vec *e,
    vec *scale, double gamma, Py_ssize_t integer_gamma,
) noexcept nogil:
    if q.channels == 1:
        softmax_two(q, x, row, lines, label, e, scale, 1, True)
        if q.grad == NULL:
            binary_channel(q, t, x, lines, label, e, gamma, integer_gamma, True)
        else:
            binary_channel(q, t, x, lines, label, e, gamma, integer_gamma, False)
    elif q.grad == NULL:
        binary_classes(q, t, x, row, lines, label, e, scale, gamma, integer_gamma, True)
    else:
        binary_classes(q, t, x, row, lines, label, e, scale, gamma, integer_gamma, False)


cdef void run_binary(
    const Problem *q, const Scratch *t, const logit *x, Py_ssize_t row, Py_ssize_t lines, const vec *label, vec *e,
    vec *scale,
) noexcept nogil:
    """`run_softmax`, with B+ and B- or their gradient."""
    if q.binary_gamma == 0:
        run_binary_of(q, t, x, row, lines, label, e, scale, 0, 0)
    elif q.integer_binary_gamma == 2:
        run_binary_of(q, t, x, row, lines, label, e, scale, 2, 2)
    else:
        run_binary_of(q, t, x, row, lines, label, e, scale, q.binary_gamma, q.integer_binary_gamma)
