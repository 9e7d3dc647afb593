/* The alias method with AVX-512: 32 lanes a vector, tables of up to 32 buckets in registers.

   A state is two 16-bit words.  The low bits of `low` are the bucket, which is the index that vpermw looks up;
   x = frequency * high + rank is a 16 x 16 bit product with carry; a word is read where `high` became 0. */
#include "folding.h"
#include "rans.h"
#include "split.h"

#if defined(SMELT_X86)
#include <immintrin.h>

#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512vbmi,avx512vbmi2,popcnt,bmi2")))
/* Carry-less products only where the caller found has_wide_folding(). */
#define WIDE_TARGET                                                                                                    \
    __attribute__((target("avx512f,avx512bw,avx512vl,avx512vbmi,avx512vbmi2,popcnt,bmi2,pclmul,vpclmulqdq")))

typedef struct {
    __m512i from, own, other, bias, values; /* values: its own in the high byte, the other in the low one */
} registers;

TARGET static inline __m512i wide(const u8 *values, int k) {
    __m256i v = k == 32 ? _mm256_loadu_si256((const __m256i *)values)
                        : _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)values));
    return _mm512_cvtepu8_epi16(v);
}

TARGET static inline __m512i words_of(const u16 *values, int k) {
    return k == 32 ? _mm512_loadu_si512(values)
                   : _mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i *)values));
}

TARGET static inline registers load_table(const rans_table *t) {
    const int k = t->buckets;
    const __m512i own = _mm512_slli_epi16(wide(t->own_value, k), 8), other = wide(t->other_value, k);
    return (registers){words_of(t->from, k), words_of(t->own_freq, k), words_of(t->other_freq, k), words_of(t->bias, k),
                       _mm512_or_si512(own, other)};
}

/* One symbol of 32 lanes, in the high bytes; the low ones hold anything. */
TARGET static inline __m512i next(const registers *t, int shift, __m512i *high, __m512i *low, const u8 **words) {
    const __m512i l = *low, h = *high;
    const __mmask32 k = _mm512_cmpge_epu16_mask(l, _mm512_permutexvar_epi16(l, t->from));
    const __m512i f = _mm512_mask_permutexvar_epi16(_mm512_permutexvar_epi16(l, t->own), k, l, t->other);
    const __m512i both = _mm512_permutexvar_epi16(l, t->values);
    const __m512i position = _mm512_srli_epi16(l, (unsigned)shift);
    const __m512i rank = _mm512_add_epi16(position, _mm512_maskz_permutexvar_epi16(k, l, t->bias));
    const __m512i lo = _mm512_add_epi16(_mm512_mullo_epi16(f, h), rank);
    __m512i hi = _mm512_mulhi_epu16(f, h);
    hi = _mm512_mask_sub_epi16(hi, _mm512_cmplt_epu16_mask(lo, rank), hi, _mm512_set1_epi16(-1));
    const __mmask32 empty = _mm512_testn_epi16_mask(hi, hi);
    *high = _mm512_mask_mov_epi16(hi, empty, lo);
    *low = _mm512_mask_expand_epi16(lo, empty, _mm512_loadu_si512(*words));
    *words += 2 * (unsigned)__builtin_popcount(empty);
    return _mm512_mask_slli_epi16(both, k, both, 8);
}

#define LOAD_LANES                                                                                                     \
    __m512i high[4], low[4];                                                                                           \
    for (int g = 0; g < 4; g++)                                                                                        \
        high[g] = _mm512_loadu_si512(lanes->high + 32 * g), low[g] = _mm512_loadu_si512(lanes->low + 32 * g);          \
    const u8 *w = lanes->words;                                                                                        \
    size_t done = 0;

#define STORE_LANES                                                                                                    \
    for (int g = 0; g < 4; g++)                                                                                        \
        _mm512_storeu_si512(lanes->high + 32 * g, high[g]), _mm512_storeu_si512(lanes->low + 32 * g, low[g]);          \
    lanes->words = w;                                                                                                  \
    return done;

/* A step takes at most 256 bytes, and its last vector of words begins no later than byte 192. */
#define FAR (lanes->end - w >= 256)

/* Steps until the table changes: all of them where there is one table. */
#define EACH_TABLE                                                                                                     \
    for (size_t stop; done < steps && FAR;) {                                                                          \
        const registers t = load_table(tables + (classes ? *classes++ : 0));                                           \
        stop = classes && steps - done > BLOCK / LANES ? done + BLOCK / LANES : steps;                                 \
        for (; done < stop && FAR; done++)

/* What is read next may lie on a page on which the processor has not begun to look ahead.  A macro: gcc 12 takes
   functions that only prefetch to do nothing. */
enum { AHEAD = 2048 };
#define PREFETCH(DATA) _mm_prefetch((const char *)(DATA), _MM_HINT_T0)

#define INLINE static inline __attribute__((always_inline))
#define MASKED_OR 0xEC /* of a, b, c: (a & c) | b */

TARGET INLINE size_t run_bytes(const rans_table *tables, const u8 *classes, rans_lanes *lanes, size_t steps, u8 *out,
                               const int shift) {
    const __m512i highs = _mm512_set1_epi16((short)0xFF00);
    u8 places[64]; /* bytes 0, 2, 4 ..., then 1, 3, 5 ... */
    for (int i = 0; i < 64; i++) places[i] = (u8)(2 * (i & 31) + (i >> 5));
    const __m512i order = _mm512_loadu_si512(places);
    LOAD_LANES
    EACH_TABLE {
        PREFETCH(w + AHEAD / 2), PREFETCH(out + LANES * done + AHEAD), PREFETCH(out + LANES * done + AHEAD + 64);
        _Pragma("GCC unroll 2") for (int g = 0; g < 4; g += 2) {
            const __m512i a = next(&t, shift, high + g, low + g, &w), b = next(&t, shift, high + g + 1, low + g + 1, &w);
            const __m512i x = _mm512_ternarylogic_epi32(b, _mm512_srli_epi16(a, 8), highs, MASKED_OR);
            _mm512_storeu_si512(out + LANES * done + 32 * (size_t)g, _mm512_permutexvar_epi8(order, x));
        }
    }
    }
    STORE_LANES
}

/* Exponents joined at once: out = (value << 8 | rest) rotated right by one bit.  The CRC of `rest` costs little here,
   where one waits for the states anyway. */
WIDE_TARGET INLINE size_t run_bf16(const rans_table *tables, const u8 *classes, rans_lanes *lanes, size_t steps,
                                   const u8 *rest, u8 *out, u32 *crc, const int shift, const int past, const int summed) {
    const __m512i highs = _mm512_set1_epi16((short)0xFF00);
    const __m512i times = _mm512_broadcast_i32x4(constants(TIMES_X1024));
    __m512i sums[2] = {_mm512_setzero_si512(), _mm512_setzero_si512()};
    __m512i before = summed ? _mm512_zextsi128_si512(_mm_cvtsi32_si128((int)~*crc)) : sums[0];
    LOAD_LANES
    EACH_TABLE {
        PREFETCH(rest + LANES * done + AHEAD), PREFETCH(rest + LANES * done + AHEAD + 64), PREFETCH(w + AHEAD / 2);
        _Pragma("GCC unroll 4") for (int g = 0; g < 4; g++) {
            const size_t at = LANES * done + 32 * (size_t)g;
            __m512i x = next(&t, shift, high + g, low + g, &w);
            const __m512i y = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i *)(rest + at)));
            x = _mm512_ternarylogic_epi32(x, y, highs, MASKED_OR);
            x = _mm512_shrdi_epi16(x, x, 1);
            if (past) _mm512_stream_si512((void *)(out + 2 * at), x);
            else _mm512_storeu_si512(out + 2 * at, x);
        }
        if (summed) {
            const u8 *data = rest + LANES * done;
            sums[0] = wide_fold(sums[0], times, _mm512_xor_si512(_mm512_loadu_si512(data), before));
            sums[1] = wide_fold(sums[1], times, _mm512_loadu_si512(data + 64));
            before = _mm512_setzero_si512();
        }
    }
    }
    if (summed && done) {
        u8 last[64];
        _mm512_storeu_si512(last, wide_fold(sums[0], _mm512_broadcast_i32x4(constants(TIMES_X512)), sums[1]));
        *crc = ~crc32_folded(last);
    }
    if (past) _mm_sfence();
    STORE_LANES
}

TARGET size_t rans_run_avx512(const rans_table *tables, const u8 *classes, rans_lanes *lanes, size_t steps, u8 *out) {
    return tables->buckets == 16   ? run_bytes(tables, classes, lanes, steps, out, 4)
           : tables->buckets == 32 ? run_bytes(tables, classes, lanes, steps, out, 5)
                                   : 0;
}

#define BF16(NAME, SHIFT, PAST, SUMMED)                                                                                \
    WIDE_TARGET static size_t NAME(const rans_table *tables, const u8 *classes, rans_lanes *lanes, size_t steps,       \
                                   const u8 *rest, u8 *out, u32 *crc) {                                                \
        return run_bf16(tables, classes, lanes, steps, rest, out, crc, SHIFT, PAST, SUMMED);                           \
    }
BF16(bf16_16, 4, 0, 0)
BF16(bf16_32, 5, 0, 0)
BF16(bf16_16_past, 4, 1, 0)
BF16(bf16_32_past, 5, 1, 0)
BF16(bf16_16_summed, 4, 0, 1)
BF16(bf16_32_summed, 5, 0, 1)
BF16(bf16_16_past_summed, 4, 1, 1)
BF16(bf16_32_past_summed, 5, 1, 1)

size_t rans_run_bf16_avx512(const rans_table *tables, const u8 *classes, rans_lanes *lanes, size_t steps,
                            const u8 *rest, u8 *out, int past_cache, u32 *crc) {
    typedef size_t kernel(const rans_table *, const u8 *, rans_lanes *, size_t, const u8 *, u8 *, u32 *);
    static kernel *const kernels[2][2][2] = {
        {{bf16_16, bf16_16_summed}, {bf16_16_past, bf16_16_past_summed}},
        {{bf16_32, bf16_32_summed}, {bf16_32_past, bf16_32_past_summed}},
    };
    if (tables->buckets > 32) return 0;
    const int past = past_cache && (uintptr_t)out % 64 == 0;
    return kernels[tables->buckets == 32][past][crc != NULL](tables, classes, lanes, steps, rest, out, crc);
}

/* Of `spread` what whole vectors do; stops where one might read beyond the values. */
TARGET size_t spread_avx512(const u8 *values, size_t kept, const u8 *mask, size_t count, int width, u8 *out) {
    const u8 *end = values + kept * (size_t)width;
    size_t i = 0;
    for (; i + 64 <= count && end - values >= 64 * width; i += 64) {
        const __m512i bytes = _mm512_loadu_si512(mask + i);
        u64 k = _mm512_test_epi8_mask(bytes, bytes);
        for (int part = 0; part < width; part++, out += 64) {
            const __m512i x = _mm512_loadu_si512(values);
            const __mmask64 here = width == 1 ? k : k & (((u64)1 << 64 / width) - 1);
            const __m512i y = width == 1   ? _mm512_maskz_expand_epi8(here, x)
                              : width == 2 ? _mm512_maskz_expand_epi16((__mmask32)here, x)
                              : width == 4 ? _mm512_maskz_expand_epi32((__mmask16)here, x)
                                           : _mm512_maskz_expand_epi64((__mmask8)here, x);
            _mm512_storeu_si512(out, y);
            values += (size_t)__builtin_popcountll(here) * (size_t)width;
            if (width > 1) k >>= 64 / width;
        }
    }
    return i;
}

/* out[i] = map[in[i]]; count is a multiple of 64 */
TARGET void map_avx512(const u8 *map, const u8 *in, size_t count, u8 *out) {
    const __m512i a = _mm512_loadu_si512(map), b = _mm512_loadu_si512(map + 64);
    const __m512i c = _mm512_loadu_si512(map + 128), d = _mm512_loadu_si512(map + 192);
    for (size_t i = 0; i < count; i += 64) {
        const __m512i x = _mm512_loadu_si512(in + i);
        const __m512i low = _mm512_permutex2var_epi8(a, x, b), high = _mm512_permutex2var_epi8(c, x, d);
        _mm512_storeu_si512(out + i, _mm512_mask_blend_epi8(_mm512_movepi8_mask(x), low, high));
    }
}

/* How often a symbol stands in 1024 bytes. */
TARGET static inline u32 number_of(const __m512i *x, u8 symbol) {
    const __m512i wanted = _mm512_set1_epi8((char)symbol), one = _mm512_set1_epi8(1), zero = _mm512_setzero_si512();
    __m512i even = zero, odd = zero;
    for (int i = 0; i < 16; i += 2) {
        even = _mm512_mask_add_epi8(even, _mm512_cmpeq_epi8_mask(x[i], wanted), even, one);
        odd = _mm512_mask_add_epi8(odd, _mm512_cmpeq_epi8_mask(x[i + 1], wanted), odd, one);
    }
    return (u32)_mm512_reduce_add_epi64(_mm512_sad_epu8(_mm512_add_epi8(even, odd), zero));
}

/* One comparison an entry and vector: with few entries faster than a table of counters. */
TARGET void count_avx512(const u8 *entries, size_t count, int used, int16_t *counts) {
    __m512i x[16];
    for (; count; entries += 1024, count -= count < 1024 ? count : 1024) {
        const size_t number = count < 1024 ? count : 1024;
        for (size_t i = 0; i < 16; i++) {
            const size_t left = number > 64 * i ? number - 64 * i : 0;
            const __mmask64 here = left >= 64 ? ~(u64)0 : ((u64)1 << left) - 1;
            x[i] = _mm512_mask_loadu_epi8(_mm512_set1_epi8(-1), here, entries + (here ? 64 * i : 0));
        }
        for (int s = 0; s < used; s++) counts[s] = (int16_t)(counts[s] + (int)number_of(x, (u8)s));
    }
}

TARGET size_t histogram_avx512(const u8 *symbols, size_t count, const u8 *order, int used, u32 *counts) {
    u8 missing[256]; /* 0 for those that are compared */
    memset(missing, 255, sizeof missing);
    for (int s = 0; s < used; s++) missing[order[s]] = 0;
    const __m512i a = _mm512_loadu_si512(missing), b = _mm512_loadu_si512(missing + 64);
    const __m512i c = _mm512_loadu_si512(missing + 128), d = _mm512_loadu_si512(missing + 192);
    size_t begin = 0;
    for (; begin + 1024 <= count; begin += 1024) {
        __m512i x[16];
        for (int i = 0; i < 16; i++) {
            x[i] = _mm512_loadu_si512(symbols + begin + 64 * i);
            const __m512i low = _mm512_permutex2var_epi8(a, x[i], b), high = _mm512_permutex2var_epi8(c, x[i], d);
            const __mmask64 upper = _mm512_movepi8_mask(x[i]);
            u64 rare = _mm512_movepi8_mask(_mm512_mask_blend_epi8(upper, low, high));
            for (; rare; rare &= rare - 1) counts[symbols[begin + 64 * (size_t)i + (size_t)__builtin_ctzll(rare)]]++;
        }
        for (int s = 0; s < used; s++) counts[order[s]] += number_of(x, order[s]);
    }
    return begin;
}

/* ---- encoding: 16 lanes a vector; x / f by a reciprocal in binary32, at most one too small, then put right */

TARGET static inline __m512i look(const void *values, __m512i s, __m512i a, __m512i b, int k) {
    return k > 32 ? _mm512_i32gather_epi32(s, values, 4) : _mm512_permutex2var_epi32(a, s, b);
}

/* One block with one table. */
TARGET static inline u16 *code_block(const rans_coder *coder, const rans_plan *plan, const u8 *entries, size_t count,
                                     u16 *w, __m512i *x, int k) {
    const float *inverse = coder->inverse;
    const __m512i f0 = _mm512_loadu_si512(coder->freq), f1 = _mm512_loadu_si512(coder->freq + 16);
    const __m512i s0 = _mm512_loadu_si512(coder->start), s1 = _mm512_loadu_si512(coder->start + 16);
    const __m512i i0 = _mm512_loadu_si512(inverse), i1 = k > 16 ? _mm512_loadu_si512(inverse + 16) : i0;
    const __m128i shift = _mm_cvtsi32_si128(16 - plan->precision), by = _mm_cvtsi32_si128(log2_of((u32)k));
    const __m512i fine = _mm512_set1_epi32((1 << (16 - plan->precision)) - 1), word = _mm512_set1_epi32(65535);
    const __m512i one = _mm512_set1_epi32(1);
    for (size_t i = count; i; i -= LANES) {
        _Pragma("GCC unroll 8") for (int g = 7; g >= 0; g--) {
            const __m512i s = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(entries + i - LANES + 16 * g)));
            const __m512i f = look(coder->freq, s, f0, f1, k), start = look(coder->start, s, s0, s1, k);
            const __m512 inv = _mm512_castsi512_ps(look(inverse, s, i0, i1, k));
            const __mmask16 full = _mm512_cmpge_epu32_mask(_mm512_srli_epi32(x[g], 16), f);
            const unsigned number = (unsigned)__builtin_popcount(full);
            const __m256i out = _mm512_cvtepi32_epi16(_mm512_maskz_compress_epi32(full, x[g]));
            w -= number;
            _mm256_mask_storeu_epi16(w, (__mmask16)((1u << number) - 1), out);
            const __m512i y = _mm512_mask_srli_epi32(x[g], full, x[g], 16);
            __m512i q = _mm512_cvttps_epi32(_mm512_mul_ps(_mm512_cvtepu32_ps(y), inv));
            __m512i r = _mm512_sub_epi32(y, _mm512_mullo_epi32(q, f));
            const __mmask16 high = _mm512_cmpge_epi32_mask(r, f);
            r = _mm512_mask_sub_epi32(r, high, r, f), q = _mm512_mask_add_epi32(q, high, q, one);
            __m512i slot = _mm512_add_epi32(start, _mm512_srl_epi32(r, shift));
            slot = _mm512_and_si512(_mm512_i32gather_epi32(slot, coder->map, 2), word);
            slot = _mm512_add_epi32(slot, _mm512_sll_epi32(_mm512_and_si512(r, fine), by));
            x[g] = _mm512_or_si512(_mm512_slli_epi32(q, 16), slot);
        }
    }
    return w;
}

TARGET size_t rans_code_avx512(const rans_coder *coders, const rans_plan *plan, const u8 *classes, const u8 *entries,
                               size_t count, u16 *end, u32 *states) {
    __m512i x[8];
    u16 *w = end;
    for (int g = 0; g < 8; g++) x[g] = _mm512_set1_epi32(65536);
    while (count) {
        const size_t begin = classes ? (count - 1) / BLOCK * BLOCK : 0, number = classes ? classes[begin / BLOCK] : 0;
        const rans_coder *coder = coders + number;
        w = plan->buckets == 16   ? code_block(coder, plan, entries + begin, count - begin, w, x, 16)
            : plan->buckets == 32 ? code_block(coder, plan, entries + begin, count - begin, w, x, 32)
                                  : code_block(coder, plan, entries + begin, count - begin, w, x, 256);
        count = begin;
    }
    for (int g = 0; g < 8; g++) _mm512_storeu_si512(states + 16 * g, x[g]);
    return (size_t)(end - w);
}
#endif
