"""The softmax of few, many and two classes, and -log of the probability of the voxel's own class.

Each function works on whole lines of voxels of a block. The softmax is kept as `e`, (classes, block), the exponentials,
and `scale`, (block,), one over their sum, which is 0 for ignored voxels; `own` and `rest`, (block,), where needed, are
the exponential of the voxel's own class and the sum of all others. `row` and similar arguments are the distances,
in elements, between the channels of an array.
"""


# ---- softmax ---------------------------------------------------------------------------------------------------------

cdef inline void prefetch_ahead(const logit *x) noexcept nogil:
    """Prefetches what follows in the same row, which the hardware does too late."""
    PREFETCH(<const char *>x + AHEAD)


cdef inline vec softmax_shifted(
    const logit *x, Py_ssize_t row, Py_ssize_t channels, vec *e, Py_ssize_t e_row
) noexcept nogil:
    """e = exp(x - max x) for every class of one vector of voxels; returns their sum. x may be e.

    If the maximum is infinite, inf - inf makes the sum NaN.
    """
    cdef vec top, total, v, lowest
    cdef Py_ssize_t c
    set_lowest_exp(&lowest)
    load(&top, x)
    for c in range(1, channels):
        load(&v, x + c * row)
        top = maximum(v, top)
    set_zero(&total)
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


cdef inline void split_sum(
    const Problem *q, vec label, const vec *e, vec *own, vec *rest
) noexcept nogil:
    """own and rest of one vector of voxels."""
    cdef vec which
    cdef mask_t mask
    cdef Py_ssize_t e_row = q.block // lanes(own)
    set_zero(&which)
    own[0] = rest[0] = which
    for _ in range(q.classes):
        mask = equal(label, which)
        own[0] = add_where(mask, own[0], e[0])
        rest[0] = rest[0] + andnot(mask, e[0])
        which = which + 1
        e += e_row


cdef void split_rare(const Problem *q, vec label, const vec *e, vec *own, vec *rest) noexcept nogil:
    """`split_sum`, out of line."""
    split_sum(q, label, e, own, rest)


cdef inline void invert_sum(
    const Problem *q, const logit *x, Py_ssize_t row, vec label, vec *e, vec *scale, vec *own, vec *rest, bint split
) noexcept nogil:
    """Replaces scale, the sum of e, by one over it, 0 for ignored voxels. Recomputes all if e is inexact."""
    cdef vec zero, total = scale[0]
    set_zero(&zero)
    if q.classes > 1 and any_greater(total, LARGEST_SUM):
        total = softmax_rare(x, row, q.channels, e, q.block // lanes(scale))
        if split:
            split_rare(q, label, e, own, rest)
    scale[0] = andnot(less(label, zero), (zero + 1) / total)


cdef inline void softmax_few(
    const Problem *q, const logit *x, Py_ssize_t row, Py_ssize_t lines, const vec *label, vec *e, vec *scale,
    vec *own, vec *rest, int classes, bint split,
) noexcept nogil:
    """The softmax for a constant number of classes, with the first logit in place of the maximum. `split`, another
    compile-time constant, is whether to fill own and rest.

    That saves one exponential, and the exponentials need not wait for the maximum. The division is a loop of its own,
    so that the exponentials of the next voxels need not wait for it either.
    """
    cdef vec first, total, v, of_own, zero
    cdef mask_t mask
    cdef Py_ssize_t e_row = q.block // lanes(scale)
    cdef Py_ssize_t i
    cdef const logit *at
    cdef int c
    set_zero(&zero)
    of_own = zero
    for i in range(lines * VECTORS):
        at = x + i * lanes(scale)
        prefetch_ahead(at)
        load(&first, at)
        v = first * 0 + 1  # NaN if it is infinite
        e[i] = total = v
        if split:
            mask = equal(label[i], zero)
            of_own = and_mask(mask, v)
            total = andnot(mask, v)
        for c in range(1, classes):
            at += row
            prefetch_ahead(at)
            load(&v, at)
            v = exp_within(v - first)
            e[c * e_row + i] = v
            if split:
                mask = equal(label[i], constant(&zero, c))
                of_own = add_where(mask, of_own, v)
                total = total + andnot(mask, v)
            else:
                total = total + v
        if split:
            own[i] = of_own
            rest[i] = total
            total = total + of_own
        scale[i] = total
    for i in range(lines * VECTORS):
        invert_sum(q, x + i * lanes(scale), row, label[i], e + i, scale + i, own + i, rest + i, split)


cdef void dot_rare(const Problem *q, vec label, const vec *e, const char *cotangent, vec *dot) noexcept nogil:
    """The dot of `softmax_many` of one vector of voxels."""
    cdef vec which, b
    cdef Py_ssize_t c, e_row = q.block // lanes(dot)
    set_zero(&which)
    dot[0] = which
    for c in range(q.classes):
        broadcast(&b, cotangent, PRED_SUM * q.classes + c)
        dot[0] = dot[0] + b * andnot(equal(label, which), e[c * e_row])
        which = which + 1


cdef inline void softmax_many(
    const Problem *q, const logit *x, Py_ssize_t row, Py_ssize_t lines, const vec *label, vec *e, vec *scale,
    vec *own, vec *rest, bint split, vec *dot, const char *cotangent, bint dots,
) noexcept nogil:
    """`softmax_few` for any number of classes, class by class; with `dots`, a compile-time constant too, dot is the sum
    of the other classes' exponentials times the cotangents of P.

    The hardware prefetcher does not follow the jump from one class to the next, so the same voxels of the next class
    are prefetched meanwhile; after the last class, the first one's of the next block.
    """
    cdef vec first, v, which, zero, b
    cdef mask_t mask
    cdef Py_ssize_t e_row = q.block // lanes(scale)
    cdef Py_ssize_t i, j, c
    cdef const logit *at = x
    cdef const logit *following
    cdef vec *to = e
    cdef int k
    set_zero(&zero)
    which = b = zero
    for i in range(lines * VECTORS):
        scale[i] = zero
        if split:
            own[i] = rest[i] = zero
        if dots:
            dot[i] = zero
    for c in range(q.classes):
        following = at + row if c + 1 < q.classes else x + lines * VECTORS * lanes(scale)
        if dots:
            broadcast(&b, cotangent, PRED_SUM * q.classes + c)
        for i in range(lines):
            PREFETCH(following + i * VECTORS * lanes(scale))
            for k in range(VECTORS):
                j = i * VECTORS + k
                load(&first, x + j * lanes(scale))
                load(&v, at + j * lanes(scale))
                v = exp_within(v - first)
                to[j] = v
                if split:
                    mask = equal(label[j], which)
                    own[j] = add_where(mask, own[j], v)
                    v = andnot(mask, v)
                    rest[j] = rest[j] + v
                    if dots:
                        dot[j] = dot[j] + b * v
                else:
                    scale[j] = scale[j] + v
        which = which + 1
        at += row
        to += e_row
    for i in range(lines * VECTORS):
        if split:
            scale[i] = own[i] + rest[i]
        v = scale[i]
        invert_sum(q, x + i * lanes(scale), row, label[i], e + i, scale + i, own + i, rest + i, split)
        if dots and any_greater(v, LARGEST_SUM):
            dot_rare(q, label[i], e + i, cotangent, dot + i)


cdef inline void load_difference(vec *v, const logit *x, Py_ssize_t row, int channels) noexcept nogil:
    """v = x_1 - x_0, NaN if the larger is infinite; of a single channel x, the logits of whose classes are 0 and x,
    that.
    """
    cdef vec first
    prefetch_ahead(x + (channels - 1) * row)
    load(v, x + (channels - 1) * row)
    if channels == 2:
        prefetch_ahead(x)
        load(&first, x)
        v[0] = maximum(first, v[0]) * 0 + (v[0] - first)


cdef inline void softmax_two(
    const Problem *q, const logit *x, Py_ssize_t row, Py_ssize_t lines, const vec *label, vec *e, vec *scale,
    int channels, bint symmetric,
) noexcept nogil:
    """The softmax of two classes. With v = x_1 - x_0, their exponentials are 1 and exp(v), which takes the fewest
    instructions; if `symmetric`, 1 and exp(-|v|), so that none is large. The last two arguments are compile-time
    constants.
    """
    cdef vec u, v, zero, one, lowest, highest
    cdef mask_t below
    cdef Py_ssize_t i, e_row = q.block // lanes(scale)
    set_zero(&zero)
    one = zero + 1
    set_lowest_exp(&lowest)
    highest = constant(&zero, 708.3 if vec is f64 else 87.3)  # beyond it, 1 / exp(v) is no normal number
    for i in range(lines * VECTORS):
        load_difference(&v, x + i * lanes(scale), row, channels)
        if symmetric:
            u = exp_minus_abs(v)
            below = less(v, zero)
            e[i] = select(below, one, u)
            e[e_row + i] = select(below, u, one)
        else:
            u = exp(minimum(highest, maximum(lowest, v)))
            e[i] = andnot(less(highest, v), one)
            e[e_row + i] = u
        scale[i] = andnot(less(label[i], zero), one / (u + 1))


# ---- negative log-likelihood -----------------------------------------------------------------------------------------

cdef vec nll_from_logits(const logit *x, Py_ssize_t row, Py_ssize_t channels, vec label) noexcept nogil:
    """-log of the probability of the voxels' own classes as log sum exp(x - max x) - (x_y - max x)."""
    cdef vec top, zero, lowest, which, own, total, v
    cdef Py_ssize_t c
    set_zero(&zero)
    set_lowest_exp(&lowest)
    load(&top, x)
    for c in range(1, channels):
        load(&v, x + c * row)
        top = maximum(v, top)
    own = total = which = zero
    for c in range(channels):
        load(&v, x + c * row)
        own = add_where(equal(label, which), own, v)
        total = total + exp(maximum(lowest, v - top))
        which = which + 1
    return log(total, zero + 1 - total) + total * 0 - (own - top)  # total * 0: the log of NaN is not NaN


cdef inline vec nll_of(
    vec own, vec rest, vec label, const logit *x, Py_ssize_t row, Py_ssize_t channels
) noexcept nogil:
    """-log(own): `own` are the probabilities of the voxels' own classes, `rest` those of all others together, x the
    logits. Arbitrary for ignored voxels.
    """
    cdef vec zero, nll
    cdef mask_t exact
    set_zero(&zero)
    own = add_where(less(label, zero), own, zero + 1)
    nll = zero - log(own, rest)
    if any_greater(zero - own, -SMALLEST_EXACT):
        exact = less(constant(&zero, SMALLEST_EXACT), own)
        nll = select(exact, nll, nll_from_logits(x, row, channels, label))
    return nll


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


cdef inline vec part_of_nll(const Problem *q, vec nll, vec own, vec rest) noexcept nogil:
    """The part in H of a voxel with this -log of the probability `own` of its class; for the gradient its derivative
    for `nll`.
    """
    if not q.focal:
        return nll
    if q.grad == NULL:
        return nll * modulation(rest, q.gamma, q.integer_gamma)
    return modulated_slope(nll, own, rest, q.gamma, q.integer_gamma)


cdef inline void nll_of_two(
    const Problem *q, const logit *x, Py_ssize_t row, Py_ssize_t lines, const vec *label, const vec *e, vec *nll,
    int channels,
) noexcept nogil:
    """`nll_lines` after `softmax_two`: softplus of the other class's logit minus the own one's."""
    cdef vec u, v, zero
    cdef Py_ssize_t i, e_row = q.block // lanes(nll)
    set_zero(&zero)
    for i in range(lines * VECTORS):
        load_difference(&v, x + i * lanes(nll), row, channels)
        v = select(equal(label[i], zero + 1), zero - v, v)
        u = minimum(e[i], e[e_row + i])
        nll[i] = part_of_nll(q, softplus(v, u), sigmoid(zero - v, u), sigmoid(v, u))


cdef void nll_lines(
    const Problem *q, const logit *x, Py_ssize_t row, Py_ssize_t lines, const vec *label, const vec *scale,
    const vec *own, const vec *rest, vec *nll,
) noexcept nogil:
    """Each voxel's part of H, (1 - s)^gamma (-log s) of its own class; for the gradient its derivative for -log s. It
    may overwrite own.
    """
    cdef vec s, r
    cdef Py_ssize_t i
    for i in range(lines * VECTORS):
        s = own[i] * scale[i]
        r = rest[i] * scale[i]
        nll[i] = part_of_nll(q, nll_of(s, r, label[i], x + i * lanes(scale), row, q.channels), s, r)


# ---- dispatch --------------------------------------------------------------------------------------------------------

cdef inline void run_softmax_of(
    const Problem *q, const logit *x, Py_ssize_t row, Py_ssize_t lines, const vec *label, vec *e, vec *scale,
    vec *own, vec *rest, bint split,
) noexcept nogil:
    cdef bint symmetric = split or q.grad != NULL
    if q.classes == 1:
        softmax_few(q, x, row, lines, label, e, scale, own, rest, 1, split)
    elif q.channels == 1:
        if symmetric:
            softmax_two(q, x, row, lines, label, e, scale, 1, True)
        else:
            softmax_two(q, x, row, lines, label, e, scale, 1, False)
    elif q.classes == 2:
        if symmetric:
            softmax_two(q, x, row, lines, label, e, scale, 2, True)
        else:
            softmax_two(q, x, row, lines, label, e, scale, 2, False)
    elif q.classes == 3:
        softmax_few(q, x, row, lines, label, e, scale, own, rest, 3, split)
    elif q.classes == 4:
        softmax_few(q, x, row, lines, label, e, scale, own, rest, 4, split)
    elif q.classes == 5:
        softmax_few(q, x, row, lines, label, e, scale, own, rest, 5, split)
    elif q.classes == 6:
        softmax_few(q, x, row, lines, label, e, scale, own, rest, 6, split)
    elif q.classes == 7:
        softmax_few(q, x, row, lines, label, e, scale, own, rest, 7, split)
    elif q.classes == 8:
        softmax_few(q, x, row, lines, label, e, scale, own, rest, 8, split)
    else:
        softmax_many(q, x, row, lines, label, e, scale, own, rest, split, scale, NULL, False)


cdef void run_softmax(
    const Problem *q, const logit *x, Py_ssize_t row, Py_ssize_t lines, const vec *label, vec *e, vec *scale
) noexcept nogil:
    run_softmax_of(q, x, row, lines, label, e, scale, scale, scale, False)


cdef void run_softmax_and_nll(
    const Problem *q, const Scratch *t, const logit *x, Py_ssize_t row, Py_ssize_t lines, const vec *label, vec *e,
    vec *scale,
) noexcept nogil:
    """`run_softmax` that also fills t.nll, and, with B+ and B-, is `run_binary`."""
    cdef vec *nll = <vec *>t.nll
    cdef vec *rest = <vec *>t.rest
    cdef Py_ssize_t i
    if q.binary_cross_entropy:
        run_binary(q, t, x, row, lines, label, e, scale)
    else:
        run_softmax_of(q, x, row, lines, label, e, scale, nll, rest, True)
    if q.channels == 1:
        nll_of_two(q, x, row, lines, label, e, nll, 1)
    elif q.classes == 2 and not q.binary_cross_entropy:
        nll_of_two(q, x, row, lines, label, e, nll, 2)
    else:
        if q.binary_cross_entropy:
            for i in range(lines * VECTORS):
                split_sum(q, label[i], e + i, nll + i, rest + i)
        nll_lines(q, x, row, lines, label, scale, nll, rest, nll)
