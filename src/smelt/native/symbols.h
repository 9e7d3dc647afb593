/* Planes of symbols back to elements, with the checksum of the body they are in. */
#ifndef SMELT_SYMBOLS_H
#define SMELT_SYMBOLS_H

#include "split.h"

enum { MOST = 1 << 20 /* elements of a chunk */ };

/* Checksums of a body in pieces, each just after it was read, while it is still in the cache: one for every raw part and
   one for the symbols. */
typedef struct {
    const u8 *begin, *at, *end;
    u32 crc;
} piece;

typedef struct {
    int number; /* 0: nobody asks */
    piece pieces[8];
    u32 crc;
} checksum;

/* The piece as far as `to`. */
void sum_up(piece *p, const u8 *to, int level);

/* `in` begins with the coder byte and is used up; `parts` are the raw parts of the cut.  Returns OK, DAMAGED (also where
   the checksum differs) or NO_MEMORY. */
int decode_symbols(const u8 *in, size_t size, const u8 *parts, cut c, u8 *out, size_t count, int level, checksum *sum);

#endif
