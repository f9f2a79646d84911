"""The common case, `Problem.plain`: softmax and class labels, with the sums I, P, Y and, if requested, H, B+ and B-;
and the gradient of these.

Scratch holds what `cpu/softmax.pxi` computes: `e`, `scale`, `own` and `rest`.
"""


# ---- sums ------------------------------------------------------------------------------------------------------------

cdef inline void sum_lines(
    const Problem *q, Py_ssize_t lines, const vec *label, const vec *e, const vec *scale, const vec *nll, vec *sums,
    Py_ssize_t p, bint cross_entropy,
) noexcept nogil:
    """Adds I, P, Y and H to sums, (3 or 4, classes). Compile-time constants: p, if it is 1 or 2; whether there is an H.
    """
    cdef vec intersection[VECTORS]
    cdef vec pred_sum[VECTORS]
    cdef vec of_nll[VECTORS]
    cdef vec target_sum, which, s
    cdef mask_t mask
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
                intersection[k] = add_where(mask, intersection[k], s)
                pred_sum[k] = pred_sum[k] + power(s, p)
                if cross_entropy:
                    of_nll[k] = add_where(mask, of_nll[k], nll[at])
        for k in range(VECTORS):
            sums[c] = sums[c] + intersection[k]
            sums[PRED_SUM * q.classes + c] = sums[PRED_SUM * q.classes + c] + pred_sum[k]
            if cross_entropy:
                sums[CROSS_ENTROPY * q.classes + c] = sums[CROSS_ENTROPY * q.classes + c] + of_nll[k]
        sums[TARGET_SUM * q.classes + c] = target_sum
        which = which + 1
        e += q.block // lanes(&s)


# ---- gradient --------------------------------------------------------------------------------------------------------

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
    bint add_binary, bint non_temporal, bint per_voxel,
) noexcept nogil:
    """Writes the gradient, which may overwrite e. Compile-time constants: p, if it is 1 or 2; whether there is an H;
    whether to add `binary`, the gradient of B+ and B-; how to store; whether the cotangent has, in place of each
    number, a row of them, for each voxel of a block.

    With d_c the derivative with respect to s_c, the gradient is s_c (d_c - sum s d) + h_o (s_c - [c=o]), o the voxel's
    own class. For near-perfect predictions nothing must cancel: 1 - s_o is the sum r of the others, the gradient of o
    is s_o (d_o r - dot) - h_o r with dot = sum s d over the others, and where s_o is near 1, d_o is not a_o + b_o
    s_o^(p-1) but (a + b)_o - b_o (1 - s_o^(p-1)).
    """
    cdef vec dot[VECTORS]
    cdef vec rest[VECTORS]  # the sum of the other classes' exponentials
    cdef vec own[VECTORS]  # the derivative with respect to the probability of the own class
    cdef vec own_a[VECTORS]
    cdef vec own_b[VECTORS]
    cdef vec own_e[VECTORS]
    cdef vec own_h[VECTORS]
    cdef vec s, slope, a, b, h, which, zero, near_1
    cdef mask_t mask
    cdef Py_ssize_t c, e_row = q.block // lanes(&s)
    cdef const vec *at
    cdef const vec *of_voxels = <const vec *>cotangent
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
                if per_voxel:
                    a = of_voxels[(TARGET_SUM * q.classes + c) * e_row + k]
                    b = of_voxels[(PRED_SUM * q.classes + c) * e_row + k]
                    if p > 1:
                        slope = of_voxels[(INTERSECTION * q.classes + c) * e_row + k]
                    if cross_entropy:
                        h = of_voxels[(CROSS_ENTROPY * q.classes + c) * e_row + k]
                mask = equal(label[k], which)
                s = andnot(mask, at[k])
                rest[k] = rest[k] + s
                dot[k] = dot[k] + s * (b if p == 1 else b * power(at[k] * scale[k], p - 1))
                own[k] = add_where(mask, own[k], a)
                own_e[k] = add_where(mask, own_e[k], at[k])
                if p > 1:
                    own_a[k] = add_where(mask, own_a[k], slope)
                    own_b[k] = add_where(mask, own_b[k], b)
                if cross_entropy:
                    own_h[k] = add_where(mask, own_h[k], h)
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
                    if per_voxel:
                        b = of_voxels[(PRED_SUM * q.classes + c) * e_row + k]
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
        of_voxels += VECTORS
        grad += VECTORS * lanes(&s)


# ---- gradient of many classes ----------------------------------------------------------------------------------------

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


cdef void split_many(
    const Problem *q, const Scratch *t, Py_ssize_t lines, const vec *label, const vec *e, vec *own
) noexcept nogil:
    """What `softmax_many` computes if it splits and sums up, from e."""
    cdef vec *rest = <vec *>t.rest
    cdef vec *dot = <vec *>t.dot
    cdef vec b, v, which
    cdef mask_t mask
    cdef Py_ssize_t c, i
    set_zero(&which)
    for i in range(lines * VECTORS):
        own[i] = rest[i] = dot[i] = which
    for c in range(q.classes):
        broadcast(&b, t.cotangent, PRED_SUM * q.classes + c)
        for i in range(lines * VECTORS):
            mask = equal(label[i], which)
            v = andnot(mask, e[i])
            own[i] = add_where(mask, own[i], e[i])
            rest[i] = rest[i] + v
            dot[i] = dot[i] + b * v
        which = which + 1
        e += q.block // lanes(&b)


cdef inline void slopes_many(
    const Problem *q, const Scratch *t, Py_ssize_t lines, const vec *label, vec *own
) noexcept nogil:
    """Replaces dot by the sum of s d over all classes, minus h of the own one; own by the slope of the own class; rest
    by what that loses to h.
    """
    cdef vec *scale = <vec *>t.scale
    cdef vec *nll = <vec *>t.nll
    cdef vec *rest = <vec *>t.rest
    cdef vec *dot = <vec *>t.dot
    cdef vec *slope = <vec *>t.slope
    cdef vec s, zero
    cdef Py_ssize_t i
    set_zero(&zero)
    look_up_own(q, lines, label, t.cotangent, TARGET_SUM, slope)
    for i in range(lines * VECTORS):
        rest[i] = rest[i] * scale[i]
        s = dot[i] * scale[i]
        dot[i] = slope[i] * (own[i] * scale[i]) + s
        own[i] = slope[i] * rest[i] - s  # d_o r minus the sum over the other classes
    if q.cross_entropy:
        look_up_own(q, lines, label, t.cotangent, CROSS_ENTROPY, slope)
        for i in range(lines * VECTORS):
            s = slope[i] * nll[i] if q.focal else slope[i]
            dot[i] = dot[i] - s
            rest[i] = s * rest[i]
    elif q.binary_cross_entropy:
        for i in range(lines * VECTORS):
            rest[i] = zero


cdef inline void grad_many(
    const Problem *q, const Scratch *t, const logit *x, Py_ssize_t x_row, Py_ssize_t lines, const vec *label, vec *e,
    logit *grad, Py_ssize_t row, bint cross_entropy, bint add_binary, bint non_temporal,
) noexcept nogil:
    """`grad_lines` of many classes, class by class, for p = 1. The last three arguments are compile-time constants."""
    cdef vec *scale = <vec *>t.scale
    cdef vec *own = <vec *>t.own
    cdef vec *rest = <vec *>t.rest
    cdef vec *dot = <vec *>t.dot
    cdef const vec *binary = <const vec *>t.binary
    cdef vec s, b, which
    cdef mask_t mask
    cdef Py_ssize_t c, i, j
    cdef int k
    if q.focal or add_binary:
        if q.focal:
            run_softmax_and_nll(q, t, x, x_row, lines, label, e, scale)
        else:
            run_binary(q, t, x, x_row, lines, label, e, scale)
        split_many(q, t, lines, label, e, own)
    else:
        softmax_many(q, x, x_row, lines, label, e, scale, own, rest, True, dot, t.cotangent, True)
    slopes_many(q, t, lines, label, own)
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
                if add_binary:
                    s = s + binary[j]
                if non_temporal:
                    store_non_temporal(grad + j * lanes(&s), s)
                else:
                    store(grad + j * lanes(&s), s)
        which = which + 1
        e += q.block // lanes(&s)
        binary += q.block // lanes(&s)
        grad += row


cdef inline void run_grad_many(
    const Problem *q, const Scratch *t, const logit *x, Py_ssize_t x_row, Py_ssize_t lines, const vec *label, vec *e,
    logit *grad, Py_ssize_t grad_row, bint non_temporal,
) noexcept nogil:
    if q.binary_cross_entropy:
        if non_temporal:
            grad_many(q, t, x, x_row, lines, label, e, grad, grad_row, True, True, True)
        else:
            grad_many(q, t, x, x_row, lines, label, e, grad, grad_row, True, True, False)
    elif q.cross_entropy:
        if non_temporal:
            grad_many(q, t, x, x_row, lines, label, e, grad, grad_row, True, False, True)
        else:
            grad_many(q, t, x, x_row, lines, label, e, grad, grad_row, True, False, False)
    elif non_temporal:
        grad_many(q, t, x, x_row, lines, label, e, grad, grad_row, False, False, True)
    else:
        grad_many(q, t, x, x_row, lines, label, e, grad, grad_row, False, False, False)


# ---- gradient of two classes -----------------------------------------------------------------------------------------

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
    cdef vec zero, one, u, v, r, slope
    cdef mask_t own
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


# ---- dispatch --------------------------------------------------------------------------------------------------------

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
            grad_lines(q, lines, label, e, scale, nll, binary, t.cotangent, grad, row, p, True, True, False, False)
        elif non_temporal:
            grad_lines(q, lines, label, e, scale, nll, binary, t.cotangent, grad, row, p, True, False, True, False)
        else:
            grad_lines(q, lines, label, e, scale, nll, binary, t.cotangent, grad, row, p, True, False, False, False)
    elif q.binary_cross_entropy:
        grad_lines(q, lines, label, e, scale, nll, binary, t.cotangent, grad, row, p, False, True, False, False)
    elif non_temporal:
        grad_lines(q, lines, label, e, scale, nll, binary, t.cotangent, grad, row, p, False, False, True, False)
    else:
        grad_lines(q, lines, label, e, scale, nll, binary, t.cotangent, grad, row, p, False, False, False, False)


cdef void run_plain(
    const Problem *q, const Scratch *t, const logit *x, Py_ssize_t x_row, Py_ssize_t lines, const vec *label,
    vec *e, logit *grad, Py_ssize_t grad_row, bint non_temporal,
) noexcept nogil:
    """Adds the sums of whole lines of voxels to t.sums, or writes their gradient."""
    cdef vec *scale = <vec *>t.scale
    if q.grad != NULL and q.p == 1 and q.classes > FEW_CLASSES:
        run_grad_many(q, t, x, x_row, lines, label, e, grad, grad_row, non_temporal)
        return
    if q.grad != NULL and q.p == 1 and q.classes == 2 and not (q.focal or q.binary_cross_entropy):
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
