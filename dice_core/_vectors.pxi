"""What the kernels do with vectors of numbers, for either type: _vectors.h in Cython's terms.

A vector is a number to Cython, which hands + - * / and functions of it on to C.
"""

from libc.stdint cimport int16_t, uint16_t, uint32_t, uint64_t

cdef extern from "_vectors.h":
    # Vectors; to Cython they are numbers, and C applies + - * / to every lane.
    ctypedef float f32 "floats"
    ctypedef double f64 "doubles"
    enum:
        VECTORS  # in a line
    const float LN2  # and the rest of it, where products are rounded
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
    void stream_floats(void *, f32) noexcept nogil
    void stream_doubles(void *, f64) noexcept nogil
    void STREAMED() noexcept nogil
    void transpose_16(const uint16_t *, Py_ssize_t, uint16_t *, Py_ssize_t) noexcept nogil
    void transpose_32(const uint32_t *, Py_ssize_t, uint32_t *, Py_ssize_t) noexcept nogil
    void transpose_64(const uint64_t *, Py_ssize_t, uint64_t *, Py_ssize_t) noexcept nogil
    f32 spread_floats(float) noexcept nogil
    f64 spread_doubles(double) noexcept nogil
    f32 max_floats(f32, f32) noexcept nogil
    f64 max_doubles(f64, f64) noexcept nogil
    f32 min_floats(f32, f32) noexcept nogil
    f64 min_doubles(f64, f64) noexcept nogil
    f32 equal_floats(f32, f32) noexcept nogil
    f64 equal_doubles(f64, f64) noexcept nogil
    f32 less_floats(f32, f32) noexcept nogil
    f64 less_doubles(f64, f64) noexcept nogil
    f32 where_floats(f32, f32) noexcept nogil
    f64 where_doubles(f64, f64) noexcept nogil
    f32 unless_floats(f32, f32) noexcept nogil
    f64 unless_doubles(f64, f64) noexcept nogil
    f32 magnitude_floats(f32) noexcept nogil
    f64 magnitude_doubles(f64) noexcept nogil
    bint any_above_floats(f32, float) noexcept nogil
    bint any_above_doubles(f64, double) noexcept nogil
    f32 exponent_floats(f32) noexcept nogil
    f64 exponent_doubles(f64) noexcept nogil
    f32 split_floats(f32, f32 *) noexcept nogil
    f64 split_doubles(f64, f64 *) noexcept nogil
    f32 tally_floats(f32, f32) noexcept nogil
    f64 tally_doubles(f64, f64) noexcept nogil

ctypedef uint16_t float16  # stored numbers; the kernels compute with float
ctypedef int16_t bfloat16

ctypedef fused vec:
    f32
    f64

ctypedef fused logit:
    float16
    bfloat16
    float
    double

ctypedef fused real:
    float
    double

ctypedef fused word:  # a stored number's bits
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


cdef inline void stream(logit *p, vec v) noexcept nogil:
    """Stores past the caches: p is a whole vector's address, and STREAMED must follow. 16-bit numbers just store."""
    if logit is double and vec is f64:
        stream_doubles(p, v)
    elif logit is float and vec is f32:
        stream_floats(p, v)
    else:
        store(p, v)


cdef inline void transpose_four(const word *source, Py_ssize_t source_row, word *to, Py_ssize_t row) noexcept nogil:
    """to[j, i] = source[i, j], four by four."""
    if word is uint16_t:
        transpose_16(source, source_row, to, row)
    elif word is uint32_t:
        transpose_32(source, source_row, to, row)
    else:
        transpose_64(source, source_row, to, row)


cdef inline int lanes(const vec *v) noexcept nogil:
    return sizeof(vec) // sizeof(double) if vec is f64 else sizeof(vec) // sizeof(float)


cdef inline void spread(vec *v, const char *table, Py_ssize_t i) noexcept nogil:
    """The i-th number of a table in every lane."""
    if vec is f64:
        v[0] = spread_doubles((<const double *>table)[i])
    else:
        v[0] = spread_floats((<const float *>table)[i])


cdef inline vec number(const vec *like, double x) noexcept nogil:
    """The number in every lane."""
    if vec is f64:
        return spread_doubles(x)
    else:
        return spread_floats(<float>x)


cdef inline vec maximum(vec a, vec b) noexcept nogil:
    """The larger; b if either is NaN."""
    if vec is f64:
        return max_doubles(a, b)
    else:
        return max_floats(a, b)


cdef inline vec minimum(vec a, vec b) noexcept nogil:
    """The smaller; b if either is NaN."""
    if vec is f64:
        return min_doubles(a, b)
    else:
        return min_floats(a, b)


cdef inline vec equal(vec a, vec b) noexcept nogil:
    if vec is f64:
        return equal_doubles(a, b)
    else:
        return equal_floats(a, b)


cdef inline vec less(vec a, vec b) noexcept nogil:
    if vec is f64:
        return less_doubles(a, b)
    else:
        return less_floats(a, b)


cdef inline vec where(vec mask, vec v) noexcept nogil:
    """v where the mask is set, else 0."""
    if vec is f64:
        return where_doubles(mask, v)
    else:
        return where_floats(mask, v)


cdef inline vec unless(vec mask, vec v) noexcept nogil:
    """0 where the mask is set, else v."""
    if vec is f64:
        return unless_doubles(mask, v)
    else:
        return unless_floats(mask, v)


cdef inline vec exponent(vec t) noexcept nogil:
    """The lowest bits of the significand as exponent bits."""
    if vec is f64:
        return exponent_doubles(t)
    else:
        return exponent_floats(t)


cdef inline vec tally(vec count, vec mask) noexcept nogil:
    """The count, an integer in a vector's bits, plus one where the mask is set."""
    if vec is f64:
        return tally_doubles(count, mask)
    else:
        return tally_floats(count, mask)


cdef inline vec magnitude(vec v) noexcept nogil:
    if vec is f64:
        return magnitude_doubles(v)
    else:
        return magnitude_floats(v)


cdef inline bint any_above(vec a, double bound) noexcept nogil:
    """Whether any lane is above the bound or NaN."""
    if vec is f64:
        return any_above_doubles(a, bound)
    else:
        return any_above_floats(a, <float>bound)


cdef inline void largest(vec *v) noexcept nogil:
    if vec is f64:
        v[0] = spread_doubles(1.7976931348623157e308)
    else:
        v[0] = spread_floats(<float>3.4028234663852886e38)


cdef inline void zero(vec *v) noexcept nogil:
    if vec is f64:
        v[0] = spread_doubles(0)
    else:
        v[0] = spread_floats(0)


cdef inline void lowest_exp(vec *v) noexcept nogil:
    """Just small enough for exp to be 0."""
    if vec is f64:
        v[0] = spread_doubles(-709.0895657128241)
    else:
        v[0] = spread_floats(<float>-88.02969)


cdef inline vec exp(vec x) noexcept nogil:
    """exp(x), x from -88.02 to 88 (float64: -709.08 to 709); 0 where that is below the smallest normal number.

    2^n e^r with |r| <= ln(2)/2, within 5.5 ulp, 2.5 where x > -10 (float64: 1.2).
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
    """log(x) of normal numbers, within 2 ulp however near to 1 as long as `rest`, 1 - x, is exact."""
    cdef vec n, m, r, f, w, y, near
    if vec is f64:
        n = split_doubles(x, &m)
    else:
        n = split_floats(x, &m)
    near = equal(n, n - n)
    r = unless(near, m - 1) - where(near, rest)  # of x = (1 + r) 2^n
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
    """log(1 + e), e from 0 to 1, within 2 ulp."""
    cdef vec y
    if vec is f64:
        return log(e + 1.0, e - e - e)
    else:
        y = e * <float>-0.00324400025 + <float>0.0198513493
        y = y * e - <float>0.0569593236
        y = y * e + <float>0.106036335
        y = y * e - <float>0.153055802
        y = y * e + <float>0.196759343
        y = y * e - <float>0.249541327
        y = y * e + <float>0.333299637
        y = y * e - <float>0.499999017
        return (y * e + <float>1.0) * e


cdef vec power(vec s, Py_ssize_t p) noexcept nogil:
    """s**p for p >= 1, by repeated squaring."""
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
