/* The vector decoder of rans.c for AVX2: 16 lanes a vector, the upper and the lower halves of their states apart.
   Two vectors hold 32 lanes in a row: one the lanes 0-7 and 16-23, the other 8-15 and 24-31.  Packed to bytes they are
   in their natural order, and unpacked again they are where they were. */
#include "native.h"

#ifdef SMELT_X86
#include <immintrin.h>

#define AVX2 __attribute__((target("avx2,bmi,bmi2,popcnt")))
#define INLINE static inline AVX2 __attribute__((always_inline))
#define NOINLINE static AVX2 __attribute__((noinline))

enum { GROUPS = LANES / 32 };

typedef struct {
    __m256i a, b;
} lanes32;

INLINE __m256i load(const void *p) { return _mm256_loadu_si256(p); }
INLINE void store(void *p, __m256i v) { _mm256_storeu_si256(p, v); }

INLINE __m256i load_halves(const void *low, const void *high) {
    return _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128(low)), _mm_loadu_si128(high), 1);
}

INLINE lanes32 exchange(__m256i x, __m256i y) {
    return (lanes32){_mm256_permute2x128_si256(x, y, 0x20), _mm256_permute2x128_si256(x, y, 0x31)};
}

INLINE void load_lanes(lanes32 *to, const u16 *from) {
    for (int g = 0; g < GROUPS; g++) to[g] = exchange(load(from + 32 * g), load(from + 32 * g + 16));
}

INLINE void store_lanes(u16 *to, const lanes32 *from) {
    for (int g = 0; g < GROUPS; g++) {
        lanes32 x = exchange(from[g].a, from[g].b);
        store(to + 32 * g, x.a);
        store(to + 32 * g + 16, x.b);
    }
}

INLINE __m256i not_below(__m256i v, __m256i from) { return _mm256_cmpeq_epi16(_mm256_max_epu16(v, from), v); }

/* ---- 16 and 32 buckets: tables of bytes in registers */

typedef struct {
    __m256i first, second; /* 16 entries each, twice */
} bytes;
typedef struct {
    bytes from[2], freq[2], freq_change[2], bias[2]; /* [0]: the lower byte */
    bytes value, value_change;
} byte_tables;

INLINE __m256i twice(__m128i v) { return _mm256_broadcastsi128_si256(v); }

INLINE __m256i byte_of(const u16 *p, int shift) {
    const __m128i mask = _mm_set1_epi16(255);
    __m128i x = _mm_loadu_si128((const void *)p), y = _mm_loadu_si128((const void *)(p + 8));
    x = _mm_and_si128(_mm_srli_epi16(x, shift), mask);
    y = _mm_and_si128(_mm_srli_epi16(y, shift), mask);
    return twice(_mm_packus_epi16(x, y));
}

INLINE void split(bytes *table, const u16 *p) {
    for (int i = 0; i < 2; i++) table[i] = (bytes){byte_of(p, 8 * i), byte_of(p + 16, 8 * i)};
}

INLINE bytes plain(const u8 *p) {
    return (bytes){twice(_mm_loadu_si128((const void *)p)), twice(_mm_loadu_si128((const void *)(p + 16)))};
}

INLINE bytes exclusive_or(bytes x, bytes y) {
    return (bytes){_mm256_xor_si256(x.first, y.first), _mm256_xor_si256(x.second, y.second)};
}

INLINE void split_tables(byte_tables *t, const rans_table *table) {
    split(t->from, table->from);
    split(t->bias, table->bias);
    split(t->freq, table->own_freq);
    split(t->freq_change, table->other_freq);
    for (int i = 0; i < 2; i++) t->freq_change[i] = exclusive_or(t->freq_change[i], t->freq[i]);
    t->value = plain(table->own_value);
    t->value_change = exclusive_or(plain(table->other_value), t->value);
}

/* A byte with bit 7 set looks up 0. */
INLINE bytes indexes(__m256i bucket, int k) {
    if (k == 16) return (bytes){bucket, bucket};
    return (bytes){_mm256_add_epi8(bucket, _mm256_set1_epi8(0x70)), _mm256_sub_epi8(bucket, _mm256_set1_epi8(16))};
}

INLINE __m256i look(bytes t, bytes index, int k) {
    __m256i v = _mm256_shuffle_epi8(t.first, index.first);
    return k == 16 ? v : _mm256_or_si256(v, _mm256_shuffle_epi8(t.second, index.second));
}

INLINE __m256i look_changed(bytes t, bytes change, bytes index, int k, __m256i where) {
    return _mm256_xor_si256(look(t, index, k), _mm256_and_si256(look(change, index, k), where));
}

INLINE lanes32 unpack(__m256i low, __m256i high) {
    return (lanes32){_mm256_unpacklo_epi8(low, high), _mm256_unpackhi_epi8(low, high)};
}

INLINE lanes32 find(const byte_tables *t, lanes32 low, lanes32 *rank, u8 *out, int k) {
    const __m256i mask = _mm256_set1_epi16((short)(k - 1));
    const int shift = k == 16 ? 4 : 5;
    bytes i = indexes(_mm256_packus_epi16(_mm256_and_si256(low.a, mask), _mm256_and_si256(low.b, mask)), k);
    lanes32 from = unpack(look(t->from[0], i, k), look(t->from[1], i, k));
    __m256i other = _mm256_packs_epi16(not_below(low.a, from.a), not_below(low.b, from.b));
    store(out, look_changed(t->value, t->value_change, i, k, other));
    lanes32 bias = unpack(_mm256_and_si256(look(t->bias[0], i, k), other),
                          _mm256_and_si256(look(t->bias[1], i, k), other));
    rank->a = _mm256_add_epi16(_mm256_srli_epi16(low.a, shift), bias.a);
    rank->b = _mm256_add_epi16(_mm256_srli_epi16(low.b, shift), bias.b);
    return unpack(look_changed(t->freq[0], t->freq_change[0], i, k, other),
                  look_changed(t->freq[1], t->freq_change[1], i, k, other));
}

/* ---- 256 buckets: gathered */

typedef struct {
    u32 place[256];  /* from | bias << 16 */
    u32 symbol[512]; /* freq | value << 16: own, other */
} gather_tables;

static AVX2 void join_tables(gather_tables *t, const rans_table *table) {
    for (int b = 0; b < 256; b++) t->place[b] = table->from[b] | (u32)table->bias[b] << 16;
    for (int b = 0; b < 256; b++) t->symbol[b] = table->own_freq[b] | (u32)table->own_value[b] << 16;
    for (int b = 0; b < 256; b++) t->symbol[256 + b] = table->other_freq[b] | (u32)table->other_value[b] << 16;
}

/* For 16 indexes the lower halves of their entries, and to *upper the upper ones. */
INLINE __m256i gather(const u32 *table, __m256i index, __m256i *upper) {
    __m256i even = _mm256_and_si256(index, _mm256_set1_epi32(0xFFFF)), odd = _mm256_srli_epi32(index, 16);
    even = _mm256_i32gather_epi32((const int *)table, even, 4);
    odd = _mm256_i32gather_epi32((const int *)table, odd, 4);
    *upper = _mm256_blend_epi16(_mm256_srli_epi32(even, 16), odd, 0xAA);
    return _mm256_blend_epi16(even, _mm256_slli_epi32(odd, 16), 0xAA);
}

/* The index of the symbol. */
INLINE __m256i find_place(const u32 *places, __m256i low, __m256i *rank) {
    __m256i bucket = _mm256_and_si256(low, _mm256_set1_epi16(255)), bias;
    __m256i other = not_below(low, gather(places, bucket, &bias));
    *rank = _mm256_add_epi16(_mm256_srli_epi16(low, 8), _mm256_and_si256(bias, other));
    return _mm256_or_si256(bucket, _mm256_and_si256(other, _mm256_set1_epi16(256)));
}

INLINE lanes32 find_symbol(const u32 *symbols, lanes32 index, u8 *out) {
    lanes32 value, freq;
    freq.a = gather(symbols, index.a, &value.a);
    freq.b = gather(symbols, index.b, &value.b);
    store(out, _mm256_packus_epi16(value.a, value.b));
    return freq;
}

/* ---- the states */

/* freq * high + rank: its lower halves to *low; returns the upper ones. */
INLINE __m256i multiply(__m256i freq, __m256i high, __m256i rank, __m256i *low) {
    *low = _mm256_add_epi16(_mm256_mullo_epi16(freq, high), rank);
    __m256i carry = _mm256_min_epu16(_mm256_subs_epu16(rank, *low), _mm256_set1_epi16(1));
    return _mm256_add_epi16(_mm256_mulhi_epu16(freq, high), carry);
}

/* A bit for each lane whose upper half is 0 then. */
INLINE u32 advance(lanes32 *high, lanes32 *low, lanes32 freq, lanes32 rank) {
    const __m256i zero = _mm256_setzero_si256();
    high->a = multiply(freq.a, high->a, rank.a, &low->a);
    high->b = multiply(freq.b, high->b, rank.b, &low->b);
    return (u32)_mm256_movemask_epi8(
        _mm256_packs_epi16(_mm256_cmpeq_epi16(high->a, zero), _mm256_cmpeq_epi16(high->b, zero)));
}

/* spread[m] moves words in a row to those of 8 lanes whose bits are set in m, and 0 to the others. */
#define ONES(m) ((m & 1) + (m >> 1 & 1) + (m >> 2 & 1) + (m >> 3 & 1) + (m >> 4 & 1) + (m >> 5 & 1) + (m >> 6 & 1))
#define PLACE(m, i) ((m) >> i & 1 ? 0x100 + 0x202 * ONES(((m) & ((1 << i) - 1))) : 0x8080)
#define ROW(m) {PLACE(m, 0), PLACE(m, 1), PLACE(m, 2), PLACE(m, 3), PLACE(m, 4), PLACE(m, 5), PLACE(m, 6), PLACE(m, 7)}
#define ROWS4(m) ROW(m), ROW((m) + 1), ROW((m) + 2), ROW((m) + 3)
#define ROWS16(m) ROWS4(m), ROWS4((m) + 4), ROWS4((m) + 8), ROWS4((m) + 12)
#define ROWS64(m) ROWS16(m), ROWS16((m) + 16), ROWS16((m) + 32), ROWS16((m) + 48)
static const _Alignas(16) u16 spread[256][8] = {ROWS64(0), ROWS64(64), ROWS64(128), ROWS64(192)};

INLINE size_t bytes_taken(u32 m) { return 2 * (size_t)(u32)_mm_popcnt_u32(m); }

INLINE void take(__m256i *high, __m256i *low, const u8 *words0, u32 m0, const u8 *words1, u32 m1) {
    __m256i none = _mm256_cmpeq_epi16(*high, _mm256_setzero_si256());
    __m256i taken = _mm256_shuffle_epi8(load_halves(words0, words1), load_halves(spread[m0 & 255], spread[m1 & 255]));
    *high = _mm256_or_si256(*high, _mm256_and_si256(none, *low));
    *low = _mm256_or_si256(_mm256_andnot_si256(none, *low), taken);
}

INLINE const u8 *take_words(lanes32 *high, lanes32 *low, u32 m, const u8 *words) {
    const u8 *words1 = words + bytes_taken(m & 0xFF), *words2 = words + bytes_taken(m & 0xFFFF);
    take(&high->a, &low->a, words, m, words2, m >> 16);
    take(&high->b, &low->b, words1, m >> 8, words + bytes_taken(m & 0xFFFFFF), m >> 24);
    return words + bytes_taken(m);
}

/* ----
   Each part of a step is done for all lanes before the next one, so that the processor has enough to do at once. */

INLINE void step256(const gather_tables *t, lanes32 *high, lanes32 *low, u8 *out, u32 *empty) {
    lanes32 rank[GROUPS], index[GROUPS];
    for (int g = 0; g < GROUPS; g++) {
        index[g].a = find_place(t->place, low[g].a, &rank[g].a);
        index[g].b = find_place(t->place, low[g].b, &rank[g].b);
    }
    for (int g = 0; g < GROUPS; g++)
        empty[g] = advance(high + g, low + g, find_symbol(t->symbol, index[g], out + 32 * g), rank[g]);
}

INLINE void step(const byte_tables *t, lanes32 *high, lanes32 *low, u8 *out, u32 *empty, int k) {
    for (int g = 0; g < GROUPS; g++) {
        lanes32 rank, freq = find(t, low[g], &rank, out + 32 * g, k);
        empty[g] = advance(high + g, low + g, freq, rank);
    }
}

INLINE size_t run(const void *tables, rans_lanes *lanes, size_t steps, u8 *out, int k) {
    lanes32 high[GROUPS], low[GROUPS];
    const u8 *words = lanes->words;
    size_t done = 0;
    load_lanes(high, lanes->high);
    load_lanes(low, lanes->low);
    for (; done < steps && lanes->end - words >= 2 * LANES; done++, out += LANES) {
        u32 empty[GROUPS];
        _mm_prefetch((const char *)words + 1024, _MM_HINT_T0);
        if (k == 256) step256(tables, high, low, out, empty);
        else step(tables, high, low, out, empty, k);
        for (int g = 0; g < GROUPS; g++) words = take_words(high + g, low + g, empty[g], words);
    }
    store_lanes(lanes->high, high);
    store_lanes(lanes->low, low);
    lanes->words = words;
    return done;
}

NOINLINE size_t run16(const rans_table *table, rans_lanes *lanes, size_t steps, u8 *out) {
    byte_tables t;
    split_tables(&t, table);
    return run(&t, lanes, steps, out, 16);
}

NOINLINE size_t run32(const rans_table *table, rans_lanes *lanes, size_t steps, u8 *out) {
    byte_tables t;
    split_tables(&t, table);
    return run(&t, lanes, steps, out, 32);
}

NOINLINE size_t run256(const rans_table *table, rans_lanes *lanes, size_t steps, u8 *out) {
    gather_tables t;
    join_tables(&t, table);
    return run(&t, lanes, steps, out, 256);
}

size_t rans_run_avx2(const rans_table *table, rans_lanes *lanes, size_t steps, u8 *out) {
    return table->buckets == 16   ? run16(table, lanes, steps, out)
           : table->buckets == 32 ? run32(table, lanes, steps, out)
                                  : run256(table, lanes, steps, out);
}
#endif
