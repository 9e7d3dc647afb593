/* Elements as symbols and rest, and back.  Work goes by groups of 128 elements with constant bounds, so that
   compilers turn the loops to vectors; the same source is compiled for each level. */
#include "split.h"

enum { GROUP = 128 };

#if defined(__GNUC__) || defined(__clang__)
#define ALWAYS static inline __attribute__((always_inline))
#else
#define ALWAYS static inline
#endif

static size_t part_size(size_t count, int bits) {
    if (bits >= 8) return count * (size_t)bits / 8;
    return count / GROUP * (16 * (size_t)bits) + (count % GROUP * (size_t)bits + 7) / 8;
}

size_t parts_size(size_t count, int rest) {
    size_t size = 0;
    for (int bits = 32; bits; bits /= 2)
        if (rest & bits) size += part_size(count, bits);
    return size;
}

/* ---- the parts of 4, 2 and 1 bits: together below 8 bits, so they pass through bytes, eight in a word */

#define EIGHT 0x0101010101010101u

ALWAYS void take_bits(const u8 *part, size_t count, int bits, int shift, u8 *low) {
    const u64 mask = EIGHT * ((1u << bits) - 1);
    if (count == GROUP) {
        for (int q = 0; q < 8 / bits; q++)
            for (int j = 0; j < 2 * bits; j++) {
                u64 v, sum;
                memcpy(&v, part + 8 * j, 8);
                memcpy(&sum, low + 16 * bits * q + 8 * j, 8);
                sum |= (v >> (bits * q) & mask) << shift;
                memcpy(low + 16 * bits * q + 8 * j, &sum, 8);
            }
        return;
    }
    const size_t stride = (count * (size_t)bits + 7) / 8;
    for (size_t j = 0; j < count; j++)
        low[j] |= (u8)((part[j % stride] >> (bits * (int)(j / stride)) & ((1 << bits) - 1)) << shift);
}

ALWAYS void give_bits(const u8 *low, size_t count, int bits, int shift, u8 *part) {
    const u64 mask = EIGHT * ((1u << bits) - 1);
    if (count == GROUP) {
        for (int j = 0; j < 2 * bits; j++) {
            u64 sum = 0, v;
            for (int q = 0; q < 8 / bits; q++) {
                memcpy(&v, low + 16 * bits * q + 8 * j, 8);
                sum |= (v >> shift & mask) << (bits * q);
            }
            memcpy(part + 8 * j, &sum, 8);
        }
        return;
    }
    const size_t stride = (count * (size_t)bits + 7) / 8;
    for (size_t j = 0; j < stride; j++) part[j] = 0;
    for (size_t j = 0; j < count; j++)
        part[j % stride] |= (u8)((low[j] >> shift & ((1 << bits) - 1)) << (bits * (int)(j / stride)));
}

/* All of them: of the group that begins at element `first`.  `part` is where the first of these parts begins.
   Written out, so that widths and shifts are constants. */
#define EACH_LOW(DO)                                                                                                   \
    int shift = 0;                                                                                                     \
    if (r & 4) DO(part + first / GROUP * 64, 4), shift = 4, part += part_size(total, 4);                               \
    if (r & 2) DO(part + first / GROUP * 32, 2), shift += 2, part += part_size(total, 2);                              \
    if (r & 1) DO(part + first / GROUP * 16, 1);

ALWAYS void take_low(const u8 *part, size_t total, size_t first, size_t count, int r, u8 *low) {
#define TAKE_BITS(from, bits) take_bits(from, count, bits, shift, low)
    EACH_LOW(TAKE_BITS)
}

ALWAYS void give_low(const u8 *low, size_t total, size_t first, size_t count, int r, u8 *part) {
#define GIVE_BITS(to, bits) give_bits(low, count, bits, shift, to)
    EACH_LOW(GIVE_BITS)
}

/* ---- the parts of 8, 16 and 32 bits, and the whole */

/* As much as GROUP elements take, a little ahead: the processor itself looks ahead within a page only. */
#define FETCH(DATA, WIDTH)                                                                                             \
    for (size_t line = 0; line < GROUP * (WIDTH); line += 64) __builtin_prefetch((DATA) + 16 * GROUP * (WIDTH) + line);

#define TAKE(T, P)                                                                                                     \
    if (sizeof(P) < sizeof(T) && r & (int)(8 * sizeof(P))) {                                                           \
        FETCH(part + first * sizeof(P), sizeof(P))                                                                     \
        for (size_t j = 0; j < number; j++) {                                                                          \
            P v;                                                                                                       \
            memcpy(&v, part + (first + j) * sizeof v, sizeof v);                                                       \
            x[j] |= (T)((T)v << shift);                                                                                \
        }                                                                                                              \
        shift += (int)(8 * sizeof(P)), part += total * sizeof(P);                                                      \
    }
#define GIVE(T, P)                                                                                                     \
    if (sizeof(P) < sizeof(T) && r & (int)(8 * sizeof(P))) {                                                           \
        for (size_t j = 0; j < number; j++) {                                                                          \
            P v = (P)(x[j] >> shift);                                                                                  \
            memcpy(part + (first + j) * sizeof v, &v, sizeof v);                                                       \
        }                                                                                                              \
        shift += (int)(8 * sizeof(P)), part += total * sizeof(P);                                                      \
    }

#define KERNELS(T)                                                                                                     \
    ALWAYS void join_group_##T(const u8 *symbols, const u8 *part, size_t total, size_t first, size_t number, int r,    \
                               int rotate, u8 *out) {                                                                  \
        T x[GROUP];                                                                                                    \
        int shift = 0;                                                                                                 \
        FETCH(out, sizeof(T))                                                                                          \
        for (size_t j = 0; j < number; j++) x[j] = (T)((T)symbols[j] << r);                                            \
        TAKE(T, u32) TAKE(T, u16) TAKE(T, u8)                                                                          \
        if (r & 7) {                                                                                                   \
            u8 low[GROUP] = {0};                                                                                       \
            take_low(part, total, first, number, r, low);                                                              \
            for (size_t j = 0; j < number; j++) x[j] |= (T)((T)low[j] << shift);                                       \
        }                                                                                                              \
        if (rotate)                                                                                                    \
            for (size_t j = 0; j < number; j++) x[j] = (T)(x[j] >> 1 | x[j] << (8 * sizeof(T) - 1));                   \
        memcpy(out, x, number * sizeof(T));                                                                            \
    }                                                                                                                  \
    ALWAYS void split_group_##T(const u8 *elements, u8 *part, size_t total, size_t first, size_t number, int r,        \
                                int rotate, u8 *symbols, int parts_too) {                                              \
        T x[GROUP];                                                                                                    \
        int shift = 0;                                                                                                 \
        memcpy(x, elements, number * sizeof(T));                                                                       \
        if (rotate)                                                                                                    \
            for (size_t j = 0; j < number; j++) x[j] = (T)(x[j] << 1 | x[j] >> (8 * sizeof(T) - 1));                   \
        if (symbols)                                                                                                   \
            for (size_t j = 0; j < number; j++) symbols[j] = (u8)(x[j] >> r);                                          \
        if (!parts_too) return;                                                                                        \
        GIVE(T, u32) GIVE(T, u16) GIVE(T, u8)                                                                          \
        if (r & 7) {                                                                                                   \
            u8 low[GROUP];                                                                                             \
            for (size_t j = 0; j < number; j++) low[j] = (u8)(x[j] >> shift);                                          \
            give_low(low, total, first, number, r, part);                                                              \
        }                                                                                                              \
    }                                                                                                                  \
    ALWAYS void join_##T(const u8 *symbols, const u8 *parts, size_t total, size_t begin, size_t count, int r,          \
                         int rotate, u8 *out) {                                                                        \
        size_t i = 0;                                                                                                  \
        for (; i + GROUP <= count; i += GROUP)                                                                         \
            join_group_##T(symbols + i, parts, total, begin + i, GROUP, r, rotate, out + i * sizeof(T));               \
        if (i < count)                                                                                                 \
            join_group_##T(symbols + i, parts, total, begin + i, count - i, r, rotate, out + i * sizeof(T));           \
    }                                                                                                                  \
    ALWAYS void split_##T(const u8 *elements, size_t count, int r, int rotate, u8 *symbols, u8 *parts) {               \
        size_t i = 0;                                                                                                  \
        for (; i + GROUP <= count; i += GROUP)                                                                         \
            split_group_##T(elements + i * sizeof(T), parts, count, i, GROUP, r, rotate, symbols ? symbols + i : NULL, \
                            parts != NULL);                                                                            \
        if (i < count)                                                                                                 \
            split_group_##T(elements + i * sizeof(T), parts, count, i, count - i, r, rotate,                           \
                            symbols ? symbols + i : NULL, parts != NULL);                                              \
    }
KERNELS(u8)
KERNELS(u16)
KERNELS(u32)
KERNELS(u64)

/* The usual cuts with constants, so that loops unroll; others by the general one. */
#define JOIN_AS(T, R, ROT)                                                                                             \
    if (c.width == (int)sizeof(T) && c.rest == R && c.rotate == ROT) {                                                 \
        join_##T(symbols, parts, total, begin, count, R, ROT, out);                                                    \
        return;                                                                                                        \
    }
#define SPLIT_AS(T, R, ROT)                                                                                            \
    if (c.width == (int)sizeof(T) && c.rest == R && c.rotate == ROT) {                                                 \
        split_##T(elements, count, R, ROT, symbols, parts);                                                            \
        return;                                                                                                        \
    }
#define USUAL(AS)                                                                                                      \
    AS(u16, 8, 1) AS(u32, 24, 1) AS(u16, 11, 1) AS(u16, 10, 1) AS(u16, 9, 1) AS(u8, 1, 0) AS(u8, 2, 0) AS(u8, 3, 0)    \
    AS(u8, 4, 0) AS(u8, 3, 1) AS(u8, 4, 1)

#define LEVEL(NAME, ATTRIBUTE)                                                                                         \
    ATTRIBUTE static void join_##NAME(cut c, const u8 *symbols, const u8 *parts, size_t total, size_t begin,           \
                                      size_t count, u8 *out) {                                                         \
        USUAL(JOIN_AS)                                                                                                 \
        if (c.width == 1) join_u8(symbols, parts, total, begin, count, c.rest, c.rotate, out);                         \
        else if (c.width == 2) join_u16(symbols, parts, total, begin, count, c.rest, c.rotate, out);                   \
        else if (c.width == 4) join_u32(symbols, parts, total, begin, count, c.rest, c.rotate, out);                   \
        else join_u64(symbols, parts, total, begin, count, c.rest, c.rotate, out);                                     \
    }                                                                                                                  \
    ATTRIBUTE static void split_##NAME(cut c, const u8 *elements, size_t count, u8 *symbols, u8 *parts) {              \
        USUAL(SPLIT_AS)                                                                                                \
        if (c.width == 1) split_u8(elements, count, c.rest, c.rotate, symbols, parts);                                 \
        else if (c.width == 2) split_u16(elements, count, c.rest, c.rotate, symbols, parts);                           \
        else if (c.width == 4) split_u32(elements, count, c.rest, c.rotate, symbols, parts);                           \
        else split_u64(elements, count, c.rest, c.rotate, symbols, parts);                                             \
    }

LEVEL(portable, )
#if defined(SMELT_X86)
LEVEL(avx2, __attribute__((target("avx2"))))
LEVEL(avx512, __attribute__((target("avx512f,avx512bw,avx512vl,avx512vbmi2"))))
#endif

void join_elements(int level, cut c, const u8 *symbols, const u8 *parts, size_t total, size_t begin, size_t count,
                   u8 *out) {
#if defined(SMELT_X86)
    if (level >= AVX512) join_avx512(c, symbols, parts, total, begin, count, out);
    else if (level == SIMD) join_avx2(c, symbols, parts, total, begin, count, out);
    else
#endif
        join_portable(c, symbols, parts, total, begin, count, out);
    (void)level;
}

void split_elements(int level, cut c, const u8 *elements, size_t count, u8 *symbols, u8 *parts) {
#if defined(SMELT_X86)
    if (level >= AVX512) split_avx512(c, elements, count, symbols, parts);
    else if (level == SIMD) split_avx2(c, elements, count, symbols, parts);
    else
#endif
        split_portable(c, elements, count, symbols, parts);
    (void)level;
}

/* ---- elements that are not 0 */

#define SPREAD(T)                                                                                                      \
    static void spread_##T(const u8 *values, const u8 *mask, size_t count, u8 *out) {                                  \
        for (size_t i = 0; i < count; i++) {                                                                           \
            T x;                                                                                                       \
            memcpy(&x, values, sizeof x);                                                                              \
            x = (T)(x & (T)(0 - (T)mask[i]));                                                                          \
            memcpy(out + i * sizeof x, &x, sizeof x);                                                                  \
            values += sizeof x * mask[i];                                                                              \
        }                                                                                                              \
    }                                                                                                                  \
    static size_t gather_##T(const u8 *elements, size_t count, u8 *mask, u8 *values) {                                 \
        const u8 *begin = values;                                                                                      \
        for (size_t i = 0; i < count; i++) {                                                                           \
            T x;                                                                                                       \
            memcpy(&x, elements + i * sizeof x, sizeof x);                                                             \
            memcpy(values, &x, sizeof x);                                                                              \
            mask[i] = x != 0, values += sizeof x * mask[i];                                                            \
        }                                                                                                              \
        return (size_t)(values - begin) / sizeof(T);                                                                   \
    }
SPREAD(u8)
SPREAD(u16)
SPREAD(u32)
SPREAD(u64)

void spread(int level, const u8 *values, size_t kept, const u8 *mask, size_t count, int width, u8 *out) {
    size_t i = 0;
#if defined(SMELT_X86)
    if (level >= AVX512) i = spread_avx512(values, kept, mask, count, width, out);
    for (size_t j = 0; j < i; j++) values += mask[j] * (size_t)width;
#endif
    (void)level, (void)kept;
    mask += i, count -= i, out += i * (size_t)width;
    if (width == 1) spread_u8(values, mask, count, out);
    else if (width == 2) spread_u16(values, mask, count, out);
    else if (width == 4) spread_u32(values, mask, count, out);
    else spread_u64(values, mask, count, out);
}

size_t gather(const u8 *elements, size_t count, int width, u8 *mask, u8 *values) {
    return width == 1   ? gather_u8(elements, count, mask, values)
           : width == 2 ? gather_u16(elements, count, mask, values)
           : width == 4 ? gather_u32(elements, count, mask, values)
                        : gather_u64(elements, count, mask, values);
}

/* ---- halves */

#define HALVES(T, H, BITS)                                                                                             \
    static void widen_##T(const u8 *halves, size_t count, int shift, u8 *out) {                                        \
        for (size_t i = 0; i < count; i++) {                                                                           \
            H h;                                                                                                       \
            memcpy(&h, halves + i * sizeof h, sizeof h);                                                               \
            T x = (T)((T)h << shift);                                                                                  \
            memcpy(out + i * sizeof x, &x, sizeof x);                                                                  \
        }                                                                                                              \
    }                                                                                                                  \
    static void narrow_##T(const u8 *elements, size_t count, int shift, u8 *out) {                                     \
        for (size_t i = 0; i < count; i++) {                                                                           \
            T x;                                                                                                       \
            memcpy(&x, elements + i * sizeof x, sizeof x);                                                             \
            H h = (H)(x >> shift);                                                                                     \
            memcpy(out + i * sizeof h, &h, sizeof h);                                                                  \
        }                                                                                                              \
    }
HALVES(u16, u8, 8)
HALVES(u32, u16, 16)
HALVES(u64, u32, 32)

void widen(const u8 *halves, size_t count, int width, int upper, u8 *out) {
    const int shift = upper ? 4 * width : 0;
    if (width == 2) widen_u16(halves, count, shift, out);
    else if (width == 4) widen_u32(halves, count, shift, out);
    else widen_u64(halves, count, shift, out);
}

void narrow(const u8 *elements, size_t count, int width, int upper, u8 *out) {
    const int shift = upper ? 4 * width : 0;
    if (width == 2) narrow_u16(elements, count, shift, out);
    else if (width == 4) narrow_u32(elements, count, shift, out);
    else narrow_u64(elements, count, shift, out);
}

u32 single_of(u16 half) {
    const u32 sign = (u32)(half & 0x8000) << 16, exponent = half >> 10 & 31, fraction = half & 1023;
    if (exponent == 31) return sign | 0x7f800000 | fraction << 13;
    if (exponent) return sign | (exponent + 112) << 23 | fraction << 13;
    if (!fraction) return sign;
    u32 e = 113, f = fraction; /* subnormal: a normal number in binary32 */
    while (!(f & 1024)) f <<= 1, e--;
    return sign | e << 23 | (f & 1023) << 13;
}

int half_exactly(u32 single, u16 *half) {
    const u32 sign = single >> 16 & 0x8000, exponent = single >> 23 & 255, fraction = single & 0x7fffff;
    u32 h;
    if (exponent == 255) h = 31u << 10 | fraction >> 13;
    else if (exponent >= 113 && exponent <= 142) h = (exponent - 112) << 10 | fraction >> 13;
    else if (exponent >= 103 && exponent < 113) h = (fraction | 0x800000) >> (126 - exponent);
    else h = 0;
    *half = (u16)(sign | h);
    return single_of(*half) == single;
}
