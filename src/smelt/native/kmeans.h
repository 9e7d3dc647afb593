/* Between the files of one-dimensional k-means: kmeans_values.c has the loops over values, kmeans.c those over points and
   centers.  grids/kmeans.py puts them together, and grids/_kmeans_numpy.py does the same in NumPy, operation by
   operation, so that both give the same centers. */
#ifndef SMELT_KMEANS_H
#define SMELT_KMEANS_H

#include "native.h"

/* Results below 0. */
enum { MANY_VALUES = -1, NOT_FINITE = -2, OUT_OF_MEMORY = -3, BAD_SIZE = -4 };

static inline u64 double_bits(double x) {
    u64 bits;
    memcpy(&bits, &x, 8);
    return bits;
}

#endif
