"""The common case, `Problem.plain`: softmax and class labels, with the sums I, P, Y and, if requested, H, B+ and B-.

Each function works on whole lines of voxels of a block. The softmax is kept as `e`, (classes, block), the exponentials,
and `scale`, (block,), one over their sum, which is 0 for ignored voxels; `own` and `rest`, (block,), where needed, are
the exponential of the voxel's own class and the sum of all others. `row` and similar arguments are the distances,
in elements, between the channels of an array.
"""


# ---- softmax ---------------------------------------------------------------------------------------------------------

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
    cdef vec which, mask
    cdef Py_ssize_t e_row = q.block // lanes(own)
    set_zero(&which)
    own[0] = rest[0] = which
    for _ in range(q.classes):
        mask = equal(label, which)
        own[0] = own[0] + and_mask(mask, e[0])
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

    That saves one exponential, and the exponentials need not wait for the maximum. The division is a loop of its own, so
    that the exponentials of the next voxels need not wait for it either.
    """
    cdef vec first, total, v, mask, of_own, zero
    cdef Py_ssize_t e_row = q.block // lanes(scale)
    cdef Py_ssize_t i
    cdef const logit *at
    cdef int c
    set_zero(&zero)
    of_own = zero
    for i in range(lines * VECTORS):
        at = x + i * lanes(scale)
        load(&first, at)
        v = first * 0 + 1  # NaN if it is infinite
        e[i] = total = v
        if split:
            mask = equal(label[i], zero)
            of_own = and_mask(mask, v)
            total = andnot(mask, v)
        for c in range(1, classes):
            at += row
            load(&v, at)
            v = exp_within(v - first)
            e[c * e_row + i] = v
            if split:
                mask = equal(label[i], constant(&zero, c))
                of_own = of_own + and_mask(mask, v)
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
    cdef vec first, v, mask, which, zero, b
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
                    own[j] = own[j] + and_mask(mask, v)
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
    """v = x_1 - x_0, NaN if the larger is infinite; of a single channel x, the logits of whose classes are 0 and x, that.
    """
    cdef vec first
    load(v, x + (channels - 1) * row)
    if channels == 2:
        load(&first, x)
        v[0] = maximum(first, v[0]) * 0 + (v[0] - first)


cdef inline void softmax_two(
    const Problem *q, const logit *x, Py_ssize_t row, Py_ssize_t lines, const vec *label, vec *e, vec *scale,
    int channels,
) noexcept nogil:
    """The softmax of two classes: with v = x_1 - x_0, one of the exponentials is exp(-|v|), the other 1."""
    cdef vec u, v, zero, below
    cdef Py_ssize_t i, e_row = q.block // lanes(scale)
    set_zero(&zero)
    for i in range(lines * VECTORS):
        load_difference(&v, x + i * lanes(scale), row, channels)
        u = exp_minus_abs(v)
        below = less(v, zero)
        e[i] = select(below, zero + 1, u)
        e[e_row + i] = select(below, u, zero + 1)
        scale[i] = andnot(less(label[i], zero), (zero + 1) / (u + 1))


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
    cdef vec zero, exact, nll
    set_zero(&zero)
    own = own + and_mask(less(label, zero), zero + 1)
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
    """The part in H of a voxel with this -log of the probability `own` of its class; for the gradient its derivative for
    `nll`.
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
    """Each voxel's part of H, (1 - s)^gamma (-log s) of its own class; for the gradient its derivative for -log s. It may
    overwrite own.
    """
    cdef vec s, r
    cdef Py_ssize_t i
    for i in range(lines * VECTORS):
        s = own[i] * scale[i]
        r = rest[i] * scale[i]
        nll[i] = part_of_nll(q, nll_of(s, r, label[i], x + i * lanes(scale), row, q.channels), s, r)


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
    const vec *binary, const char *cotangent, logit *grad, Py_ssize_t row, Py_ssize_t p, bint cross_entropy,
    bint add_binary, bint non_temporal,
) noexcept nogil:
    """Writes the gradient, which may overwrite e. Compile-time constants: p, if it is 1 or 2; whether there is an H;
    whether to add `binary`, the gradient of B+ and B-; how to store.

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
                    if add_binary:
                        s = s + binary[at - e + k]
                    if non_temporal:
                        store_non_temporal(to + k * lanes(&s), s)
                    else:
                        store(to + k * lanes(&s), s)
                to += row
            which = which + 1
            at += e_row
        binary += VECTORS
        e += VECTORS
        label += VECTORS
        scale += VECTORS
        nll += VECTORS
        grad += VECTORS * lanes(&s)


cdef void look_up(const Problem *q, Py_ssize_t n, const real *label, const real *table, real *out) noexcept nogil:
    """out = table[label], 0 for ignored voxels."""
    cdef Py_ssize_t v, c
    for v in range(n):
        c = <Py_ssize_t>label[v]
        out[v] = table[c] if c >= 0 else 0


cdef inline void look_up_own(
    const Problem *q, Py_ssize_t lines, const vec *label, const char *cotangent, int k, vec *out
) noexcept nogil:
    """The cotangents, in row k, of the voxels' own classes."""
    if vec is f64:
        look_up(q, lines * q.line, <const double *>label, <const double *>cotangent + k * q.classes, <double *>out)
    else:
        look_up(q, lines * q.line, <const float *>label, <const float *>cotangent + k * q.classes, <float *>out)


cdef inline void grad_many(
    const Problem *q, const Scratch *t, const logit *x, Py_ssize_t x_row, Py_ssize_t lines, const vec *label, vec *e,
    logit *grad, Py_ssize_t row, bint cross_entropy, bint non_temporal,
) noexcept nogil:
    """`grad_lines` of many classes, class by class, for p = 1 and gamma = 0. The last two arguments are compile-time
    constants.
    """
    cdef vec *scale = <vec *>t.scale
    cdef vec *own = <vec *>t.nll
    cdef vec *rest = <vec *>t.rest
    cdef vec *dot = <vec *>t.dot
    cdef vec *slope = <vec *>t.slope
    cdef vec s, b, mask, which
    cdef Py_ssize_t c, i, j
    cdef int k
    softmax_many(q, x, x_row, lines, label, e, scale, own, rest, True, dot, t.cotangent, True)
    look_up_own(q, lines, label, t.cotangent, TARGET_SUM, slope)
    for i in range(lines * VECTORS):
        rest[i] = rest[i] * scale[i]
        s = dot[i] * scale[i]
        dot[i] = slope[i] * (own[i] * scale[i]) + s  # sum s d over all classes
        own[i] = slope[i] * rest[i] - s  # d_o r minus that sum over the other classes
    if cross_entropy:
        look_up_own(q, lines, label, t.cotangent, CROSS_ENTROPY, slope)
        for i in range(lines * VECTORS):
            dot[i] = dot[i] - slope[i]
            rest[i] = slope[i] * rest[i]
    set_zero(&which)
    for c in range(q.classes):
        broadcast(&b, t.cotangent, PRED_SUM * q.classes + c)
        for i in range(lines):
            for k in range(VECTORS):
                j = i * VECTORS + k
                mask = equal(label[j], which)
                s = e[j] * scale[j] * select(mask, own[j], b - dot[j])
                if cross_entropy:
                    s = s - and_mask(mask, rest[j])
                if non_temporal:
                    store_non_temporal(grad + j * lanes(&s), s)
                else:
                    store(grad + j * lanes(&s), s)
        which = which + 1
        e += q.block // lanes(&s)
        grad += row


cdef inline void run_grad_many(
    const Problem *q, const Scratch *t, const logit *x, Py_ssize_t x_row, Py_ssize_t lines, const vec *label, vec *e,
    logit *grad, Py_ssize_t grad_row, bint non_temporal,
) noexcept nogil:
    if q.cross_entropy:
        if non_temporal:
            grad_many(q, t, x, x_row, lines, label, e, grad, grad_row, True, True)
        else:
            grad_many(q, t, x, x_row, lines, label, e, grad, grad_row, True, False)
    elif non_temporal:
        grad_many(q, t, x, x_row, lines, label, e, grad, grad_row, False, True)
    else:
        grad_many(q, t, x, x_row, lines, label, e, grad, grad_row, False, False)


# ---- two classes -----------------------------------------------------------------------------------------------------

cdef inline void grad_two(
    const Problem *q, const Scratch *t, const logit *x, Py_ssize_t x_row, Py_ssize_t lines, const vec *label,
    logit *grad, Py_ssize_t row, int channels, bint cross_entropy,
) noexcept nogil:
    """The gradient of two classes, p = 1 and gamma = 0, without a detour through scratch. The last two arguments are
    compile-time constants.

    The gradient of class 1 is s_0 s_1 (d_1 - d_0) + h_0 [y=0] s_1 - h_1 [y=1] s_0, that of class 0 its negative; d_c is
    the derivative with respect to s_c. With u = exp(-|x_1 - x_0|), s_0 s_1 is u / (1 + u)^2.
    """
    cdef vec a[2]
    cdef vec b[2]
    cdef vec h[2]
    cdef vec difference[2]  # d_1 - d_0 of the voxels of each class
    cdef vec zero, one, own, u, v, r, slope
    cdef Py_ssize_t i
    cdef int c
    set_zero(&zero)
    one = zero + 1
    for c in range(2):
        broadcast(&a[c], t.cotangent, 2 * TARGET_SUM + c)
        broadcast(&b[c], t.cotangent, 2 * PRED_SUM + c)
        if cross_entropy:
            broadcast(&h[c], t.cotangent, 2 * CROSS_ENTROPY + c)
    difference[0] = b[1] - a[0]
    difference[1] = a[1] - b[0]
    h[1] = zero - h[1] if cross_entropy else zero
    for i in range(lines * VECTORS):
        load_difference(&v, x, x_row, channels)
        u = exp_minus_abs(v)
        r = andnot(less(label[i], zero), one / (u + 1))
        own = equal(label[i], one)
        slope = select(own, difference[1], difference[0]) * (u * r * r)
        if cross_entropy:
            v = select(own, zero - v, v)
            v = select(less(v, zero), u, one) * r  # the probability of the other class
            slope = slope + select(own, h[1], h[0]) * v
        if channels == 2:
            store(grad, zero - slope)
        store(grad + (channels - 1) * row, slope)
        x += lanes(&v)
        grad += lanes(&v)


# ---- any number of classes -------------------------------------------------------------------------------------------

cdef inline void run_softmax_of(
    const Problem *q, const logit *x, Py_ssize_t row, Py_ssize_t lines, const vec *label, vec *e, vec *scale,
    vec *own, vec *rest, bint split,
) noexcept nogil:
    if q.classes == 1:
        softmax_few(q, x, row, lines, label, e, scale, own, rest, 1, split)
    elif q.channels == 1:
        softmax_two(q, x, row, lines, label, e, scale, 1)
    elif q.classes == 2:
        softmax_two(q, x, row, lines, label, e, scale, 2)
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


cdef inline void run_lines_of_power(
    const Problem *q, const Scratch *t, Py_ssize_t lines, const vec *label, vec *e, logit *grad, Py_ssize_t row,
    Py_ssize_t p, bint non_temporal,
) noexcept nogil:
    cdef vec *scale = <vec *>t.scale
    cdef vec *nll = <vec *>t.nll
    cdef const vec *binary = <const vec *>t.binary
    if q.grad == NULL:
        if q.cross_entropy:
            sum_lines(q, lines, label, e, scale, nll, <vec *>t.sums, p, True)
        else:
            sum_lines(q, lines, label, e, scale, nll, <vec *>t.sums, p, False)
    elif q.cross_entropy:
        if q.binary_cross_entropy:
            grad_lines(q, lines, label, e, scale, nll, binary, t.cotangent, grad, row, p, True, True, False)
        elif non_temporal:
            grad_lines(q, lines, label, e, scale, nll, binary, t.cotangent, grad, row, p, True, False, True)
        else:
            grad_lines(q, lines, label, e, scale, nll, binary, t.cotangent, grad, row, p, True, False, False)
    elif q.binary_cross_entropy:
        grad_lines(q, lines, label, e, scale, nll, binary, t.cotangent, grad, row, p, False, True, False)
    elif non_temporal:
        grad_lines(q, lines, label, e, scale, nll, binary, t.cotangent, grad, row, p, False, False, True)
    else:
        grad_lines(q, lines, label, e, scale, nll, binary, t.cotangent, grad, row, p, False, False, False)


cdef void run_plain(
    const Problem *q, const Scratch *t, const logit *x, Py_ssize_t x_row, Py_ssize_t lines, const vec *label,
    vec *e, logit *grad, Py_ssize_t grad_row, bint non_temporal,
) noexcept nogil:
    """Adds the sums of whole lines of voxels to t.sums, or writes their gradient."""
    cdef vec *scale = <vec *>t.scale
    cdef bint simple = q.grad != NULL and q.p == 1 and not (q.focal or q.binary_cross_entropy)
    if simple and q.classes > FEW_CLASSES:
        run_grad_many(q, t, x, x_row, lines, label, e, grad, grad_row, non_temporal)
        return
    if simple and q.classes == 2:
        if q.channels == 1 and q.cross_entropy:
            grad_two(q, t, x, x_row, lines, label, grad, grad_row, 1, True)
        elif q.channels == 1:
            grad_two(q, t, x, x_row, lines, label, grad, grad_row, 1, False)
        elif q.cross_entropy:
            grad_two(q, t, x, x_row, lines, label, grad, grad_row, 2, True)
        else:
            grad_two(q, t, x, x_row, lines, label, grad, grad_row, 2, False)
        return
    if q.cross_entropy and (q.grad == NULL or q.focal):
        run_softmax_and_nll(q, t, x, x_row, lines, label, e, scale)
    elif q.binary_cross_entropy:
        run_binary(q, t, x, x_row, lines, label, e, scale)
    else:
        run_softmax(q, x, x_row, lines, label, e, scale)
    if q.p == 1:
        run_lines_of_power(q, t, lines, label, e, grad, grad_row, 1, non_temporal)
    elif q.p == 2:
        run_lines_of_power(q, t, lines, label, e, grad, grad_row, 2, non_temporal)
    else:
        run_lines_of_power(q, t, lines, label, e, grad, grad_row, q.p, non_temporal)
