"""Labels and soft targets of any dtype, converted to numbers in scratch, and checked."""


# ---- class labels ----------------------------------------------------------------------------------------------------

cdef inline bint load_classes(
    const label_t *y, Py_ssize_t step, Py_ssize_t n, const Problem *q, real *out
) noexcept nogil:
    """Loads n labels. Returns whether all are classes and none is ignored, the usual case."""
    cdef Py_ssize_t v
    cdef uint32_t highest = 0
    cdef uint64_t rest = 0
    cdef label_t k
    for v in range(n):
        k = y[v * step]
        highest = max(highest, <uint32_t>k)
        if label_t is uint64_t:
            rest |= k >> 32
        out[v] = <int32_t>k
    return highest < q.label_limit and rest == 0 and not (q.has_ignore and q.ignore < q.label_limit)


cdef Py_ssize_t load_any_labels(
    const label_t *y, Py_ssize_t step, Py_ssize_t n, const Problem *q, real *out, bint *ignored
) noexcept nogil:
    """Loads n labels, as -1 if ignored and -2 if out of range; sets `ignored` if there are any of these. Returns the
    number of out-of-range labels.
    """
    cdef Py_ssize_t v
    cdef label_t k
    cdef uint32_t low, high = 0, limit = q.label_limit
    cdef uint32_t ignore_low = <uint32_t>q.ignore, ignore_high = <uint32_t>(q.ignore >> 32)
    cdef bint has_ignore = q.has_ignore
    cdef int32_t c, lowest = 0, out_of_range = 0
    for v in range(n):
        k = y[v * step]
        low = <uint32_t>k
        if label_t is uint64_t:  # compilers vectorise the loop over 32-bit halves
            high = <uint32_t>(k >> 32)
        c = <int32_t>low if (low < limit) & (high == 0) else -2
        c = -1 if has_ignore & (low == ignore_low) & (high == ignore_high) else c
        lowest = min(lowest, c)
        out_of_range += c == -2
        out[v] = c
    if lowest < 0:
        ignored[0] = True
    return out_of_range


cdef Py_ssize_t load_label_row(
    const label_t *y, Py_ssize_t stride, Py_ssize_t n, const Problem *q, real *out, bint *ignored
) noexcept nogil:
    cdef Py_ssize_t step = stride // <Py_ssize_t>sizeof(label_t)
    if step == 1:  # a constant step lets the compiler vectorise the loop
        if load_classes(y, 1, n, q, out):
            return 0
    elif load_classes(y, step, n, q, out):
        return 0
    if step == 1:
        return load_any_labels(y, 1, n, q, out, ignored)
    return load_any_labels(y, step, n, q, out, ignored)


cdef Py_ssize_t load_labels(
    const char *y, Py_ssize_t stride, Py_ssize_t n, const Problem *q, real *out, bint *ignored
) noexcept nogil:
    if q.label_size == 1:
        return load_label_row(<const uint8_t *>y, stride, n, q, out, ignored)
    if q.label_size == 2:
        return load_label_row(<const uint16_t *>y, stride, n, q, out, ignored)
    if q.label_size == 4:
        return load_label_row(<const uint32_t *>y, stride, n, q, out, ignored)
    return load_label_row(<const uint64_t *>y, stride, n, q, out, ignored)


cdef Py_ssize_t load_tile_labels(
    const Problem *q, Py_ssize_t sample, Py_ssize_t first, Py_ssize_t n, char *out, bint *ignored
) noexcept nogil:
    """Loads the labels of n voxels, padded with ignored ones to whole lines. With soft targets every label is 0."""
    cdef const char *y = q.labels + sample * q.labels_n
    cdef Py_ssize_t stride = q.axes.labels[q.axes.count - 1]
    cdef Py_ssize_t v, run, done = 0, out_of_range = 0
    cdef Place at
    if q.soft_targets:
        memset(out, 0, n * q.real_size)
        done = n
    while done < n:
        at = locate(&q.axes, first + done)
        run = min(at.run, n - done)
        if q.axes.count > 1:
            prefetch(y + at.labels + q.axes.labels[q.axes.count - 2], stride, run)
        if q.real_size == sizeof(double):
            out_of_range += load_labels(y + at.labels, stride, run, q, <double *>out + done, ignored)
        else:
            out_of_range += load_labels(y + at.labels, stride, run, q, <float *>out + done, ignored)
        done += run
    for v in range(n, padded(n, q.line)):
        if q.real_size == sizeof(double):
            (<double *>out)[v] = -1
        else:
            (<float *>out)[v] = -1
    return out_of_range


# ---- soft and binary targets -----------------------------------------------------------------------------------------

cdef Py_ssize_t load_target_row(
    const target_t *y, Py_ssize_t step, Py_ssize_t n, const Problem *q, real *out
) noexcept nogil:
    """Loads n targets, as -1 if ignored or out of range. Returns the number of out-of-range targets."""
    cdef Py_ssize_t v, out_of_range = 0
    cdef double t
    for v in range(n):
        t = <double>y[v * step]
        if q.has_ignore and t == q.ignore_target:
            out[v] = -1
        elif 0 <= t <= 1 and not (q.binary_targets and 0 < t < 1):
            out[v] = <real>t
        else:
            out[v] = -1
            out_of_range += 1
    return out_of_range


cdef Py_ssize_t load_half_row(
    const char *y, Py_ssize_t stride, Py_ssize_t n, const Problem *q, real *out
) noexcept nogil:
    """`load_target_row` of float16 or bfloat16 targets."""
    cdef uint16_t halves[16]
    cdef float numbers[16]
    cdef Py_ssize_t k, width, v = 0, out_of_range = 0
    cdef f32 converted
    width = lanes(&converted)
    while v < n:
        for k in range(width):
            halves[k] = (<const uint16_t *>(y + (v + k) * stride))[0] if v + k < n else 0
        if q.target_dtype == FLOAT16:
            load(&converted, <const float16 *>halves)
        else:
            load(&converted, <const bfloat16 *>halves)
        store(numbers, converted)
        out_of_range += load_target_row(numbers, 1, min(width, n - v), q, out + v)
        v += width
    return out_of_range


cdef Py_ssize_t load_targets_as(
    const char *y, Py_ssize_t stride, Py_ssize_t n, const Problem *q, real *out
) noexcept nogil:
    if q.target_dtype == UINT8:
        return load_target_row(<const uint8_t *>y, stride, n, q, out)
    if q.target_dtype == INT8:
        return load_target_row(<const int8_t *>y, stride, n, q, out)
    if q.target_dtype == UINT16:
        return load_target_row(<const uint16_t *>y, stride // 2, n, q, out)
    if q.target_dtype == INT16:
        return load_target_row(<const int16_t *>y, stride // 2, n, q, out)
    if q.target_dtype == UINT32:
        return load_target_row(<const uint32_t *>y, stride // 4, n, q, out)
    if q.target_dtype == INT32:
        return load_target_row(<const int32_t *>y, stride // 4, n, q, out)
    if q.target_dtype == UINT64:
        return load_target_row(<const uint64_t *>y, stride // 8, n, q, out)
    if q.target_dtype == INT64:
        return load_target_row(<const int64_t *>y, stride // 8, n, q, out)
    if q.target_dtype == FLOAT32:
        return load_target_row(<const float *>y, stride // 4, n, q, out)
    if q.target_dtype == FLOAT64:
        return load_target_row(<const double *>y, stride // 8, n, q, out)
    return load_half_row(y, stride, n, q, out)


cdef Py_ssize_t load_targets(
    const Problem *q, Py_ssize_t sample, Py_ssize_t first, Py_ssize_t n, char *out
) noexcept nogil:
    """Loads the targets of n voxels into out, (classes, block), padded with ignored ones to whole lines."""
    cdef Py_ssize_t stride = q.axes.labels[q.axes.count - 1]
    cdef Py_ssize_t c, v, run, done = 0, out_of_range = 0
    cdef const char *y
    cdef Place at
    while done < n:
        at = locate(&q.axes, first + done)
        run = min(at.run, n - done)
        y = q.labels + sample * q.labels_n + at.labels
        for c in range(q.classes):
            if q.real_size == sizeof(double):
                out_of_range += load_targets_as(y + c * q.labels_c, stride, run, q, <double *>out + c * q.block + done)
            else:
                out_of_range += load_targets_as(y + c * q.labels_c, stride, run, q, <float *>out + c * q.block + done)
        done += run
    for c in range(q.classes):
        for v in range(n, padded(n, q.line)):
            if q.real_size == sizeof(double):
                (<double *>out)[c * q.block + v] = -1
            else:
                (<float *>out)[c * q.block + v] = -1
    return out_of_range
