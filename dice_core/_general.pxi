# Whatever else is asked for than I, P, Y and H of softmax scores and class labels.


cdef inline vec logit_of(const Problem *q, const logit *x, Py_ssize_t row, Py_ssize_t c, vec like) noexcept nogil:
    """The logit of class c; the first of a single channel's two classes has 0."""
    cdef vec v
    if q.classes != q.channels:
        zero(&v)
        if c == 0:
            return v
        c = 0
    load(&v, x + c * row)
    return v


cdef inline vec faint_exp(vec v) noexcept nogil:
    """exp(-|v|)."""
    cdef vec nought, lowest
    zero(&nought)
    lowest_exp(&lowest)
    return exp(maximum(lowest, nought - magnitude(v)))


cdef inline vec sigmoid(vec v, vec e) noexcept nogil:
    """1 / (1 + exp(-v)), e being exp(-|v|)."""
    cdef vec nought, negative
    zero(&nought)
    negative = less(v, nought)
    return (where(negative, e) + unless(negative, nought + 1)) / (e + 1)


cdef inline vec softplus(vec v, vec e) noexcept nogil:
    """log(1 + exp(v)), -log of the sigmoid of -v, e being exp(-|v|)."""
    cdef vec nought
    zero(&nought)
    return maximum(nought, v) + log_of_sum(e)


cdef inline vec target_of(
    const Problem *q, const vec *target, vec label, vec which, vec *left_out
) noexcept nogil:
    """How much of the class `which` the voxels are, 0 where it does not count; and where that is."""
    cdef vec nought
    zero(&nought)
    if q.dense:
        left_out[0] = less(target[0], nought)
        return maximum(nought, target[0])
    left_out[0] = less(label, nought)
    return where(equal(label, which), nought + 1)


cdef inline vec score_of(const Problem *q, vec v, vec softmax, vec *slope) noexcept nogil:
    """The score of a logit v, and its derivative for v if it is of this logit alone."""
    cdef vec nought, e
    zero(&nought)
    if q.activation == 0 or q.activation == 3:
        return softmax
    slope[0] = nought + 1
    if q.activation == 2:
        return v
    if q.activation == 4:
        return where(less(nought, v), nought + 1)
    e = faint_exp(v)
    v = sigmoid(v, e)
    slope[0] = e / ((e + 1) * (e + 1))
    return v


cdef void find_pivot(
    const Problem *q, const logit *x, Py_ssize_t row, Py_ssize_t lines, const vec *label, const vec *e,
    const vec *scale, vec *pivot,
) noexcept nogil:
    """-log s and logit of each voxel's largest class, from which those of the others are as far as their logits."""
    cdef vec own, rest, which, mask, found, nought, top, v
    cdef Py_ssize_t c, i, e_row = q.block // lanes(scale)
    zero(&nought)
    for i in range(lines * VECTORS):
        top = logit_of(q, x + i * lanes(scale), row, 0, nought)
        found = which = nought
        for c in range(1, q.classes):
            which = which + 1
            v = logit_of(q, x + i * lanes(scale), row, c, nought)
            mask = less(top, v)
            top = unless(mask, top) + where(mask, v)
            found = unless(mask, found) + where(mask, which)
        own = rest = which = nought
        for c in range(q.classes):
            mask = equal(found, which)
            v = e[c * e_row + i]
            own = own + where(mask, v)
            rest = rest + unless(mask, v)
            which = which + 1
        own = own * scale[i] + where(less(label[i], nought), nought + 1)  # 1 where there is none
        pivot[i] = nought - log(own, rest * scale[i])
        pivot[e_row + i] = top


cdef inline vec entropy_by(const vec *pivot, Py_ssize_t e_row, vec v) noexcept nogil:
    """-log s of the class of logit v, a sum of nothing negative."""
    return pivot[0] + unless(equal(v, pivot[e_row]), pivot[e_row] - v)


cdef void sum_more(
    const Problem *q, const logit *x, Py_ssize_t row, Py_ssize_t lines, const vec *label, const vec *e,
    const vec *scale, const vec *target, const vec *pivot, vec *sums,
) noexcept nogil:
    """Adds whatever is asked for of scored lines to sums, (K, classes)."""
    cdef vec total[8]
    cdef vec nought, which, t, s, v, softmax, left_out, h, z, u, slope
    cdef Py_ssize_t c, i, k, e_row = q.block // lanes(scale)
    zero(&nought)
    which = nought
    softmax = nought
    for c in range(q.classes):
        for k in range(8):
            total[k] = nought
        for i in range(lines * VECTORS):
            t = target_of(q, target + c * e_row + i, label[i], which, &left_out)
            v = logit_of(q, x + i * lanes(scale), row, c, t)
            if q.activation == 0 or q.activation == 3 or q.entropy:
                softmax = e[c * e_row + i] * scale[i]
            s = score_of(q, v, softmax, &slope)
            total[0] = total[0] + unless(left_out, t * s)
            total[1] = total[1] + unless(left_out, s if q.power == 1 else power(s, q.power))
            total[2] = total[2] + t
            total[7] = total[7] + unless(left_out, nought + 1)
            if q.entropy or q.smoothing:
                h = entropy_by(pivot + i, e_row, v)
                total[4] = total[4] + unless(left_out, h)
                if q.entropy:
                    h = t * focus(maximum(nought, nought + 1 - softmax), q.gamma, q.whole_gamma) * h
                    total[3] = total[3] + where(less(nought, t), h)
            if q.binary:
                z = nought - logit_of(q, x + i * lanes(scale), row, 1, t) if c < q.classes - q.channels else v
                u = faint_exp(z)
                if not q.dense:  # each voxel is in one half
                    v = less(nought, t)
                    z = where(v, nought - z) + unless(v, z)
                    h = focus(sigmoid(z, u), q.binary_gamma, q.whole_binary_gamma) * softplus(z, u)
                    total[5] = total[5] + where(v, h)
                    total[6] = total[6] + unless(left_out, unless(v, h))
                    continue
                h = focus(sigmoid(nought - z, u), q.binary_gamma, q.whole_binary_gamma) * softplus(nought - z, u)
                total[5] = total[5] + unless(left_out, where(less(nought, t), t * h))
                h = focus(sigmoid(z, u), q.binary_gamma, q.whole_binary_gamma) * softplus(z, u)
                total[6] = total[6] + unless(left_out, where(less(t, nought + 1), (nought + 1 - t) * h))
        for k in range(3):
            sums[k * q.classes + c] = sums[k * q.classes + c] + total[k]
        if q.entropy:
            sums[3 * q.classes + c] = sums[3 * q.classes + c] + total[3]
        if q.smoothing:
            sums[q.row_l * q.classes + c] = sums[q.row_l * q.classes + c] + total[4]
        if q.binary:
            sums[q.row_b * q.classes + c] = sums[q.row_b * q.classes + c] + total[5]
            sums[(q.row_b + 1) * q.classes + c] = sums[(q.row_b + 1) * q.classes + c] + total[6]
        if q.dense:
            sums[q.row_v * q.classes + c] = sums[q.row_v * q.classes + c] + total[7]
        which = which + 1


cdef inline vec half_slope(const Problem *q, vec score, vec rest, vec entropy) noexcept nogil:
    """Minus the derivative of rest^gamma (-log s) for the logit of s: rest^gamma (rest + gamma s (-log s))."""
    cdef vec bound
    largest(&bound)
    entropy = number(&rest, q.binary_gamma) * (score * minimum(bound, entropy))
    return focus(rest, q.binary_gamma, q.whole_binary_gamma) * (rest + entropy)


cdef inline vec binary_slope(const Problem *q, vec z, vec target, vec positive, vec negative) noexcept nogil:
    """The derivative for the logit z of `positive` times what it adds to B+ and `negative` times what to B-."""
    cdef vec nought, own, other, e, mask
    zero(&nought)
    e = faint_exp(z)
    if not q.dense:  # each voxel is in one half
        mask = less(nought, target)
        z = where(mask, nought - z) + unless(mask, z)
        z = half_slope(q, sigmoid(nought - z, e), sigmoid(z, e), softplus(z, e))
        return unless(mask, negative * z) - where(mask, positive * z)
    own = sigmoid(z, e)
    other = sigmoid(nought - z, e)
    negative = negative * (nought + 1 - target) * half_slope(q, other, own, softplus(z, e))
    return negative - positive * target * half_slope(q, own, other, softplus(nought - z, e))


cdef void grad_more(
    const Problem *q, const logit *x, Py_ssize_t x_row, Py_ssize_t lines, const vec *label, const vec *e,
    const vec *scale, const vec *target, const vec *pivot, const char *factors, logit *grad, Py_ssize_t row,
) noexcept nogil:
    """The gradient of all that `sum_more` sums, rows `row` apart; it may overwrite x."""
    cdef vec nought, which, t, s, v, softmax, left_out, h, z, slope, factor, d, of_entropy, dot, all_entropy
    cdef vec carried, some
    cdef Py_ssize_t c, i, e_row = q.block // lanes(scale)
    cdef int turn, first = 0 if q.activation == 0 or q.entropy or q.smoothing else 1
    cdef const logit *at
    cdef logit *to
    zero(&nought)
    softmax = slope = h = nought
    for i in range(lines * VECTORS):
        at = x + i * lanes(scale)
        dot = all_entropy = carried = some = nought
        for turn in range(first, 2):  # what depends on all classes, then the rest
            to = grad + i * lanes(scale)
            which = nought
            for c in range(q.classes):
                t = target_of(q, target + c * e_row + i, label[i], which, &left_out)
                v = logit_of(q, at, x_row, c, t)
                if q.activation == 0 or q.entropy or q.smoothing:
                    softmax = e[c * e_row + i] * scale[i]
                s = score_of(q, v, softmax, &slope)
                spread(&factor, factors, q.classes + c)
                d = factor if q.power == 1 else factor * power(s, q.power - 1)
                spread(&factor, factors, c)
                d = unless(left_out, d + factor * t)
                of_entropy = nought
                if q.entropy:
                    h = entropy_by(pivot + i, e_row, v)
                    h = focus_slope(h, softmax, maximum(nought, nought + 1 - softmax), q.gamma, q.whole_gamma)
                    spread(&factor, factors, 2 * q.classes + c)
                    of_entropy = where(less(nought, t), factor * t * h)
                if q.smoothing:
                    spread(&factor, factors, 3 * q.classes + c)
                    of_entropy = of_entropy + unless(left_out, factor)
                if turn == 0:
                    dot = dot + s * d
                    all_entropy = all_entropy + of_entropy
                    some = some + unless(left_out, nought + 1)
                else:
                    s = s * (d - dot) if q.activation == 0 else unless(left_out, d * slope)
                    if q.entropy or q.smoothing:
                        s = s + (softmax * all_entropy - of_entropy)
                    if first == 0:
                        s = where(less(nought, some), s)  # no class counts: whatever its logits
                    if q.binary:
                        z = nought - logit_of(q, at, x_row, 1, t) if c < q.classes - q.channels else v
                        spread(&factor, factors, 4 * q.classes + c)
                        spread(&d, factors, 5 * q.classes + c)
                        z = unless(left_out, binary_slope(q, z, t, factor, d))
                        s = s + (z - carried)
                        carried = z  # the logit of the first of two classes is the other's negative
                    if c >= q.classes - q.channels:
                        store(to, s)
                        to += row
                        carried = nought
                which = which + 1


cdef void decide(
    const Problem *q, const logit *x, Py_ssize_t row, Py_ssize_t lines, const vec *label, vec *e, vec *scale
) noexcept nogil:
    """Scores 1 for the largest logit, the first of equals, 0 for the others. NaN is as +inf."""
    cdef vec nought, endless, top, found, which, larger, v
    cdef Py_ssize_t c, i, e_row = q.block // lanes(scale)
    zero(&nought)
    largest(&endless)
    endless = endless + endless
    for i in range(lines * VECTORS):
        top = nought - endless
        found = nought
        which = nought - 1
        for c in range(q.classes):
            which = which + 1
            v = logit_of(q, x + i * lanes(scale), row, c, nought)
            v = where(equal(v, v), v) + unless(equal(v, v), endless)
            larger = less(top, v)
            top = unless(larger, top) + where(larger, v)
            found = unless(larger, found) + where(larger, which)
        which = nought
        for c in range(q.classes):
            e[c * e_row + i] = where(equal(found, which), nought + 1)
            which = which + 1
        scale[i] = unless(less(label[i], nought), nought + 1)


cdef void run_more(
    const Problem *q, const Scratch *t, const logit *x, Py_ssize_t x_row, Py_ssize_t lines, const vec *label,
    vec *e, logit *grad, Py_ssize_t grad_row,
) noexcept nogil:
    """`run_lines` for whatever is asked for."""
    cdef vec *scale = <vec *>t.scale
    cdef vec *target = <vec *>t.targets
    cdef vec *pivot = <vec *>t.pivot
    if q.activation == 3:
        decide(q, x, x_row, lines, label, e, scale)
    elif q.activation == 0 or q.entropy or q.smoothing:
        if q.channels == 1 and q.classes == 2:
            score_few(q, x, x_row, lines, label, e, scale, 2)
        elif q.channels == 1:
            score_few(q, x, x_row, lines, label, e, scale, 1)
        else:
            score_many(q, x, x_row, lines, label, e, scale)
    if q.entropy or q.smoothing:
        find_pivot(q, x, x_row, lines, label, e, scale, pivot)
    if q.grad == NULL:
        sum_more(q, x, x_row, lines, label, e, scale, target, pivot, <vec *>t.sums)
    else:
        grad_more(q, x, x_row, lines, label, e, scale, target, pivot, t.factors, grad, grad_row)
