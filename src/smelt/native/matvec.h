/* Between the files of products of a matrix of codes with a few vectors: matvec.c has the loops for any machine and
   the choice, matvec_avx2.c and matvec_avx512.c those of x86.

   A matrix [rows, columns] lies in tiles of ROWS rows, the last of which may be filled up.  A word of 32 bits has
   8 codes of 4 bits or 4 codes of 8 bits of one row, the first in the lowest bits; the ROWS words of a tile for the
   same columns lie together, so that a vector has a lane for each row and nothing is summed across lanes. */
#ifndef SMELT_MATVEC_H
#define SMELT_MATVEC_H

#include "native.h"

enum { ROWS = 16 };

/* What codes are.  TABLE, NIBBLES_OF: indices of 8 and 4 bits.  LEVELS: bytes that are 128 more than the level.
   STEPS: 4 bits, what the level is more than the lowest; the first 4 columns of a word are in the lower halves of its
   bytes, the others in the upper ones. */
enum { LEVELS = 0, TABLE = 1, NIBBLES_OF = 2, STEPS = 3, CODINGS = 4 };

typedef struct {
    const u32 *codes;    /* [tiles][columns / codes of a word][ROWS] */
    const float *scale;  /* [tiles][groups][ROWS] */
    const float *offset; /* the same, what is added to every scaled value; or NULL */
    const float *table;  /* [16] or [256] values of the indices, else NULL */
    size_t rows, columns, group;
    float lowest; /* what is added to codes of LEVELS and STEPS */
} matrix;

/* A vector as whole numbers of 16 bits, with a step for each PIECE columns of a group. */
enum { PIECE = 256, MOST = 32639 /* 127 * 256 + 127 */ };

typedef struct {
    const int16_t *x;
    const int8_t *high, *low; /* x = 256 * high + low */
    const float *step, *sum;  /* of each block; the sum of its x */
} split;

/* One tile: what is added to the ROWS numbers of y.  sums: of x in each group, where there is an offset. */
typedef void matvec_table_tile(const matrix *m, size_t tile, const float *x, const float *sums, float *y);
typedef void matvec_even_tile(const matrix *m, size_t tile, const split *v, float *y);
/* One tile of LEVELS times signed bytes; the codes count as 0..255. */
typedef void matvec_bytes_tile(const matrix *m, size_t tile, const int8_t *x, int32_t *y);

matvec_table_tile matvec_table_avx2, matvec_nibbles_avx2, matvec_table_avx512, matvec_nibbles_avx512;
matvec_even_tile matvec_levels_avx2, matvec_steps_avx2, matvec_levels_avx512, matvec_steps_avx512;
matvec_bytes_tile matvec_bytes_avx2, matvec_bytes_avx512;

#endif
