"""One chunk: its tiles and blocks, processed in place or through scratch; and the sum of all chunks."""


cdef void run_lines(
    const Problem *q, const Scratch *t, const logit *x, Py_ssize_t x_row, Py_ssize_t lines, const vec *label,
    vec *e, logit *grad, Py_ssize_t grad_row, bint non_temporal,
) noexcept nogil:
    """Adds the sums of whole lines of voxels to t.sums, or writes their gradient."""
    if q.plain:
        run_plain(q, t, x, x_row, lines, label, e, grad, grad_row, non_temporal)
    else:
        run_general(q, t, x, x_row, lines, label, e, grad, grad_row)


cdef void run_staged(
    const Problem *q, const Scratch *t, Py_ssize_t sample, Py_ssize_t first, Py_ssize_t n, bint ignored,
    const real *label, word *words, logit *staged, vec *e,
) noexcept nogil:
    """`run_lines` through scratch: for any strides, any number of voxels, and if some are ignored.

    `words` and `staged` are the same memory.
    """
    cdef Py_ssize_t whole = padded(n, q.line)
    ignored = ignored or n < whole
    gather(q, sample, first, n, words)
    if ignored:
        clear_ignored(q, whole, label, words)
    run_lines(q, t, staged, q.block, whole // q.line, <const vec *>label, e, staged, q.block, False)
    if q.grad != NULL:
        if ignored:
            clear_ignored(q, whole, label, words)
        scatter(q, sample, first, n, words)


cdef inline void load_cotangent_row(
    const Problem *q, Py_ssize_t k, Py_ssize_t n, const double *cotangent, real *to
) noexcept nogil:
    """n numbers of the cotangent of one sum, of P times p. The row of Y, which does not depend on the logits, is the
    derivative for the probability of the voxel's own class where that is 1: the sum of those for I and P, which may be
    small beside them.
    """
    cdef Py_ssize_t i, row = q.samples * q.classes
    cdef const double *of_intersection = cotangent + q.row[INTERSECTION] * row
    cdef const double *of_pred_sum = cotangent + q.row[PRED_SUM] * row
    cdef double factor = q.p if k == PRED_SUM else 1
    if k == TARGET_SUM:
        for i in range(n):
            to[i] = <real>(of_intersection[i] + q.p * of_pred_sum[i])
    else:
        cotangent += q.row[k] * row
        for i in range(n):
            to[i] = <real>(factor * cotangent[i])


cdef void load_cotangent(const Problem *q, const double *cotangent, char *to) noexcept nogil:
    """The cotangent of one sample as (ROWS, classes) numbers, as `load_cotangent_row` defines them."""
    cdef Py_ssize_t k
    for k in range(TARGET_SQUARE):  # the last two sums do not depend on the logits
        if q.row[k] < 0:
            continue
        if q.real_size == sizeof(double):
            load_cotangent_row(q, k, q.classes, cotangent, <double *>to + k * q.classes)
        else:
            load_cotangent_row(q, k, q.classes, cotangent, <float *>to + k * q.classes)


cdef void add_lanes(const Problem *q, vec *sums, real *numbers, double *out) noexcept nogil:
    """Adds the lanes of a tile's sums to out, and clears them. `sums` and `numbers` are the same memory."""
    cdef Py_ssize_t i
    cdef int k, width = lanes(sums)
    for i in range(q.sums * q.classes):
        for k in range(width):
            if not (q.plain and TARGET_SUM * q.classes <= i < (TARGET_SUM + 1) * q.classes):
                out[i] += numbers[i * width + k]
            elif real is double:  # `count_mask` counts in integers
                out[i] += (<int64_t *>numbers)[i * width + k]
            else:
                out[i] += (<int32_t *>numbers)[i * width + k]
        set_zero(&sums[i])


cdef Py_ssize_t run_chunk(
    const Problem *q, Py_ssize_t index, const Scratch *scratch, const double *cotangent, double *sums, logit *dtype
) noexcept nogil:
    """Adds the sums of one chunk to its part of sums, or writes its gradient for the cotangent, (K, samples, classes).

    `dtype` is NULL and selects the logits' type. Returns the number of out-of-range labels.
    """
    cdef Py_ssize_t sample = index // q.chunks
    cdef Py_ssize_t first = index % q.chunks * q.chunk
    cdef Py_ssize_t stop = min(first + q.chunk, q.voxels)
    cdef Py_ssize_t n, m, done, direct, last = q.axes.count - 1, out_of_range = 0
    cdef bint ignored
    cdef Py_ssize_t x_row = q.logits_c // <Py_ssize_t>sizeof(logit)
    cdef Py_ssize_t grad_row = q.grad_c // <Py_ssize_t>sizeof(logit)
    # Without a gradient, nothing is written; its pointers then are those of the logits, whose strides it has: an offset
    # from NULL would be undefined.
    cdef char *all_grad = <char *>q.logits if q.grad == NULL else q.grad
    cdef const logit *x
    cdef logit *grad
    cdef char *label
    cdef Place at
    cdef Scratch moved = scratch[0]
    cdef const Scratch *t = &moved
    if q.grad == NULL:
        sums += index * q.sums * q.classes
    else:
        if q.plain and q.classes <= FEW_CLASSES and q.axes.count == 1:
            moved = move_scratch(q, scratch, q.grad + sample * q.grad_n + locate(&q.axes, first).grad)
        load_cotangent(q, cotangent + sample * q.classes, t.cotangent)
    while first < stop:
        n = min(TILE, stop - first)
        at = locate(&q.axes, first)
        ignored = False
        out_of_range += load_tile_labels(q, sample, first, n, t.label, &ignored)
        x = <const logit *>(q.logits + sample * q.logits_n + at.logits)
        grad = <logit *>(all_grad + sample * q.grad_n + at.grad)
        direct = 0  # how many voxels are read and written in place
        if (
            not ignored and at.run >= n and q.axes.logits[last] == sizeof(logit)
            and (q.grad == NULL or q.axes.grad[last] == sizeof(logit))
        ):
            direct = n // q.line * q.line
        done = 0
        while done < n:
            label = t.label + done * q.real_size
            m = min(q.block, (direct if done < direct else n) - done)
            if q.soft_targets:
                out_of_range += load_targets(q, sample, first + done, m, t.targets)
            if done < direct:
                if logit is double:
                    run_lines(
                        q, t, x + done, x_row, m // q.line, <f64 *>label, <f64 *>t.e, grad + done, grad_row,
                        q.non_temporal,
                    )
                else:
                    run_lines(
                        q, t, x + done, x_row, m // q.line, <f32 *>label, <f32 *>t.e, grad + done, grad_row,
                        q.non_temporal,
                    )
            else:
                if logit is double:
                    run_staged(
                        q, t, sample, first + done, m, ignored, <double *>label, <uint64_t *>t.staged,
                        <double *>t.staged, <f64 *>t.e,
                    )
                elif logit is float:
                    run_staged(
                        q, t, sample, first + done, m, ignored, <float *>label, <uint32_t *>t.staged,
                        <float *>t.staged, <f32 *>t.e,
                    )
                else:
                    run_staged(
                        q, t, sample, first + done, m, ignored, <float *>label, <uint16_t *>t.staged,
                        <logit *>t.staged, <f32 *>t.e,
                    )
            done += m
        if q.grad == NULL:
            if logit is double:
                add_lanes(q, <f64 *>t.sums, <double *>t.sums, sums)
            else:
                add_lanes(q, <f32 *>t.sums, <float *>t.sums, sums)
        first += n
    NON_TEMPORAL_FENCE()
    return out_of_range


cdef void spread_nan(const Problem *q, Py_ssize_t n, double *sums, Py_ssize_t row) noexcept nogil:
    """I and H are masked by the label, but where the probabilities are NaN, s [y=c] must be NaN for every class. Of
    K rows of n sums.
    """
    cdef Py_ssize_t i
    for i in range(n):
        sums[i] += 0 * sums[PRED_SUM * row + i]
        if q.cross_entropy:
            sums[CROSS_ENTROPY * row + i] += 0 * sums[PRED_SUM * row + i]


cdef void add_chunks(const Problem *q, const double *partial, double *out) noexcept nogil:
    """Adds (samples, chunks, K, classes) up to (K, samples, classes), in the order of the chunks."""
    cdef Py_ssize_t j, k, n, c, width = q.sums * q.classes, all_classes = q.samples * q.classes
    cdef double total
    for k in range(q.sums):
        for n in range(q.samples):
            for c in range(q.classes):
                total = 0
                for j in range(q.chunks):
                    total += partial[(n * q.chunks + j) * width + k * q.classes + c]
                out[k * all_classes + n * q.classes + c] = total
    if q.plain:
        spread_nan(q, all_classes, out, all_classes)
