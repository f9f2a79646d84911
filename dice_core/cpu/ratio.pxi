"""The loss that is a ratio of linear functions of the sums, a `losses.Ratio`, and its derivative for them."""


cdef struct Ratio:
    bint pooled, per_sample
    Py_ssize_t ignore_channel
    double share, start, excess, smooth
    double[3] num
    double[3] den


cdef Ratio read_ratio(ratio):
    cdef Ratio r
    cdef int k
    r.pooled, r.per_sample, r.ignore_channel, r.share, r.start, r.excess, r.smooth, num, den = ratio
    for k in range(3):
        r.num[k] = num[k]
        r.den[k] = den[k]
    return r


cdef void run_ratio(
    const Ratio *r, const double *weight, Py_ssize_t sums, Py_ssize_t samples, Py_ssize_t classes, double *inout,
    real *value
) noexcept nogil:
    """Replaces sums (sums, samples, classes) by the derivative, and fills value, one number or one per sample."""
    cdef Py_ssize_t row = samples * classes
    cdef Py_ssize_t pooled = samples if r.pooled else 1, rows = 1 if r.pooled else samples
    cdef Py_ssize_t n, m, c, k, at
    cdef double[3] total
    cdef double num, den, quotient, slope, loss = r.start
    for n in range(rows):
        if r.per_sample:
            loss = r.start
        for c in range(classes):
            at = n * classes + c
            num, den = r.excess, r.smooth
            for k in range(3):
                total[k] = 0
                for m in range(pooled):
                    total[k] += inout[k * row + at + m * classes]
                num += r.num[k] * total[k]
                den += r.den[k] * total[k]
            quotient = slope = 0  # of a class that is left out, and of 0/0, which is a perfect score
            if c != r.ignore_channel and den != 0:
                slope = r.share * (1 if weight == NULL else weight[c])
                quotient = num / den
                loss += slope * quotient
                slope /= den
            for k in range(3):
                for m in range(pooled):
                    inout[k * row + at + m * classes] = (r.num[k] - quotient * r.den[k]) * slope
        if r.per_sample:
            value[n] = <real>loss
    if not r.per_sample:
        value[0] = <real>loss
    memset(inout + 3 * row, 0, (sums - 3) * row * sizeof(double))
