"""SIMD vectors: loads and stores, masks, exp and log; the Cython interface to `simd.h`.

To Cython a vector is a number: it passes + - * / on to C, which applies them to every lane. A mask is set in the lanes
where a condition holds.
"""

from libc.stdint cimport int16_t, uint16_t, uint32_t, uint64_t

cdef extern from "simd.h":
    ctypedef float f32 "floats"
    ctypedef double f64 "doubles"
    ctypedef int mask_t
    enum:
        VECTORS  # in 64 bytes
        HAS_NON_TEMPORAL
    const float LN2  # ln(2) = LN2 + LN2_REST
    const float LN2_REST

    void PREFETCH(const void *) noexcept nogil
    f32 load_f16(const void *) noexcept nogil
    f32 load_bf16(const void *) noexcept nogil
    f32 load_floats(const void *) noexcept nogil
    f64 load_doubles(const void *) noexcept nogil
    void store_f16(void *, f32) noexcept nogil
    void store_bf16(void *, f32) noexcept nogil
    void store_floats(void *, f32) noexcept nogil
    void store_doubles(void *, f64) noexcept nogil
    void store_non_temporal_floats(void *, f32) noexcept nogil
    void store_non_temporal_doubles(void *, f64) noexcept nogil
    void NON_TEMPORAL_FENCE() noexcept nogil
    void transpose_16(const uint16_t *, Py_ssize_t, uint16_t *, Py_ssize_t) noexcept nogil
    void transpose_32(const uint32_t *, Py_ssize_t, uint32_t *, Py_ssize_t) noexcept nogil
    void transpose_64(const uint64_t *, Py_ssize_t, uint64_t *, Py_ssize_t) noexcept nogil
    f32 broadcast_floats(float) noexcept nogil
    f64 broadcast_doubles(double) noexcept nogil
    f32 max_floats(f32, f32) noexcept nogil
    f64 max_doubles(f64, f64) noexcept nogil
    f32 min_floats(f32, f32) noexcept nogil
    f64 min_doubles(f64, f64) noexcept nogil
    mask_t equal_floats(f32, f32) noexcept nogil
    mask_t equal_doubles(f64, f64) noexcept nogil
    mask_t less_floats(f32, f32) noexcept nogil
    mask_t less_doubles(f64, f64) noexcept nogil
    f32 and_mask_floats(mask_t, f32) noexcept nogil
    f64 and_mask_doubles(mask_t, f64) noexcept nogil
    f32 andnot_floats(mask_t, f32) noexcept nogil
    f64 andnot_doubles(mask_t, f64) noexcept nogil
    f32 select_floats(mask_t, f32, f32) noexcept nogil
    f64 select_doubles(mask_t, f64, f64) noexcept nogil
    f32 abs_floats(f32) noexcept nogil
    f64 abs_doubles(f64) noexcept nogil
    bint any_greater_floats(f32, float) noexcept nogil
    bint any_greater_doubles(f64, double) noexcept nogil
    f32 exponent_floats(f32) noexcept nogil
    f64 exponent_doubles(f64) noexcept nogil
    f32 split_floats(f32, f32 *) noexcept nogil
    f64 split_doubles(f64, f64 *) noexcept nogil
    f32 add_where_floats(f32, mask_t, f32) noexcept nogil
    f64 add_where_doubles(f64, mask_t, f64) noexcept nogil
    f32 count_floats(f32, mask_t) noexcept nogil
    f64 count_doubles(f64, mask_t) noexcept nogil

ctypedef uint16_t float16  # as stored; two distinct types, so that functions can be specialised for them
ctypedef int16_t bfloat16

ctypedef fused vec:
    f32
    f64

ctypedef fused logit:  # the dtype of the logits
    float16
    bfloat16
    float
    double

ctypedef fused real:  # a lane of a vector
    float
    double

ctypedef fused word:  # the bits of a stored number
    uint16_t
    uint32_t
    uint64_t


cdef inline void load(vec *v, const logit *p) noexcept nogil:
    if vec is f64:
        v[0] = load_doubles(p)
    elif logit is float16:
        v[0] = load_f16(p)
    elif logit is bfloat16:
        v[0] = load_bf16(p)
    else:
        v[0] = load_floats(p)


cdef inline void store(logit *p, vec v) noexcept nogil:
    if vec is f64:
        store_doubles(p, v)
    elif logit is float16:
        store_f16(p, v)
    elif logit is bfloat16:
        store_bf16(p, v)
    else:
        store_floats(p, v)


cdef inline void store_non_temporal(logit *p, vec v) noexcept nogil:
    """Non-temporal store: p must be a multiple of the vector's size, and NON_TEMPORAL_FENCE must follow. 16-bit
    numbers, half a vector, are stored normally.
    """
    if logit is double and vec is f64:
        store_non_temporal_doubles(p, v)
    elif logit is float and vec is f32:
        store_non_temporal_floats(p, v)
    else:
        store(p, v)


cdef inline void transpose_four(const word *source, Py_ssize_t source_row, word *to, Py_ssize_t row) noexcept nogil:
    """to[j, i] = source[i, j] for four rows and columns."""
    if word is uint16_t:
        transpose_16(source, source_row, to, row)
    elif word is uint32_t:
        transpose_32(source, source_row, to, row)
    else:
        transpose_64(source, source_row, to, row)


cdef inline int lanes(const vec *v) noexcept nogil:
    return sizeof(vec) // sizeof(double) if vec is f64 else sizeof(vec) // sizeof(float)


cdef inline void broadcast(vec *v, const char *table, Py_ssize_t i) noexcept nogil:
    """v = table[i] in every lane; the table has the type of a lane."""
    if vec is f64:
        v[0] = broadcast_doubles((<const double *>table)[i])
    else:
        v[0] = broadcast_floats((<const float *>table)[i])


cdef inline vec constant(const vec *like, double x) noexcept nogil:
    """x in every lane of a vector like this."""
    if vec is f64:
        return broadcast_doubles(x)
    else:
        return broadcast_floats(<float>x)


cdef inline vec maximum(vec a, vec b) noexcept nogil:
    """The larger; b if either is NaN, like the instruction."""
    if vec is f64:
        return max_doubles(a, b)
    else:
        return max_floats(a, b)


cdef inline vec minimum(vec a, vec b) noexcept nogil:
    """The smaller; b if either is NaN, like the instruction."""
    if vec is f64:
        return min_doubles(a, b)
    else:
        return min_floats(a, b)


cdef inline mask_t equal(vec a, vec b) noexcept nogil:
    if vec is f64:
        return equal_doubles(a, b)
    else:
        return equal_floats(a, b)


cdef inline mask_t less(vec a, vec b) noexcept nogil:
    if vec is f64:
        return less_doubles(a, b)
    else:
        return less_floats(a, b)


cdef inline vec and_mask(mask_t mask, vec v) noexcept nogil:
    """v where the mask is set, else 0 (even if v is NaN)."""
    if vec is f64:
        return and_mask_doubles(mask, v)
    else:
        return and_mask_floats(mask, v)


cdef inline vec andnot(mask_t mask, vec v) noexcept nogil:
    """0 where the mask is set (even if v is NaN), else v."""
    if vec is f64:
        return andnot_doubles(mask, v)
    else:
        return andnot_floats(mask, v)


cdef inline vec select(mask_t mask, vec a, vec b) noexcept nogil:
    """a where the mask is set, else b."""
    if vec is f64:
        return select_doubles(mask, a, b)
    else:
        return select_floats(mask, a, b)


cdef inline vec add_where(mask_t mask, vec total, vec v) noexcept nogil:
    """total + v where the mask is set, else total (even if v is NaN)."""
    if vec is f64:
        return add_where_doubles(total, mask, v)
    else:
        return add_where_floats(total, mask, v)


cdef inline vec exponent(vec t) noexcept nogil:
    """The lowest bits of the significand, moved to the exponent field."""
    if vec is f64:
        return exponent_doubles(t)
    else:
        return exponent_floats(t)


cdef inline vec count_mask(vec count, mask_t mask) noexcept nogil:
    """count + 1 where the mask is set; the lanes of count are integers."""
    if vec is f64:
        return count_doubles(count, mask)
    else:
        return count_floats(count, mask)


cdef inline vec abs(vec v) noexcept nogil:
    if vec is f64:
        return abs_doubles(v)
    else:
        return abs_floats(v)


cdef inline bint any_greater(vec a, double bound) noexcept nogil:
    """Whether any lane is greater than the bound, or NaN."""
    if vec is f64:
        return any_greater_doubles(a, bound)
    else:
        return any_greater_floats(a, <float>bound)


cdef inline void set_largest(vec *v) noexcept nogil:
    """The largest finite number."""
    if vec is f64:
        v[0] = broadcast_doubles(1.7976931348623157e308)
    else:
        v[0] = broadcast_floats(<float>3.4028234663852886e38)


cdef inline void set_zero(vec *v) noexcept nogil:
    if vec is f64:
        v[0] = broadcast_doubles(0)
    else:
        v[0] = broadcast_floats(0)


cdef inline void set_lowest_exp(vec *v) noexcept nogil:
    """The lower limit of exp's argument, just small enough for the result to be 0."""
    if vec is f64:
        v[0] = broadcast_doubles(-709.0895657128241)
    else:
        v[0] = broadcast_floats(<float>-88.02969)


cdef inline vec exp(vec x) noexcept nogil:
    """exp(x) for -88.03 <= x <= 88 (float64: -709.09 to 709); 0 where that is below the smallest normal number.

    2^n e^r with n = round(x / ln 2), hence |r| <= ln(2)/2, and a minimax polynomial for e^r: within 5.5 ulp, 2.5
    for x > -10 (float64: 1.2). Adding 1.5 * 2^23 (2^52) plus the exponent's bias rounds to n and leaves n + bias in the
    lowest bits, from which `exponent` makes 2^n.
    """
    cdef vec n, r, y
    if vec is f64:
        y = x * 1.4426950408889634 + 6755399441056767.0
        n = y - 6755399441056767.0
        r = (x - n * 0.6931467056274414) - n * 4.7493250390316726e-07
        x = 2.51003854955103191e-8 * r + 2.76200884454097482e-7
        x = x * r + 2.75572684599970648e-6
        x = x * r + 2.48015212959543751e-5
        x = x * r + 1.98412698630536169e-4
        x = x * r + 1.38888889172137169e-3
        x = x * r + 8.33333333333006183e-3
        x = x * r + 4.16666666666241279e-2
        x = x * r + 0.166666666666666675
        x = x * r + 0.5
        x = (x * (r * r) + r) + 1.0
    else:
        y = x * <float>1.4426950408889634 + <float>12583039.0
        n = y - <float>12583039.0
        r = x - n * LN2
        if LN2_REST != 0:
            r = r - n * LN2_REST
        x = <float>0.008290297351777554 * r + <float>0.041898030787706375
        x = x * r + <float>0.1666763722896576
        x = x * r + <float>0.4999914765357971
        x = x * r + <float>0.9999997019767761
        x = x * r + <float>1.0
    return x * exponent(y)


cdef inline vec log(vec x, vec rest) noexcept nogil:
    """log(x) of positive normal numbers within 2 ulp, near 1 too, provided that `rest` is 1 - x before rounding.

    NaN gives an arbitrary number.
    """
    cdef vec n, m, r, f, w, y
    cdef mask_t near
    if vec is f64:
        n = split_doubles(x, &m)
    else:
        n = split_floats(x, &m)
    near = equal(n, n - n)
    r = andnot(near, m - 1) - and_mask(near, rest)  # x = (1 + r) 2^n
    if vec is f64:
        f = r / (r + 2)  # log(1 + r) = 2 artanh(f)
        w = f * f
        y = w * (1.0 / 21) + 1.0 / 19
        y = y * w + 1.0 / 17
        y = y * w + 1.0 / 15
        y = y * w + 1.0 / 13
        y = y * w + 1.0 / 11
        y = y * w + 1.0 / 9
        y = y * w + 1.0 / 7
        y = y * w + 1.0 / 5
        y = y * w + 1.0 / 3
        y = n * 4.7493250390316726e-07 + (f + f) * (y * w)
        return n * 0.6931467056274414 + ((f + f) + y)
    else:
        y = r * <float>0.0870037079 - <float>0.142674923
        y = y * r + <float>0.149147913
        y = y * r - <float>0.165775836
        y = y * r + <float>0.199630618
        y = y * r - <float>0.250013381
        y = y * r + <float>0.333339095
        y = n * LN2_REST + (r * r) * (y * r - <float>0.5)
        return n * LN2 + (r + y)


cdef inline vec log_of_sum(vec e) noexcept nogil:
    """log(1 + e) for 0 <= e <= 1, within 2 ulp."""
    cdef vec v, w, y
    if vec is f64:
        return log(e + 1.0, e - e - e)
    else:
        w = e * e  # even and odd powers apart: that halves the latency
        y = w * <float>-0.00324400025 - <float>0.0569593236
        y = y * w - <float>0.153055802
        y = y * w - <float>0.249541327
        y = y * w - <float>0.499999017
        v = w * <float>0.0198513493 + <float>0.106036335
        v = v * w + <float>0.196759343
        v = v * w + <float>0.333299637
        y = v * e + y
        return (y * e + <float>1.0) * e


cdef inline vec power(vec s, Py_ssize_t p) noexcept nogil:
    """s**p for p >= 1."""
    if p == 1:
        return s
    return s * s if p == 2 else power_by_squaring(s, p)


cdef vec power_by_squaring(vec s, Py_ssize_t p) noexcept nogil:
    """s**p for p >= 1."""
    cdef vec y
    while p & 1 == 0:
        s = s * s
        p >>= 1
    y = s
    p >>= 1
    while p:
        s = s * s
        if p & 1:
            y = y * s
        p >>= 1
    return y
