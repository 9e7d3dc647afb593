/* Between the file that reads and writes tables (rans.c), the one that codes symbols, and the chunks. */
#ifndef SMELT_RANS_H
#define SMELT_RANS_H

#include "native.h"

/* How a plane of symbols is written; see docs/format.md, "rANS". */
typedef struct {
    int buckets, precision, lanes; /* K, p, N */
    int entries, escape;           /* entries with the escape, and its number or -1 */
    int listed, tables;
    u8 values[256];
    u32 freq[MAX_TABLES][256]; /* in units of 2^(16-p) slots */
} rans_plan;

/* What the encoder needs of a table: rank -> slot in units. */
typedef struct {
    u32 freq[256], start[256]; /* in slots; first unit in `map` */
    float inverse[256];        /* of freq, never too large; 0 of 0 */
    u16 map[(1 << 14) + 2];
} rans_coder;

/* Frequencies (each used entry >= 1, each < 2^p, their sum 2^p) close to `counts`; at least two entries. */
void rans_normalise(const u32 *counts, int entries, int precision, u32 *freq);

/* The tables of one set of frequencies, for decoding, encoding or (NULL) neither. */
void rans_build(const rans_plan *plan, int table, rans_table *decoder, rans_coder *coder);

/* Everything from the coder byte up to the escapes.  Returns bytes, or NO_ROOM. */
int64_t rans_write_head(const rans_plan *plan, const u8 *classes, size_t blocks, u8 *out, size_t cap);

/* The inverse; classes has room for `blocks` entries.  Returns the bytes read, or DAMAGED. */
int64_t rans_read_head(rans_plan *plan, u8 *classes, size_t blocks, const u8 *in, size_t size);

/* Codes entry numbers backward: words end at `end`, the states go to `states`.  `count` is a multiple of the lanes.
   classes: the table of each block of 1024, or NULL.  Returns the number of words. */
typedef size_t rans_code(const rans_coder *coders, const rans_plan *plan, const u8 *classes, const u8 *entries,
                         size_t count, u16 *end, u32 *states);
rans_code rans_code_portable, rans_code_avx512;

/* rans_run_avx512 with exponents joined to sign and mantissa: out = u16 (symbol << 8 | rest), rotated right by one bit.
   past_cache: write to memory at once, which is faster where it would not stay in the cache anyway.
   crc: goes on by the bytes of `rest` that are used up; or NULL. */
size_t rans_run_bf16_avx512(const rans_table *tables, const u8 *classes, rans_lanes *lanes, size_t steps,
                            const u8 *rest, u8 *out, int past_cache, u32 *crc);

/* out[i] = map[in[i]]; count is a multiple of 64. */
void map_avx512(const u8 *map, const u8 *in, size_t count, u8 *out);

/* How often each entry below `used` stands in `entries`. */
void count_avx512(const u8 *entries, size_t count, int used, int16_t *counts);

/* Adds to counts[s] how often s stands in symbols[0 .. n); returns n, of which 64 is a divisor.  order: `used` <= 32
   symbols, which should be nearly all that occur. */
size_t histogram_avx512(const u8 *symbols, size_t count, const u8 *order, int used, u32 *counts);

static inline int log2_of(u32 v) {
    int n = 0;
    while (v >>= 1) n++;
    return n;
}

/* Varints; put_varint writes at most 7 bytes, get_varint returns the bytes read or 0. */
static inline size_t put_varint(u8 *p, u64 v) {
    size_t n = 0;
    for (; v > 127; v >>= 7) p[n++] = (u8)(v | 128);
    p[n++] = (u8)v;
    return n;
}

static inline size_t get_varint(const u8 *p, size_t size, u64 *v) {
    *v = 0;
    for (size_t n = 0; n < 7 && n < size; n++) {
        *v |= (u64)(p[n] & 127) << 7 * n;
        if (p[n] < 128) return n + 1;
    }
    return 0;
}

#endif
