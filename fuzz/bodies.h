/* Valid bodies of chunks, also such as no encoder writes, for the fuzz targets. */
#ifndef SMELT_FUZZ_BODIES_H
#define SMELT_FUZZ_BODIES_H

#include "rans.h"
#include "split.h"

SMELT_API int64_t smelt_chunk_bound(size_t count, int width);
SMELT_API int64_t smelt_chunk_encode(const void *elements, size_t count, int width, int kind, int coder, u8 *out,
                                     size_t cap);
SMELT_API int smelt_chunk_decode(const u8 *body, size_t size, void *elements, size_t count, int width, int level);
SMELT_API int smelt_chunk_decode_checked(const u8 *body, size_t size, void *elements, size_t count, int width,
                                         int level, u32 crc);

/* Random numbers: the bytes of an input while there are some, then what follows from `state`. */
typedef struct {
    const u8 *data;
    size_t left;
    u64 state;
} dice;

dice dice_of(const u8 *data, size_t size);
u64 noise(dice *d);                /* of `state` alone */
u32 roll(dice *d, u32 sides);      /* below `sides` */
int kind_for(dice *d, int width);  /* of the encoder */
size_t some_count(dice *d);        /* up to 70,000, and of those the ones where something changes */
void fill(dice *d, int width, size_t count, u8 *elements); /* with what weights, indices and the like look like */

/* A body of `count` elements and what they are.  Returns its size, or 0 where it would not fit. */
size_t make_body(dice *d, int width, size_t count, u8 *elements, u8 *out, size_t cap);

/* The body of an input put into another one; *width and *count change with it.  0 where it does not fit. */
size_t wrap_body(dice *d, const u8 *body, size_t size, int *width, size_t *count, u8 *out, size_t cap);

/* An input of decode_chunk: byte 0 has log2 of the width in bits 0-1; in the others 42 for a large chunk; u24: count. */
enum { HEAD = 4, USUAL = 70000, LARGE = 42, MOST_ELEMENTS = 1 << 20 };
void write_head(u8 *out, int width, size_t count);
void read_head(const u8 *in, int *width, size_t *count);

#endif
