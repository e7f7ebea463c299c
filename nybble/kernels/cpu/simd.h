/* Sixteen lanes of 32 bits, spelled with the vector extensions of GCC and Clang so that one source
 * serves AVX-512, AVX2, NEON and anything else. Only what the compiler cannot find by itself (the
 * byte dot product, half-precision loads) is written per instruction set; -DNYBBLE_PORTABLE
 * switches those off, which the tests use to compare both forms. */
#ifndef NYBBLE_SIMD_H
#define NYBBLE_SIMD_H

#include <stdint.h>
#include <string.h>

#if !defined(NYBBLE_PORTABLE) && defined(__x86_64__)
#include <immintrin.h>
#define NYBBLE_X86 1
#endif

typedef float f32x16 __attribute__((vector_size(64)));
typedef int32_t i32x16 __attribute__((vector_size(64)));
typedef uint32_t u32x16 __attribute__((vector_size(64)));
typedef uint16_t u16x16 __attribute__((vector_size(32)));
typedef uint8_t u8x16 __attribute__((vector_size(16)));
typedef int8_t i8x16 __attribute__((vector_size(16)));
typedef uint64_t u64x2 __attribute__((vector_size(16)));
typedef int8_t i8x32 __attribute__((vector_size(32)));

#define INLINE static inline __attribute__((always_inline))
#define LANES 16

/* Element types of weights and caches (the last three of caches only); see library.py. */
enum { KIND_F32 = 0, KIND_F16 = 1, KIND_BF16 = 2, KIND_I8 = 3, KIND_I6 = 4, KIND_I4 = 5 };

#define SPLAT(type, x) ((type){x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x})
#if defined(__clang__)
#define SHUFFLE2(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#define SHUFFLE1(a, ...) __builtin_shufflevector(a, a, __VA_ARGS__)
#else
#define SHUFFLE2(a, b, ...) __builtin_shuffle(a, b, (i32x16){__VA_ARGS__})
#define SHUFFLE1(a, ...) __builtin_shuffle(a, (i32x16){__VA_ARGS__})
#endif

INLINE f32x16 splat(float x) { return SPLAT(f32x16, x); }
INLINE i32x16 splat_i(int32_t x) { return SPLAT(i32x16, x); }

INLINE f32x16 load_f32(const float *p) {
    f32x16 v;
    memcpy(&v, p, sizeof v);
    return v;
}

INLINE i32x16 load_i32(const int32_t *p) {
    i32x16 v;
    memcpy(&v, p, sizeof v);
    return v;
}

INLINE void store_f32(float *p, f32x16 v) { memcpy(p, &v, sizeof v); }

INLINE f32x16 to_f32(i32x16 v) { return __builtin_convertvector(v, f32x16); }

#if defined(__clang__)
#define SHUFFLE_BYTES(v, ...) __builtin_shufflevector(v, v, __VA_ARGS__)
#else
#define SHUFFLE_BYTES(v, ...) __builtin_shuffle(v, (i8x16){__VA_ARGS__})
#endif

/* Bytes to 32 bits and back: GCC 12 takes the long way round by itself. */
INLINE i32x16 widen_i8(i8x16 v) {
#if defined(NYBBLE_X86) && defined(__AVX512F__)
    return (i32x16)_mm512_cvtepi8_epi32((__m128i)v);
#elif defined(NYBBLE_X86) && defined(__AVX2__)
    const __m256i wide[2] = {_mm256_cvtepi8_epi32((__m128i)v),
                             _mm256_cvtepi8_epi32(_mm_srli_si128((__m128i)v, 8))};
    i32x16 all;
    memcpy(&all, wide, sizeof all);
    return all;
#else
    return __builtin_convertvector(v, i32x16);
#endif
}

INLINE i8x16 narrow_i32(i32x16 v) {
#if defined(NYBBLE_X86) && defined(__AVX512F__)
    return (i8x16)_mm512_cvtepi32_epi8((__m512i)v);
#else
    return __builtin_convertvector(v, i8x16);
#endif
}

INLINE f32x16 select_f(i32x16 mask, f32x16 yes, f32x16 no) {
    return (f32x16)((mask & (i32x16)yes) | (~mask & (i32x16)no));
}

INLINE f32x16 max_f(f32x16 a, f32x16 b) { return select_f(a > b, a, b); }

/* Each step folds the vector onto itself: distances 8, 4, 2, 1. */
#define FOLD(v, op)                                                                     \
    v = op(v, SHUFFLE1(v, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7));       \
    v = op(v, SHUFFLE1(v, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11));       \
    v = op(v, SHUFFLE1(v, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13));       \
    v = op(v, SHUFFLE1(v, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14))
#define PLUS(a, b) ((a) + (b))

INLINE float sum_lanes(f32x16 v) {
    FOLD(v, PLUS);
    return v[0];
}

INLINE int32_t sum_lanes_i(i32x16 v) {
    FOLD(v, PLUS);
    return v[0];
}

INLINE float max_lanes(f32x16 v) {
    FOLD(v, max_f);
    return v[0];
}

INLINE i32x16 max_i(i32x16 a, i32x16 b) {
    i32x16 mask = a > b;
    return (mask & a) | (~mask & b);
}

INLINE int32_t max_lanes_i(i32x16 v) {
    FOLD(v, max_i);
    return v[0];
}

/* acc + the dot product of four unsigned bytes with four signed ones, lane by lane, exact.
 * `bits` is how many bits of a code are in use: 4-bit codes cannot saturate vpmaddubsw. */
INLINE i32x16 dot4(i32x16 acc, i32x16 codes, int32_t acts, int bits) {
#if defined(NYBBLE_X86) && defined(__AVX512VNNI__)
    (void)bits;
    return (i32x16)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)codes, _mm512_set1_epi32(acts));
#elif defined(NYBBLE_X86) && defined(__AVX2__)
    const __m256i a = _mm256_set1_epi32(acts);
    __m256i w[2], s[2];
    memcpy(w, &codes, sizeof w);
    memcpy(s, &acc, sizeof s);
    for (int i = 0; i < 2; i++) {
#if defined(__AVXVNNI__)
        (void)bits;
        s[i] = _mm256_dpbusd_avx_epi32(s[i], w[i], a);
#else
        const __m256i ones = _mm256_set1_epi16(1);
        if (bits == 8) { /* the top bit apart: 128 * 127 * 2 still fits into 16 bits */
            const __m256i top = _mm256_and_si256(w[i], _mm256_set1_epi8((char)0x80));
            const __m256i pairs = _mm256_maddubs_epi16(top, a);
            s[i] = _mm256_add_epi32(s[i], _mm256_madd_epi16(pairs, ones));
            w[i] = _mm256_and_si256(w[i], _mm256_set1_epi8(0x7f));
        }
        s[i] = _mm256_add_epi32(s[i], _mm256_madd_epi16(_mm256_maddubs_epi16(w[i], a), ones));
#endif
    }
    memcpy(&acc, s, sizeof acc);
    return acc;
#else
    (void)bits;
    for (int j = 0; j < 4; j++)
        acc += ((codes >> (8 * j)) & 0xff) * (int32_t)(int8_t)(acts >> (8 * j));
    return acc;
#endif
}

INLINE f32x16 half_to_f32(u16x16 h) {
#if defined(NYBBLE_X86) && defined(__AVX512F__)
    return (f32x16)_mm512_cvtph_ps((__m256i)h);
#elif defined(NYBBLE_X86) && defined(__F16C__)
    __m128i part[2];
    __m256 wide[2];
    f32x16 v;
    memcpy(part, &h, sizeof part);
    for (int i = 0; i < 2; i++) wide[i] = _mm256_cvtph_ps(part[i]);
    memcpy(&v, wide, sizeof v);
    return v;
#else
    const u32x16 w = __builtin_convertvector(h, u32x16);
    const u32x16 sign = (w & 0x8000) << 16, rest = (w & 0x7fff) << 13;
    const f32x16 scaled = (f32x16)rest * splat(0x1p112f); /* re-biases subnormals as well */
    const u32x16 special = (u32x16)(rest >= 0x0f800000); /* Inf and NaN keep a full exponent */
    return (f32x16)(sign | (~special & (u32x16)scaled) | (special & (rest | 0x7f800000)));
#endif
}

INLINE u16x16 f32_to_half(f32x16 v) {
#if defined(NYBBLE_X86) && defined(__AVX512F__)
    return (u16x16)_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(NYBBLE_X86) && defined(__F16C__)
    __m256 wide[2];
    __m128i part[2];
    u16x16 h;
    memcpy(wide, &v, sizeof wide);
    for (int i = 0; i < 2; i++) part[i] = _mm256_cvtps_ph(wide[i], _MM_FROUND_TO_NEAREST_INT);
    memcpy(&h, part, sizeof h);
    return h;
#else
    const u32x16 bits = (u32x16)v, abs = bits & 0x7fffffff;
    /* Adding 0.5 aligns a half's subnormal to the low bits, rounded to even by the adder. */
    const u32x16 tiny = (u32x16)((f32x16)abs + splat(0.5f)) - 0x3f000000;
    const u32x16 normal = (abs - 0x38000000 + 0x0fff + ((abs >> 13) & 1)) >> 13;
    const u32x16 small = (u32x16)(abs < 0x38800000);
    const u32x16 large = (u32x16)(abs >= 0x477ff000), nan = (u32x16)(abs > 0x7f800000);
    const u32x16 finite = (small & tiny) | (~small & normal);
    const u32x16 half = (~large & finite) | (large & 0x7c00) | (nan & 0x0200);
    return __builtin_convertvector(half | ((bits >> 16) & 0x8000), u16x16);
#endif
}

INLINE u16x16 f32_to_bfloat(f32x16 v) {
    const u32x16 bits = (u32x16)v;
    const u32x16 rounded = bits + 0x7fff + ((bits >> 16) & 1);
    const u32x16 nan = (u32x16)((bits & 0x7fffffff) > 0x7f800000);
    return __builtin_convertvector(((~nan & rounded) | (nan & (bits | 0x400000))) >> 16, u16x16);
}

/* Sixteen elements from index i of an array of `kind`, as fp32. */
INLINE f32x16 load_kind(const void *p, long i, int kind) {
    u16x16 h;
    if (kind == KIND_F32) return load_f32((const float *)p + i);
    memcpy(&h, (const uint16_t *)p + i, sizeof h);
    if (kind == KIND_F16) return half_to_f32(h);
    return (f32x16)(__builtin_convertvector(h, u32x16) << 16);
}

INLINE void store_kind(void *p, long i, f32x16 v, int kind) {
    if (kind == KIND_F32) {
        store_f32((float *)p + i, v);
        return;
    }
    const u16x16 h = kind == KIND_F16 ? f32_to_half(v) : f32_to_bfloat(v);
    memcpy((uint16_t *)p + i, &h, sizeof h);
}

INLINE long kind_size(int kind) { return kind == KIND_F32 ? 4 : 2; }

/* The last, short piece of a row: `count` < 16 elements, the other lanes 0. */
INLINE f32x16 load_tail(const void *p, long i, long count, int kind) {
    const long size = kind_size(kind);
    char padded[64] = {0};
    memcpy(padded, (const char *)p + i * size, (size_t)(count * size));
    return load_kind(padded, 0, kind);
}

INLINE void store_tail(void *p, long i, f32x16 v, long count, int kind) {
    const long size = kind_size(kind);
    char padded[64];
    store_kind(padded, 0, v, kind);
    memcpy((char *)p + i * size, padded, (size_t)(count * size));
}

/* e^x to about 1e-7 relative: 2^n times a polynomial of the rest (coefficients of Cephes' expf).
 * Below -87 the result is 0; NaN stays NaN. */
INLINE f32x16 exp_f(f32x16 x) {
    const f32x16 magic = splat(12582912.0f); /* 1.5 * 2^23: adding it rounds to an integer */
    const i32x16 under = x < splat(-87.0f);
    x = select_f(x > splat(88.0f), splat(88.0f), x);
    const f32x16 shifted = x * splat(1.44269504f) + magic;
    const f32x16 n = shifted - magic;
    const f32x16 r = x - n * splat(0.693359375f) - n * splat(-2.12194440e-4f);
    f32x16 p = splat(1.9875691500e-4f);
    p = p * r + splat(1.3981999507e-3f);
    p = p * r + splat(8.3334519073e-3f);
    p = p * r + splat(4.1665795894e-2f);
    p = p * r + splat(1.6666665459e-1f);
    p = p * r + splat(5.0000001201e-1f);
    p = p * (r * r) + r + splat(1.0f);
    const i32x16 exponent = ((i32x16)shifted - 0x4b400000 + 127) << 23;
    return select_f(under, splat(0.0f), p * (f32x16)exponent);
}

#endif
