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
    cdef double num, den, score_num, score, rest, share, slope, loss = r.start
    for n in range(rows):
        if r.per_sample:
            loss = r.start
        for c in range(classes):
            at = n * classes + c
            num, score_num, den = r.excess, r.smooth - r.excess, r.smooth
            for k in range(3):
                total[k] = 0
                for m in range(pooled):
                    total[k] += inout[k * row + at + m * classes]
                num += r.num[k] * total[k]
                score_num += (r.den[k] - r.num[k]) * total[k]
                den += r.den[k] * total[k]
            share = score = rest = 0  # of a class that is left out, and of 0/0, which is a perfect score
            if c == r.ignore_channel or den == 0:
                den = 1
            else:
                share = r.share * (1 if weight == NULL else weight[c])
                score = score_num / den
                rest = num / den
                loss += share * rest
            for k in range(3):
                # From the score or 1 minus it, whichever is small: both are computed from the sums.
                slope = score * r.den[k] - (r.den[k] - r.num[k]) if score < 0.5 else r.num[k] - rest * r.den[k]
                for m in range(pooled):
                    # Divided last, since share / den may overflow where the derivative is 0.
                    inout[k * row + at + m * classes] = share * slope / den
        if r.per_sample:
            value[n] = <real>loss
    if not r.per_sample:
        value[0] = <real>loss
    memset(inout + 3 * row, 0, (sums - 3) * row * sizeof(double))
