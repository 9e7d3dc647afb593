/* The vector decoder of rans.c for NEON: 8 lanes a vector, the upper and the lower halves of their states apart. */
#include "native.h"

#ifdef SMELT_NEON
#include <arm_neon.h>

#define INLINE static inline __attribute__((always_inline))

enum { VECTORS = LANES / 8, GROUPS = LANES / 16 };

typedef struct {
    uint16x8_t a, b; /* of 16 lanes */
} lanes16;

/* ---- tables of bytes in registers; those for 16 buckets use the first halves */

typedef struct {
    uint8x16x2_t from[2], own_freq[2], other_freq[2], bias[2]; /* [0]: the lower byte */
    uint8x16x2_t own_value, other_value;
} byte_tables;

INLINE void split(uint8x16x2_t *table, const u16 *p) {
    uint8x16x2_t x = vld2q_u8((const u8 *)p), y = vld2q_u8((const u8 *)(p + 16));
    for (int i = 0; i < 2; i++) table[i].val[0] = x.val[i], table[i].val[1] = y.val[i];
}

INLINE uint8x16x2_t plain(const u8 *p) { return (uint8x16x2_t){{vld1q_u8(p), vld1q_u8(p + 16)}}; }

INLINE void split_tables(byte_tables *t, const rans_table *table) {
    split(t->from, table->from);
    split(t->own_freq, table->own_freq);
    split(t->other_freq, table->other_freq);
    split(t->bias, table->bias);
    t->own_value = plain(table->own_value);
    t->other_value = plain(table->other_value);
}

INLINE uint8x16_t look(uint8x16x2_t table, uint8x16_t index, int k) {
    return k == 16 ? vqtbl1q_u8(table.val[0], index) : vqtbl2q_u8(table, index);
}

INLINE uint8x16_t look_either(uint8x16x2_t own, uint8x16x2_t other, uint8x16_t index, int k, uint8x16_t where) {
    return vbslq_u8(where, look(other, index, k), look(own, index, k));
}

INLINE lanes16 unpack(uint8x16_t low, uint8x16_t high) {
    return (lanes16){vreinterpretq_u16_u8(vzip1q_u8(low, high)), vreinterpretq_u16_u8(vzip2q_u8(low, high))};
}

INLINE uint8x16_t lower_bytes(uint16x8_t a, uint16x8_t b) {
    return vuzp1q_u8(vreinterpretq_u8_u16(a), vreinterpretq_u8_u16(b));
}

INLINE lanes16 find(const byte_tables *t, uint16x8_t low_a, uint16x8_t low_b, lanes16 *rank, u8 *out, int k) {
    uint8x16_t i = vandq_u8(lower_bytes(low_a, low_b), vdupq_n_u8((u8)(k - 1)));
    lanes16 from = unpack(look(t->from[0], i, k), look(t->from[1], i, k));
    uint8x16_t other = lower_bytes(vcgeq_u16(low_a, from.a), vcgeq_u16(low_b, from.b));
    vst1q_u8(out, look_either(t->own_value, t->other_value, i, k, other));
    lanes16 bias = unpack(vandq_u8(look(t->bias[0], i, k), other), vandq_u8(look(t->bias[1], i, k), other));
    rank->a = vaddq_u16(bias.a, k == 16 ? vshrq_n_u16(low_a, 4) : vshrq_n_u16(low_a, 5));
    rank->b = vaddq_u16(bias.b, k == 16 ? vshrq_n_u16(low_b, 4) : vshrq_n_u16(low_b, 5));
    return unpack(look_either(t->own_freq[0], t->other_freq[0], i, k, other),
                  look_either(t->own_freq[1], t->other_freq[1], i, k, other));
}

/* ---- the states */

/* freq * high + rank; returns which upper halves are 0 then. */
INLINE uint16x8_t advance(uint16x8_t *high, uint16x8_t *low, uint16x8_t freq, uint16x8_t rank) {
    uint32x4_t x = vaddw_u16(vmull_u16(vget_low_u16(freq), vget_low_u16(*high)), vget_low_u16(rank));
    uint32x4_t y = vaddw_high_u16(vmull_high_u16(freq, *high), rank);
    *low = vuzp1q_u16(vreinterpretq_u16_u32(x), vreinterpretq_u16_u32(y));
    *high = vuzp2q_u16(vreinterpretq_u16_u32(x), vreinterpretq_u16_u32(y));
    return vceqzq_u16(*high);
}

/* A byte for each 8 lanes. */
INLINE uint8x16_t bits(const uint8x16_t *empty) {
    static const u8 bit[16] = {1, 2, 4, 8, 16, 32, 64, 128, 1, 2, 4, 8, 16, 32, 64, 128};
    uint8x16_t s[GROUPS];
    for (int g = 0; g < GROUPS; g++) s[g] = vandq_u8(empty[g], vld1q_u8(bit));
    for (int n = GROUPS / 2; n; n /= 2)
        for (int g = 0; g < n; g++) s[g] = vpaddq_u8(s[2 * g], s[2 * g + 1]);
    return s[0];
}

/* spread[m] moves words in a row to those of 8 lanes whose bits are set in m, and 0 to the others. */
#define ONES(m) ((m & 1) + (m >> 1 & 1) + (m >> 2 & 1) + (m >> 3 & 1) + (m >> 4 & 1) + (m >> 5 & 1) + (m >> 6 & 1))
#define PLACE(m, i) ((m) >> i & 1 ? 0x100 + 0x202 * ONES(((m) & ((1 << i) - 1))) : 0x8080)
#define ROW(m) {PLACE(m, 0), PLACE(m, 1), PLACE(m, 2), PLACE(m, 3), PLACE(m, 4), PLACE(m, 5), PLACE(m, 6), PLACE(m, 7)}
#define ROWS4(m) ROW(m), ROW((m) + 1), ROW((m) + 2), ROW((m) + 3)
#define ROWS16(m) ROWS4(m), ROWS4((m) + 4), ROWS4((m) + 8), ROWS4((m) + 12)
#define ROWS64(m) ROWS16(m), ROWS16((m) + 16), ROWS16((m) + 32), ROWS16((m) + 48)
static const u16 spread[256][8] = {ROWS64(0), ROWS64(64), ROWS64(128), ROWS64(192)};

INLINE void take(uint16x8_t *high, uint16x8_t *low, const u8 *words, u8 m) {
    uint8x16_t taken = vqtbl1q_u8(vld1q_u8(words), vreinterpretq_u8_u16(vld1q_u16(spread[m])));
    uint16x8_t none = vceqzq_u16(*high);
    *high = vbslq_u16(none, *low, *high);
    *low = vbslq_u16(none, vreinterpretq_u16_u8(taken), *low);
}

INLINE const u8 *take_words(uint16x8_t *high, uint16x8_t *low, const uint8x16_t *empty, const u8 *words) {
    u8 masks[VECTORS], counts[VECTORS];
    uint8x16_t m = bits(empty);
    vst1q_u8(masks, m);
    vst1q_u8(counts, vcntq_u8(m));
    for (int v = 0; v < VECTORS; v++) {
        take(high + v, low + v, words, masks[v]);
        words += 2 * counts[v];
    }
    return words;
}

/* Each part of a step is done for all lanes before the next one, so that the processor has enough to do at once. */
INLINE size_t run(const rans_table *table, rans_lanes *lanes, size_t steps, u8 *out, int k) {
    uint16x8_t high[VECTORS], low[VECTORS];
    const u8 *words = lanes->words;
    byte_tables t;
    size_t done = 0;
    split_tables(&t, table);
    for (int v = 0; v < VECTORS; v++) high[v] = vld1q_u16(lanes->high + 8 * v), low[v] = vld1q_u16(lanes->low + 8 * v);
    for (; done < steps && lanes->end - words >= 2 * LANES; done++, out += LANES) {
        uint8x16_t empty[GROUPS];
        for (int g = 0; g < GROUPS; g++) {
            uint16x8_t *h = high + 2 * g, *l = low + 2 * g;
            lanes16 rank, freq = find(&t, l[0], l[1], &rank, out + 16 * g, k);
            uint16x8_t empty_a = advance(h, l, freq.a, rank.a);
            empty[g] = lower_bytes(empty_a, advance(h + 1, l + 1, freq.b, rank.b));
        }
        words = take_words(high, low, empty, words);
    }
    for (int v = 0; v < VECTORS; v++) vst1q_u16(lanes->high + 8 * v, high[v]), vst1q_u16(lanes->low + 8 * v, low[v]);
    lanes->words = words;
    return done;
}

/* Tables of 256 buckets do not fit in registers: the portable decoder is as good. */
size_t rans_run_neon(const rans_table *table, rans_lanes *lanes, size_t steps, u8 *out) {
    return table->buckets == 16   ? run(table, lanes, steps, out, 16)
           : table->buckets == 32 ? run(table, lanes, steps, out, 32)
                                  : 0;
}
#endif
