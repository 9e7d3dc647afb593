/* Floating numbers rounded to a few bits at random, without bias, and bit masks: grids/stochastic.py and grids/masks.py
   say what is computed, and compute the same with torch.  Numbers are float (wide) or bfloat16.

   Codes and masks are packed alike: `bits` bits for each number, the first in the lowest bits of the first byte. */
#include "native.h"

#include <math.h>

enum { PIECE = 256 }; /* numbers at a time; a multiple of 8 */

#if defined(__GNUC__) || defined(__clang__)
#define INLINE static inline __attribute__((always_inline))
#else
#define INLINE static inline
#endif

INLINE float of_bits(u32 bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

INLINE u32 to_bits(float x) {
    u32 bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

/* The next bfloat16 that is not above, and for x >= 0 not below. */
INLINE u16 down(float x) {
    u32 bits = to_bits(x);
    return (u16)((bits >> 31 ? bits + 0xFFFF : bits) >> 16);
}

INLINE u16 up(float x) { return (u16)((to_bits(x) + 0xFFFF) >> 16); }

INLINE u16 nearest(float x) {
    u32 bits = to_bits(x);
    if ((bits & 0x7FFFFFFF) > 0x7F800000) return (u16)(bits >> 16 | 64);
    return (u16)((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

/* A number in 0..1, by its place: the multiplications of C. Wellons' lowbias32. */
INLINE float noise(u32 place, u32 seed) {
    u32 h = place * 0x9E3779B1u + seed;
    h ^= h >> 16;
    h *= 0x7FEB352Du;
    h ^= h >> 15;
    h *= 0x846CA68Bu;
    return (float)(int32_t)(h >> 8) * 5.9604644775390625e-8f;
}

/* n numbers from x[at] on; those up to the next multiple of 8 become 0. */
INLINE void load(const void *x, int wide, size_t at, size_t n, float *out) {
    if (wide) {
        const float *from = (const float *)x + at;
        for (size_t i = 0; i < n; i++) out[i] = from[i];
    } else {
        const u16 *from = (const u16 *)x + at;
        for (size_t i = 0; i < n; i++) out[i] = of_bits((u32)from[i] << 16);
    }
    for (; n & 7; n++) out[n] = 0;
}

INLINE void save(void *x, int wide, size_t at, size_t n, const float *from) {
    if (wide) {
        memcpy((float *)x + at, from, n * sizeof *from);
    } else {
        u16 *to = (u16 *)x + at;
        for (size_t i = 0; i < n; i++) to[i] = nearest(from[i]);
    }
}

/* ---- 8 codes, a byte each, to `bits` bytes and back */

INLINE u64 lanes(int width, int every) { /* 1s in the lower `width` bits of every `every` */
    u64 one = ((u64)1 << width) - 1, all = 0;
    for (int at = 0; at < 64; at += every) all |= one << at;
    return all;
}

INLINE void pack(const u8 *codes, size_t n, int bits, u8 *out) { /* n: a multiple of 8 */
    if (bits == 8) {
        memcpy(out, codes, n);
        return;
    }
    const u64 even = lanes(8, 16), pair = lanes(2 * bits, 32), four = lanes(4 * bits, 64);
    for (size_t i = 0; i < n; i += 8, out += bits) {
        u64 v;
        memcpy(&v, codes + i, 8);
        v = (v & even) | ((v & ~even) >> (8 - bits));
        v = (v & pair) | ((v >> (16 - 2 * bits)) & (pair << 2 * bits));
        v = (v & four) | ((v >> (32 - 4 * bits)) & (four << 4 * bits));
        memcpy(out, &v, (size_t)bits);
    }
}

INLINE void unpack(const u8 *in, size_t n, int bits, u8 *codes) {
    if (bits == 8) {
        memcpy(codes, in, n);
        return;
    }
    const u64 four = lanes(4 * bits, 64), pair = lanes(2 * bits, 32), one = lanes(bits, 16);
    for (size_t i = 0; i < n; i += 8, in += bits) {
        u64 v = 0;
        memcpy(&v, in, (size_t)bits);
        v = (v & four) | (v >> 4 * bits & four) << 32;
        v = (v & pair) | (v >> 2 * bits & pair) << 16;
        v = (v & one) | (v >> bits & one) << 8;
        memcpy(codes + i, &v, 8);
    }
}

/* ---- groups */

INLINE void encode(const void *x, int wide, size_t n, int bits, size_t group, u32 seed, int random, u8 *codes, u16 *low,
                   u16 *step) {
    const float levels = (float)((1 << bits) - 1);
    float piece[PIECE];
    u8 found[PIECE];
    for (size_t g = 0, at = 0; at < n; g++, at += group) {
        size_t size = n - at < group ? n - at : group;
        float least[16], most[16];
        int bad = 0;
        for (int k = 0; k < 16; k++) least[k] = INFINITY, most[k] = -INFINITY;
        for (size_t done = 0; done < size; done += PIECE) {
            size_t count = size - done < PIECE ? size - done : PIECE, whole = count & ~(size_t)15;
            load(x, wide, at + done, count, piece);
            for (size_t i = 0; i < whole; i += 16)
                for (int k = 0; k < 16; k++) {
                    float v = piece[i + k];
                    least[k] = v < least[k] ? v : least[k];
                    most[k] = v > most[k] ? v : most[k];
                    bad |= !(v - v == 0);
                }
            for (size_t i = whole; i < count; i++) {
                float v = piece[i];
                least[0] = v < least[0] ? v : least[0];
                most[0] = v > most[0] ? v : most[0];
                bad |= !(v - v == 0);
            }
        }
        for (int k = 1; k < 16; k++) {
            least[0] = least[k] < least[0] ? least[k] : least[0];
            most[0] = most[k] > most[0] ? most[k] : most[0];
        }
        low[g] = bad ? 0x7FC0 : down(least[0]);
        const float from = of_bits((u32)low[g] << 16), span = (most[0] - from) / levels;
        step[g] = bad ? 0x7FC0 : span < 1e-30f ? 0 : up(span);
        const float width = of_bits((u32)step[g] << 16), inverse = bad || step[g] == 0 ? 0 : 1 / width;
        for (size_t done = 0; done < size; done += PIECE) {
            size_t count = size - done < PIECE ? size - done : PIECE, whole = (count + 7) & ~(size_t)7;
            load(x, wide, at + done, count, piece);
            u32 place = (u32)(at + done);
            for (size_t i = 0; i < whole; i++) {
                float v = (piece[i] - from) * inverse + (random ? noise(place + (u32)i, seed) : 0.5f);
                v = v < levels ? v : levels;
                found[i] = (u8)(int)(v > 0 ? v : 0);
            }
            for (size_t i = count; i < whole; i++) found[i] = 0;
            pack(found, whole, bits, codes + (at + done) / 8 * (size_t)bits);
        }
    }
}

INLINE void decode(const u8 *codes, const u16 *low, const u16 *step, size_t n, int bits, size_t group, void *out,
                   int wide) {
    float piece[PIECE];
    u8 found[PIECE];
    for (size_t g = 0, at = 0; at < n; g++, at += group) {
        size_t size = n - at < group ? n - at : group;
        const float from = of_bits((u32)low[g] << 16), width = of_bits((u32)step[g] << 16);
        for (size_t done = 0; done < size; done += PIECE) {
            size_t count = size - done < PIECE ? size - done : PIECE, whole = (count + 7) & ~(size_t)7;
            unpack(codes + (at + done) / 8 * (size_t)bits, whole, bits, found);
            for (size_t i = 0; i < whole; i++) piece[i] = (float)found[i] * width + from;
            save(out, wide, at + done, count, piece);
        }
    }
}

/* ---- masks */

INLINE int64_t above(const void *x, int wide, size_t n, float bound, u8 *mask) {
    float piece[PIECE];
    u8 found[PIECE];
    int64_t total = 0;
    for (size_t at = 0; at < n; at += PIECE) {
        size_t count = n - at < PIECE ? n - at : PIECE, whole = (count + 7) & ~(size_t)7;
        int sum = 0;
        load(x, wide, at, count, piece);
        for (size_t i = 0; i < count; i++) {
            found[i] = piece[i] > bound;
            sum += found[i];
        }
        for (size_t i = count; i < whole; i++) found[i] = 0;
        total += sum;
        pack(found, whole, 1, mask + at / 8);
    }
    return total;
}

/* out = x where the bit is `want`, else 0. */
INLINE void keep(const void *x, int wide, size_t n, const u8 *mask, int want, void *out) {
    u8 bits[PIECE];
    for (size_t at = 0; at < n; at += PIECE) {
        size_t count = n - at < PIECE ? n - at : PIECE, whole = (count + 7) & ~(size_t)7;
        unpack(mask + at / 8, whole, 1, bits);
        if (wide) {
            const u32 *from = (const u32 *)x + at;
            u32 *to = (u32 *)out + at;
            for (size_t i = 0; i < count; i++) to[i] = from[i] & (u32) - (int32_t)(bits[i] == want);
        } else {
            const u16 *from = (const u16 *)x + at;
            u16 *to = (u16 *)out + at;
            for (size_t i = 0; i < count; i++) to[i] = from[i] & (u16) - (int32_t)(bits[i] == want);
        }
    }
}

/* Every case with its constants known, for one level of the processor. */
#define EACH_WIDTH(CALL)                                                                                               \
    switch (bits) {                                                                                                    \
    case 1: CALL(1); break;                                                                                            \
    case 2: CALL(2); break;                                                                                            \
    case 3: CALL(3); break;                                                                                            \
    case 4: CALL(4); break;                                                                                            \
    case 5: CALL(5); break;                                                                                            \
    case 6: CALL(6); break;                                                                                            \
    case 7: CALL(7); break;                                                                                            \
    default: CALL(8);                                                                                                  \
    }
#define ENCODE(BITS)                                                                                                   \
    if (wide)                                                                                                          \
        encode(x, 1, n, BITS, group, seed, random, codes, low, step);                                                  \
    else                                                                                                               \
        encode(x, 0, n, BITS, group, seed, random, codes, low, step)
#define DECODE(BITS)                                                                                                   \
    if (wide)                                                                                                          \
        decode(codes, low, step, n, BITS, group, out, 1);                                                              \
    else                                                                                                               \
        decode(codes, low, step, n, BITS, group, out, 0)

#define LEVEL(NAME, TARGET)                                                                                            \
    static TARGET void encode_##NAME(const void *x, int wide, size_t n, int bits, size_t group, u32 seed, int random,  \
                                     u8 *codes, u16 *low, u16 *step) {                                                 \
        EACH_WIDTH(ENCODE)                                                                                             \
    }                                                                                                                  \
    static TARGET void decode_##NAME(const u8 *codes, const u16 *low, const u16 *step, size_t n, int bits,             \
                                     size_t group, void *out, int wide) {                                              \
        EACH_WIDTH(DECODE)                                                                                             \
    }                                                                                                                  \
    static TARGET int64_t above_##NAME(const void *x, int wide, size_t n, float bound, u8 *mask) {                     \
        return wide ? above(x, 1, n, bound, mask) : above(x, 0, n, bound, mask);                                       \
    }                                                                                                                  \
    static TARGET void keep_##NAME(const void *x, int wide, size_t n, const u8 *mask, int want, void *out) {           \
        if (wide)                                                                                                      \
            keep(x, 1, n, mask, want, out);                                                                            \
        else                                                                                                           \
            keep(x, 0, n, mask, want, out);                                                                            \
    }

LEVEL(portable, )
#ifdef SMELT_X86
LEVEL(avx2, __attribute__((target("avx2"))))
LEVEL(avx512, __attribute__((target("avx512f,avx512bw,avx512vl,prefer-vector-width=512"))))
#define BEST(NAME)                                                                                                     \
    (best_level() >= AVX512 ? NAME##_avx512 : best_level() >= SIMD ? NAME##_avx2 : NAME##_portable)
#else
#define BEST(NAME) NAME##_portable
#endif

/* codes: ceil(n / 8) * bits bytes; low, step: bfloat16, one for each group, whose size is a multiple of 8.
   random: 0 rounds to the nearest level. */
SMELT_API void smelt_round_encode(const void *x, int wide, int64_t n, int bits, int64_t group, u32 seed, int random,
                                  u8 *codes, u16 *low, u16 *step) {
    BEST(encode)(x, wide, (size_t)n, bits, (size_t)group, seed, random, codes, low, step);
}

SMELT_API void smelt_round_decode(const u8 *codes, const u16 *low, const u16 *step, int64_t n, int bits, int64_t group,
                                  void *out, int wide) {
    BEST(decode)(codes, low, step, (size_t)n, bits, (size_t)group, out, wide);
}

/* The mask of x > bound; returns how many are. */
SMELT_API int64_t smelt_mask_above(const void *x, int wide, int64_t n, float bound, u8 *mask) {
    return BEST(above)(x, wide, (size_t)n, bound, mask);
}

/* Those whose bit is `want`, and 0 for the others. */
SMELT_API void smelt_mask_keep(const void *x, int wide, int64_t n, const u8 *mask, int want, void *out) {
    BEST(keep)(x, wide, (size_t)n, mask, want, out);
}

/* The numbers whose bit is `want`, close together; `out` has room for one more. */
SMELT_API void smelt_mask_gather(const void *x, int wide, int64_t n, const u8 *mask, int want, void *out) {
    const u8 flip = want ? 0 : 255;
    size_t k = 0;
#define GATHER(T)                                                                                                      \
    for (int64_t i = 0; i < n; i += 8) {                                                                               \
        unsigned m = (u8)(mask[i >> 3] ^ flip);                                                                        \
        int64_t most = n - i < 8 ? n - i : 8;                                                                          \
        for (int64_t j = 0; j < most; j++, m >>= 1) {                                                                  \
            ((T *)out)[k] = ((const T *)x)[i + j];                                                                     \
            k += m & 1;                                                                                                \
        }                                                                                                              \
    }
    if (wide) {
        GATHER(u32)
    } else {
        GATHER(u16)
    }
}

/* The inverse: other places of `out` stay as they are.  `values` may be read one beyond its end. */
SMELT_API void smelt_mask_scatter(const void *values, int wide, int64_t n, const u8 *mask, int want, void *out) {
    const u8 flip = want ? 0 : 255;
    size_t k = 0;
#define SCATTER(T)                                                                                                     \
    for (int64_t i = 0; i < n; i += 8) {                                                                               \
        unsigned m = (u8)(mask[i >> 3] ^ flip);                                                                        \
        int64_t most = n - i < 8 ? n - i : 8;                                                                          \
        for (int64_t j = 0; j < most; j++, m >>= 1) {                                                                  \
            T here = ((T *)out)[i + j], there = ((const T *)values)[k];                                                \
            ((T *)out)[i + j] = (T)(here ^ ((here ^ there) & (T)(0 - (m & 1))));                                       \
            k += m & 1;                                                                                                \
        }                                                                                                              \
    }
    if (wide) {
        SCATTER(u32)
    } else {
        SCATTER(u16)
    }
}
