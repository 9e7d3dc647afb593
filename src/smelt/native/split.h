/* Elements as symbols and rest, and back (docs/format.md, kind "split"). */
#ifndef SMELT_SPLIT_H
#define SMELT_SPLIT_H

#include "native.h"

/* How an element of `width` bytes is cut: the lowest `rest` bits, after a rotation to the left by `rotate` (0 or 1)
   bits, are stored as they are; the 1 to 8 bits above them are the symbol. */
typedef struct {
    int width, rest, rotate;
} cut;

/* Bytes of the raw parts of `count` elements. */
size_t parts_size(size_t count, int rest);

/* symbols[0..count) and the parts; either may be NULL. */
void split_elements(int level, cut c, const u8 *elements, size_t count, u8 *symbols, u8 *parts);

/* Elements [begin, begin + count) of `total` to `out`; `symbols` are theirs alone, `parts` those of all.
   begin is a multiple of 128. */
void join_elements(int level, cut c, const u8 *symbols, const u8 *parts, size_t total, size_t begin, size_t count,
                   u8 *out);

/* Each element of `width` bytes from (or to) one of half its width; upper: the upper half (lower ones are 0). */
void widen(const u8 *halves, size_t count, int width, int upper, u8 *out);
void narrow(const u8 *elements, size_t count, int width, int upper, u8 *out);

/* out[i] is the next of the values where mask[i] is 1, and 0 where it is 0; mask has `kept` ones.  values has room for one
   element more, which may be read. */
size_t spread_avx512(const u8 *values, size_t kept, const u8 *mask, size_t count, int width, u8 *out); /* a part */
void spread(int level, const u8 *values, size_t kept, const u8 *mask, size_t count, int width, u8 *out);
/* The inverse: the mask, and the values, which have room for one element more; returns their number. */
size_t gather(const u8 *elements, size_t count, int width, u8 *mask, u8 *values);

/* binary32 from binary16 and, where exact, back; half_exactly returns 0 if it is not. */
u32 single_of(u16 half);
int half_exactly(u32 single, u16 *half);

#endif
