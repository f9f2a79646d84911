"""The loss that is a ratio of linear functions of the sums, a `losses.Ratio`, and its derivative for them."""

cdef enum:
    PIECE = 64  # ratios at a time


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


cdef void pool_samples(double *sums, Py_ssize_t samples, Py_ssize_t classes) noexcept nogil:
    """Adds the sums of all samples to those of the first."""
    cdef Py_ssize_t n, c
    for n in range(1, samples):
        for c in range(classes):
            sums[c] += sums[n * classes + c]


cdef void repeat_sample(double *derivative, Py_ssize_t samples, Py_ssize_t classes) noexcept nogil:
    """Copies the first sample's derivative to all others, in ever longer pieces."""
    cdef Py_ssize_t n, done = 1
    while done < samples:
        n = min(done, samples - done, max(1, PIECE * PIECE // classes))
        memcpy(derivative + done * classes, derivative, n * classes * sizeof(double))
        done += n


cdef inline void ratios(
    const Ratio *r, Py_ssize_t n, const double *share, double **at, double *loss, bint derivative
) noexcept nogil:
    """Fills loss, the parts of the loss of n sums I, P and Y, for their shares of it, and replaces the sums by the
    derivative if requested, a compile-time constant. Whole vectors are read and written.
    """
    cdef f64 num, den, of_score, quotient, part, zero, factor
    cdef mask_t none, low
    cdef f64 sums[3]
    cdef Py_ssize_t first = 0
    cdef int k
    set_zero(&zero)
    while first < n:
        num, of_score, den = zero + r.excess, zero + (r.smooth - r.excess), zero + r.smooth
        for k in range(3):
            load(&sums[k], at[k] + first)
            num = num + sums[k] * r.num[k]
            of_score = of_score + sums[k] * (r.den[k] - r.num[k])
            den = den + sums[k] * r.den[k]
        load(&part, share + first)
        none = equal(den, zero)  # 0/0 is a perfect score
        part = andnot(none, part)
        den = select(none, zero + 1, den)
        # The score or 1 minus it, whichever is small: both are computed from the sums.
        quotient = of_score / den
        low = less(quotient, zero + 0.5)
        quotient = select(low, quotient, num / den)
        store(loss + first, part * select(low, 1 - quotient, quotient))
        if derivative:
            factor = part / den
            for k in range(3):
                num = select(low, quotient * r.den[k] - (r.den[k] - r.num[k]), r.num[k] - quotient * r.den[k])
                # The factor may overflow where the derivative is 0.
                num = part * num / den if any_greater(abs(factor), 1e300) else num * factor
                store(at[k] + first, num)
        first += lanes(&den)


cdef void run_ratio(
    const Ratio *r, const double *weight, Py_ssize_t samples, Py_ssize_t classes, Py_ssize_t row, double *inout,
    double *parts, bint derivative
) noexcept nogil:
    """Fills parts, (samples,), with the parts of the loss of sums, rows (samples, classes) of I, P and Y; if requested,
    replaces the sums by the derivative. Without a row, the sums are 0.
    """
    cdef Py_ssize_t first = 0, n, i, k, sample = 0, c = 0, of_share = 0
    cdef double[PIECE] share
    cdef double[PIECE] part
    cdef double[3][PIECE] piece
    cdef double *at[3]
    cdef double total = 0
    cdef bint whole
    while first < samples * classes:
        n = min(PIECE, samples * classes - first)
        whole = n == PIECE and row > 0
        if not whole:
            memset(&piece[0][0], 0, 3 * PIECE * sizeof(double))
        for k in range(3):
            at[k] = inout + k * row + first if whole else &piece[k][0]
            if not whole and row > 0:
                memcpy(at[k], inout + k * row + first, n * sizeof(double))
        if first == 0 or weight != NULL:
            for i in range(PIECE):
                share[i] = r.share * (1 if weight == NULL else weight[of_share])
                of_share = of_share + 1 if of_share + 1 < classes else 0
        if derivative:
            ratios(r, n, share, at, part, True)
        else:
            ratios(r, n, share, at, part, False)
        for i in range(n):
            if c == r.ignore_channel:
                for k in range(3):
                    at[k][i] = 0
            else:
                total += part[i]
            c += 1
            if c == classes:
                parts[sample] = total
                sample += 1
                c = 0
                total = 0
        for k in range(3):
            if not whole and row > 0:
                memcpy(inout + k * row + first, at[k], n * sizeof(double))
        first += n


cdef void finish_ratio(
    const Ratio *r, Py_ssize_t samples, const double *parts, real *value
) noexcept nogil:
    """Fills value, one number or one per sample, from the samples' parts of it."""
    cdef double loss = r.start
    cdef Py_ssize_t n
    for n in range(samples):
        if r.per_sample:
            value[n] = <real>(r.start + parts[n])
        else:
            loss += parts[n]
    if not r.per_sample:
        value[0] = <real>loss
