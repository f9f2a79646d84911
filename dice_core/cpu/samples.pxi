"""Samples of few voxels, such as logits (N, C): the lanes of a vector are samples, the same voxel of each.

This is the common case, `Problem.plain`, without B+ and B-, of fewer voxels than a line has lanes and at least as many
samples. The work item of a thread is a block of samples, whose voxels are processed one after another through scratch.
"""


cdef inline void copy_samples(
    Py_ssize_t itemsize, const char *source, Py_ssize_t source_step, Py_ssize_t source_row, char *to, Py_ssize_t step,
    Py_ssize_t row, Py_ssize_t n, Py_ssize_t channels,
) noexcept nogil:
    """`copy_block` of numbers of any size; steps and rows are in bytes."""
    if itemsize == 2:
        copy_block(
            <const uint16_t *>source, source_step // 2, source_row // 2, <uint16_t *>to, step // 2, row // 2,
            n, channels,
        )
    elif itemsize == 4:
        copy_block(
            <const uint32_t *>source, source_step // 4, source_row // 4, <uint32_t *>to, step // 4, row // 4,
            n, channels,
        )
    else:
        copy_block(
            <const uint64_t *>source, source_step // 8, source_row // 8, <uint64_t *>to, step // 8, row // 8,
            n, channels,
        )


cdef inline void clear_samples(const Problem *q, const Scratch *t, Py_ssize_t whole) noexcept nogil:
    """`clear_ignored` of whole lines of samples."""
    if q.itemsize == 2:
        clear_ignored(q, whole, <float *>t.label, <uint16_t *>t.staged)
    elif q.itemsize == 4:
        clear_ignored(q, whole, <float *>t.label, <uint32_t *>t.staged)
    else:
        clear_ignored(q, whole, <double *>t.label, <uint64_t *>t.staged)


cdef Py_ssize_t load_sample_labels(
    const Problem *q, const char *y, Py_ssize_t n, real *out, bint *ignored
) noexcept nogil:
    """Loads the labels of n samples, padded with ignored ones to whole lines. Returns how many are out of range."""
    cdef Py_ssize_t i, out_of_range = load_labels(y, q.labels_n, n, q, out, ignored)
    for i in range(n, padded(n, q.line)):
        out[i] = -1
        ignored[0] = True
    return out_of_range


cdef void load_cotangents(
    const Problem *q, Py_ssize_t n, const double *cotangent, real *numbers, real *to
) noexcept nogil:
    """`load_cotangent` of n samples, as (4, classes, block) numbers, via `numbers`, (n, classes)."""
    cdef Py_ssize_t k, c, i
    for k in range(NLL):
        if q.row[k] < 0:
            continue
        load_cotangent_row(q, k, n * q.classes, cotangent, numbers)
        for i in range(n):
            for c in range(q.classes):
                to[c * q.block + i] = numbers[i * q.classes + c]
        to += q.classes * q.block


cdef void raise_probabilities(
    const Problem *q, Py_ssize_t lines, const vec *label, vec *e, vec *scale
) noexcept nogil:
    """Replaces e by the p-th powers of the probabilities, and scale by the probability of the voxel's own class."""
    cdef vec s, own, which
    cdef Py_ssize_t c, i, e_row = q.block // lanes(&s)
    for i in range(lines * VECTORS):
        set_zero(&own)
        set_zero(&which)
        for c in range(q.classes):
            s = e[c * e_row + i] * scale[i]
            own = add_where(equal(label[i], which), own, s)
            e[c * e_row + i] = power(s, q.p)
            which = which + 1
        scale[i] = own


cdef void run_sample_lines(
    const Problem *q, const Scratch *t, logit *x, Py_ssize_t lines, const vec *label, vec *e
) noexcept nogil:
    """Prepares `add_samples` of one voxel of whole lines of samples, or replaces its logits x by their gradient."""
    cdef vec *scale = <vec *>t.scale
    cdef vec *nll = <vec *>t.nll
    if q.cross_entropy and (q.grad == NULL or q.focal):
        run_softmax_and_nll(q, t, x, q.block, lines, label, e, scale)
    else:
        run_softmax(q, x, q.block, lines, label, e, scale)
    if q.grad == NULL:
        raise_probabilities(q, lines, label, e, scale)
    elif q.cross_entropy:
        if q.p == 1:
            grad_lines(q, lines, label, e, scale, nll, nll, t.cotangent, x, q.block, 1, True, False, False, True)
        else:
            grad_lines(q, lines, label, e, scale, nll, nll, t.cotangent, x, q.block, q.p, True, False, False, True)
    elif q.p == 1:
        grad_lines(q, lines, label, e, scale, nll, nll, t.cotangent, x, q.block, 1, False, False, False, True)
    else:
        grad_lines(q, lines, label, e, scale, nll, nll, t.cotangent, x, q.block, q.p, False, False, False, True)


cdef void add_samples(
    const Problem *q, Py_ssize_t n, bint first, const real *label, const real *powers, const real *own, const real *nll,
    double *sums, Py_ssize_t row,
) noexcept nogil:
    """Adds one voxel of n samples to their sums, K rows (n, classes), which `first` clears before."""
    cdef Py_ssize_t i, k, c, at
    cdef double *pred_sum = sums + PRED_SUM * row
    if first:
        for k in range(q.sums):
            memset(sums + k * row, 0, n * q.classes * sizeof(double))
    for i in range(n):
        for c in range(q.classes):
            pred_sum[c] += powers[c * q.block + i]
        pred_sum += q.classes
        if label[i] >= 0:
            at = i * q.classes + <Py_ssize_t>label[i]
            sums[INTERSECTION * row + at] += own[i]
            sums[TARGET_SUM * row + at] += 1
            if q.cross_entropy:
                sums[CROSS_ENTROPY * row + at] += nll[i]


cdef Py_ssize_t run_samples(
    const Problem *q, Py_ssize_t first, const Scratch *t, const double *cotangent, double *sums,
    Py_ssize_t sums_row, logit *x
) noexcept nogil:
    """Sets the sums of the block of samples from `first`, K rows (n, classes), or writes its gradient for the
    cotangent, (K, samples, classes). x is the scratch for logits and gradient. Returns the number of out-of-range
    labels.
    """
    cdef Py_ssize_t n = min(q.block, q.samples - first), whole = padded(n, q.line)
    cdef Py_ssize_t v, row = q.block * sizeof(logit), out_of_range = 0
    cdef bint ignored
    cdef const char *y
    cdef Place at
    if q.grad != NULL:
        if logit is double:
            load_cotangents(q, n, cotangent + first * q.classes, <double *>t.e, <double *>t.cotangent)
        else:
            load_cotangents(q, n, cotangent + first * q.classes, <float *>t.e, <float *>t.cotangent)
    for v in range(q.voxels):
        at = locate(&q.axes, v)
        y = q.labels + first * q.labels_n + at.labels
        ignored = False
        if logit is double:
            out_of_range += load_sample_labels(q, y, n, <double *>t.label, &ignored)
        else:
            out_of_range += load_sample_labels(q, y, n, <float *>t.label, &ignored)
        copy_samples(
            sizeof(logit), q.logits + first * q.logits_n + at.logits, q.logits_n, q.logits_c,
            t.staged, sizeof(logit), row, n, q.channels,
        )
        if ignored:
            clear_samples(q, t, whole)
        if logit is double:
            run_sample_lines(q, t, x, whole // q.line, <f64 *>t.label, <f64 *>t.e)
            if q.grad == NULL:
                add_samples(
                    q, n, v == 0, <double *>t.label, <double *>t.e, <double *>t.scale, <double *>t.nll,
                    sums, sums_row,
                )
        else:
            run_sample_lines(q, t, x, whole // q.line, <f32 *>t.label, <f32 *>t.e)
            if q.grad == NULL:
                add_samples(
                    q, n, v == 0, <float *>t.label, <float *>t.e, <float *>t.scale, <float *>t.nll,
                    sums, sums_row,
                )
        if q.grad != NULL:
            if ignored:
                clear_samples(q, t, whole)
            copy_samples(
                sizeof(logit), t.staged, sizeof(logit), row, q.grad + first * q.grad_n + at.grad, q.grad_n, q.grad_c,
                n, q.channels,
            )
    if q.grad == NULL:
        spread_nan(q, n * q.classes, sums, sums_row)
    return out_of_range
