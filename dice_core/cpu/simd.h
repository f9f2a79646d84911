/* The SIMD vectors of the kernels: `floats` and `doubles`, GCC vector types of 64, 32 or 16 bytes, whichever the
   instruction set compiled for has, or scalars if the compiler has no vector types. C applies + - * / to them lane
   by lane; the functions here do the rest. A mask has one lane for each of a vector's: with AVX-512 a bit, otherwise
   all bits, of which all are set or none. */
#ifndef DICE_SIMD_H
#define DICE_SIMD_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#if (defined(__GNUC__) || defined(__clang__)) && !defined(DICE_SINGLE_LANES)
#define INLINE static inline __attribute__((always_inline, unused))
#define PREFETCH(p) __builtin_prefetch(p)
#define UNLIKELY(condition) __builtin_expect(condition, 0)
#define MASK(condition) (condition)
#define CONVERT(v, type) __builtin_convertvector(v, type)
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#define BYTES 64
#define SIMD(op) _mm512_##op
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define BYTES 32
#define SIMD(op) _mm256_##op
#else
#define BYTES 16
#if defined(__x86_64__)
#define SIMD(op) _mm_##op
#endif
#endif
typedef float floats __attribute__((vector_size(BYTES)));
typedef int32_t ints __attribute__((vector_size(BYTES)));
typedef uint32_t words __attribute__((vector_size(BYTES)));
typedef uint16_t halves __attribute__((vector_size(BYTES / 2)));
typedef double doubles __attribute__((vector_size(BYTES)));
typedef int64_t longs __attribute__((vector_size(BYTES)));
typedef uint64_t longwords __attribute__((vector_size(BYTES)));
enum { VECTORS = 64 / BYTES }; /* in 64 bytes */
#else
#define INLINE static inline
#define PREFETCH(p) ((void)(p))
#define UNLIKELY(condition) (condition)
#define MASK(condition) (-(condition))
#define CONVERT(v, type) ((type)(v))
typedef float floats;
typedef int32_t ints;
typedef uint32_t words;
typedef uint16_t halves;
typedef double doubles;
typedef int64_t longs;
typedef uint64_t longwords;
enum { VECTORS = 4 };
#endif

/* ln(2) in two parts for the range reduction of exp (Cody and Waite, Software Manual for the Elementary Functions,
   1980): n * LN2 is exact for |n| < 512. A fused multiply-add does not round the product; there one part is enough. */
#if defined(__FMA__) || defined(__aarch64__)
#define LN2 0.693147182f
#define LN2_REST 0.0f
#else
#define LN2 0.693115234375f
#define LN2_REST 3.1946183e-05f
#endif

#if defined(SIMD)
INLINE floats max_floats(floats a, floats b) { return (floats)SIMD(max_ps)(a, b); }
INLINE floats min_floats(floats a, floats b) { return (floats)SIMD(min_ps)(a, b); }
INLINE doubles max_doubles(doubles a, doubles b) { return (doubles)SIMD(max_pd)(a, b); }
INLINE doubles min_doubles(doubles a, doubles b) { return (doubles)SIMD(min_pd)(a, b); }
#elif defined(__aarch64__) && !defined(DICE_SINGLE_LANES)
INLINE floats max_floats(floats a, floats b) { return vmaxq_f32(a, b); }
INLINE floats min_floats(floats a, floats b) { return vminq_f32(a, b); }
INLINE doubles max_doubles(doubles a, doubles b) { return vmaxq_f64(a, b); }
INLINE doubles min_doubles(doubles a, doubles b) { return vminq_f64(a, b); }
#else
#define NO_MIN_MAX
#endif

#define DEFINE(vec, number, bits, unsigned_bits, mantissa_bits)                                                        \
    INLINE bits bits_of_##vec(vec v) { bits b; memcpy(&b, &v, sizeof b); return b; }                                   \
    INLINE vec vec_of_##bits(bits b) { vec v; memcpy(&v, &b, sizeof v); return v; }                                    \
    INLINE vec load_##vec(const void *p) { vec v; memcpy(&v, p, sizeof v); return v; }                                 \
    INLINE void store_##vec(void *p, vec v) { memcpy(p, &v, sizeof v); }                                               \
    INLINE vec broadcast_##vec(number x) { return x - (vec){0}; }                                                      \
    /* The lowest bits of the significand, moved to the exponent field. */                                             \
    INLINE vec exponent_##vec(vec v) {                                                                                 \
        return vec_of_##bits((bits)((unsigned_bits)bits_of_##vec(v) << mantissa_bits));                                \
    }                                                                                                                  \
    INLINE vec abs_##vec(vec v) {                                                                                      \
        return vec_of_##bits((bits)((unsigned_bits)bits_of_##vec(v) << 1 >> 1));                                       \
    }                                                                                                                  \
    /* m and n of v = m 2^n > 0 with sqrt(1/2) <= m < sqrt(2). To convert n to floating point, it is added to the      \
       bits of a number so large that its last place is 1. */                                                          \
    INLINE vec split_##vec(vec v, vec *m) {                                                                            \
        const number unit = 3LL << (mantissa_bits - 1);                                                                \
        bits n = (bits_of_##vec(v) - bits_of_##vec(broadcast_##vec((number)0.7071067811865476))) >> mantissa_bits;     \
        *m = vec_of_##bits((bits)((unsigned_bits)bits_of_##vec(v) - ((unsigned_bits)n << mantissa_bits)));             \
        return vec_of_##bits(n + bits_of_##vec(broadcast_##vec(unit))) - unit;                                         \
    }

DEFINE(floats, float, ints, words, 23)
DEFINE(doubles, double, longs, longwords, 52)
#undef DEFINE

/* Masks: `add_where` adds v to x where the mask is set, `count` adds 1 to lanes that are integers. */
#if BYTES == 64
typedef __mmask16 mask_t;
#define DEFINE(vec, suffix, integer)                                                                                   \
    INLINE mask_t equal_##vec(vec a, vec b) { return _mm512_cmp_##suffix##_mask(a, b, _CMP_EQ_OQ); }                   \
    INLINE mask_t less_##vec(vec a, vec b) { return _mm512_cmp_##suffix##_mask(a, b, _CMP_LT_OQ); }                    \
    INLINE vec and_mask_##vec(mask_t mask, vec v) { return _mm512_maskz_mov_##suffix(mask, v); }                       \
    INLINE vec andnot_##vec(mask_t mask, vec v) { return _mm512_mask_blend_##suffix(mask, v, (vec){0}); }              \
    INLINE vec select_##vec(mask_t mask, vec a, vec b) { return _mm512_mask_blend_##suffix(mask, b, a); }              \
    INLINE vec add_where_##vec(vec x, mask_t mask, vec v) { return _mm512_mask_add_##suffix(x, mask, x, v); }          \
    INLINE vec count_##vec(vec count, mask_t mask) {                                                                   \
        __m512i n = (__m512i)count;                                                                                    \
        return (vec)_mm512_mask_sub_##integer(n, mask, n, _mm512_set1_##integer(-1));                                  \
    }
DEFINE(floats, ps, epi32)
DEFINE(doubles, pd, epi64)
#else
#if defined(BYTES)
typedef ints mask_t;
#else
typedef int64_t mask_t;
#endif
#define DEFINE(vec, bits)                                                                                              \
    INLINE mask_t equal_##vec(vec a, vec b) { return (mask_t)MASK(a == b); }                                           \
    INLINE mask_t less_##vec(vec a, vec b) { return (mask_t)MASK(a < b); }                                             \
    INLINE vec and_mask_##vec(mask_t mask, vec v) { return vec_of_##bits((bits)mask & bits_of_##vec(v)); }             \
    INLINE vec andnot_##vec(mask_t mask, vec v) { return vec_of_##bits(~(bits)mask & bits_of_##vec(v)); }              \
    INLINE vec select_##vec(mask_t mask, vec a, vec b) {                                                               \
        return vec_of_##bits((bits_of_##vec(a) & (bits)mask) | (bits_of_##vec(b) & ~(bits)mask));                      \
    }                                                                                                                  \
    INLINE vec add_where_##vec(vec x, mask_t mask, vec v) { return x + and_mask_##vec(mask, v); }                      \
    /* A set mask is the integer -1. */                                                                                \
    INLINE vec count_##vec(vec count, mask_t mask) { return vec_of_##bits(bits_of_##vec(count) - (bits)mask); }
DEFINE(floats, ints)
DEFINE(doubles, longs)
#endif
#undef DEFINE

/* Non-temporal stores, which bypass the caches, to multiples of the vector's size. They are weakly ordered: the fence
   after them makes them visible to other threads before what follows it. If there are none, HAS_NON_TEMPORAL is 0. */
#if defined(SIMD)
enum { HAS_NON_TEMPORAL = 1 };
INLINE void store_non_temporal_floats(void *p, floats v) { SIMD(stream_ps)((float *)p, v); }
INLINE void store_non_temporal_doubles(void *p, doubles v) { SIMD(stream_pd)((double *)p, v); }
#define NON_TEMPORAL_FENCE() _mm_sfence()
#else
enum { HAS_NON_TEMPORAL = 0 };
INLINE void store_non_temporal_floats(void *p, floats v) { store_floats(p, v); }
INLINE void store_non_temporal_doubles(void *p, doubles v) { store_doubles(p, v); }
#define NON_TEMPORAL_FENCE()
#endif

/* Transposes a block of four by four, to[j, i] = from[i, j], by interleaving its rows twice. */
#if defined(BYTES)
#if defined(__clang__)
#define INTERLEAVE(v, a, b, i, j) __builtin_shufflevector(a, b, i, i + 4, j, j + 4)
#else
#define INTERLEAVE(v, a, b, i, j) __builtin_shuffle(a, b, (v){i, i + 4, j, j + 4})
#endif
#define DEFINE(bits)                                                                                                   \
    typedef uint##bits##_t row_##bits __attribute__((vector_size(bits / 2)));                                          \
    INLINE void transpose_##bits(const uint##bits##_t *from, ptrdiff_t from_row, uint##bits##_t *to, ptrdiff_t row) {  \
        row_##bits r[4], s[4];                                                                                         \
        for (int i = 0; i < 4; i++) memcpy(&r[i], from + i * from_row, sizeof r[i]);                                   \
        for (int i = 0; i < 2; i++) {                                                                                  \
            s[2 * i] = INTERLEAVE(row_##bits, r[i], r[i + 2], 0, 1);                                                   \
            s[2 * i + 1] = INTERLEAVE(row_##bits, r[i], r[i + 2], 2, 3);                                               \
        }                                                                                                              \
        for (int i = 0; i < 2; i++) {                                                                                  \
            r[2 * i] = INTERLEAVE(row_##bits, s[i], s[i + 2], 0, 1);                                                   \
            r[2 * i + 1] = INTERLEAVE(row_##bits, s[i], s[i + 2], 2, 3);                                               \
        }                                                                                                              \
        for (int i = 0; i < 4; i++) memcpy(to + i * row, &r[i], sizeof r[i]);                                          \
    }
#else
#define DEFINE(bits)                                                                                                   \
    INLINE void transpose_##bits(const uint##bits##_t *from, ptrdiff_t from_row, uint##bits##_t *to, ptrdiff_t row) {  \
        for (int i = 0; i < 4; i++)                                                                                    \
            for (int j = 0; j < 4; j++) to[j * row + i] = from[i * from_row + j];                                      \
    }
#endif
DEFINE(16)
DEFINE(32)
DEFINE(64)
#undef DEFINE

/* Whether any lane is greater than x, or NaN; optimised for the case that none is. */
#if BYTES == 64
INLINE int any_greater_floats(floats v, float x) {
    return UNLIKELY(_mm512_cmp_ps_mask(v, broadcast_floats(x), _CMP_NLE_UQ) != 0);
}
INLINE int any_greater_doubles(doubles v, double x) {
    return UNLIKELY(_mm512_cmp_pd_mask(v, broadcast_doubles(x), _CMP_NLE_UQ) != 0);
}
#elif BYTES == 32
INLINE int any_greater_floats(floats v, float x) {
    return UNLIKELY(_mm256_movemask_ps(_mm256_cmp_ps(v, broadcast_floats(x), _CMP_NLE_UQ)) != 0);
}
INLINE int any_greater_doubles(doubles v, double x) {
    return UNLIKELY(_mm256_movemask_pd(_mm256_cmp_pd(v, broadcast_doubles(x), _CMP_NLE_UQ)) != 0);
}
#elif defined(SIMD)
INLINE int any_greater_floats(floats v, float x) {
    return UNLIKELY(_mm_movemask_ps(_mm_cmpnle_ps(v, broadcast_floats(x))) != 0);
}
INLINE int any_greater_doubles(doubles v, double x) {
    return UNLIKELY(_mm_movemask_pd(_mm_cmpnle_pd(v, broadcast_doubles(x))) != 0);
}
#else
#define DEFINE(vec, number)                                                                                            \
    INLINE int any_greater_##vec(vec v, number x) {                                                                    \
        number lane[sizeof v / sizeof x];                                                                              \
        int any = 0;                                                                                                   \
        memcpy(lane, &v, sizeof v);                                                                                    \
        for (size_t k = 0; k < sizeof v / sizeof x; k++) any |= !(lane[k] <= x);                                       \
        return UNLIKELY(any);                                                                                          \
    }
DEFINE(floats, float)
DEFINE(doubles, double)
#undef DEFINE
#endif

#if defined(NO_MIN_MAX)
#define DEFINE(vec)                                                                                                    \
    INLINE vec max_##vec(vec a, vec b) { return select_##vec(less_##vec(b, a), a, b); }                                \
    INLINE vec min_##vec(vec a, vec b) { return select_##vec(less_##vec(a, b), a, b); }
DEFINE(floats)
DEFINE(doubles)
#undef DEFINE
#endif

/* ---- float16 and bfloat16: converted to floats on load, rounded to nearest even on store ---- */

INLINE words select_words(words mask, words a, words b) { return (a & mask) | (b & ~mask); }

/* CONVERT takes four instructions or more where these take one. */
#if BYTES == 64
#define widen(h) (words)_mm512_cvtepu16_epi32((__m256i)(h))
#define narrow(w) (halves)_mm512_cvtepi32_epi16((__m512i)(w))
#elif BYTES == 32
#define widen(h) (words)_mm256_cvtepu16_epi32((__m128i)(h))
INLINE halves narrow(words w) {
    __m256i all = (__m256i)w;
    return (halves)_mm_packus_epi32(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1));
}
#else
#define widen(h) CONVERT(h, words)
#define narrow(w) CONVERT(w, halves)
#endif

INLINE floats load_bf16(const void *p) {
    halves h;
    memcpy(&h, p, sizeof h);
    return vec_of_ints((ints)(widen(h) << 16));
}

INLINE void store_bf16(void *p, floats v) {
    words b = (words)bits_of_floats(v);
    words rounded = (b + 0x7fff + ((b >> 16) & 1)) >> 16;
    halves h = narrow(select_words((words)MASK(v == v), rounded, 0x7fc0 + (b & 0)));
    memcpy(p, &h, sizeof h);
}

#if defined(SIMD) && defined(__F16C__)
INLINE floats load_f16(const void *p) {
    halves h;
    memcpy(&h, p, sizeof h);
#if BYTES == 64
    return (floats)_mm512_cvtph_ps((__m256i)h);
#else
    return (floats)_mm256_cvtph_ps((__m128i)h);
#endif
}

INLINE void store_f16(void *p, floats v) {
#if BYTES == 64
    halves h = (halves)_mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
    halves h = (halves)_mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT);
#endif
    memcpy(p, &h, sizeof h);
}
#else
INLINE floats load_f16(const void *p) {
    halves h;
    memcpy(&h, p, sizeof h);
    words w = CONVERT(h, words);
    words absolute = w & 0x7fff;
    /* Read as a float32, the number is too small by 2^112, the difference of the exponents' biases; a product corrects
       that, for subnormal numbers too. Infinity and NaN get an exponent of all ones. */
    floats v = vec_of_ints((ints)(absolute << 13)) * 0x1p112f;
    words not_finite = (words)MASK(absolute > 0x7bff);
    return vec_of_ints(bits_of_floats(v) | (ints)((not_finite & 0x7f800000) | ((w & 0x8000) << 16)));
}

INLINE void store_f16(void *p, floats v) {
    words b = (words)bits_of_floats(v);
    words sign = (b >> 16) & 0x8000;
    b &= 0x7fffffff;
    /* Normal numbers are rounded by integer arithmetic on their bits. The last place of 0.5f is the smallest subnormal
       float16, so adding it rounds the subnormal ones. */
    words normal = (b - (112 << 23) + 0xfff + ((b >> 13) & 1)) >> 13;
    words subnormal = (words)bits_of_floats(vec_of_ints((ints)b) + 0.5f) - 0x3f000000;
    words r = select_words((words)MASK(b < (113 << 23)), subnormal, normal);
    r = select_words((words)MASK(b >= 0x477ff000), 0x7c00 + (b & 0), r);
    r = select_words((words)MASK(b > 0x7f800000), 0x7e00 + (b & 0), r);
    halves h = CONVERT(r | sign, halves);
    memcpy(p, &h, sizeof h);
}
#endif

#endif
