/* One-dimensional k-means: the loops over values, which are float32, or float64 where `wide`.  Weights may be NULL:
   then all are 1. */
#include "kmeans.h"

#include <math.h>
#include <stdlib.h>

enum { AT_ONCE = 256, TABLE_BITS = 20 };

static inline double value(const void *values, int wide, size_t i) {
    double x;
    float narrow;
    if (wide) {
        memcpy(&x, (const char *)values + 8 * i, 8);
        return x;
    }
    memcpy(&narrow, (const char *)values + 4 * i, 4);
    return narrow;
}

/* Whether all values are finite; *all: the patterns of narrow ones, or-ed together. */
static int look(const void *values, int wide, size_t n, u32 *all) {
    u32 together = 0, bad = 0, bits;
    if (wide) {
        for (size_t i = 0; i < n; i++) {
            double x = value(values, 1, i);
            bad |= (double_bits(x) & 0x7ff0000000000000u) == 0x7ff0000000000000u;
        }
    } else {
        for (size_t i = 0; i < n; i++) {
            memcpy(&bits, (const char *)values + 4 * i, 4);
            together |= bits;
            bad |= (bits & 0x7f800000u) == 0x7f800000u;
        }
    }
    *all = together;
    return !bad;
}

typedef struct {
    double *points, *count, *mass;
    size_t room, found;
} found_values;

static int add(found_values *to, double x, double count, double mass) {
    if (to->found == to->room) return 0;
    to->points[to->found] = x;
    to->count[to->found] = count;
    to->mass[to->found++] = mass;
    return 1;
}

/* A table with a place for every pattern, for values whose last `unused` bits are 0, in the order of the values. */
static int64_t count_patterns(const void *values, const double *weights, size_t n, int unused, found_values *to) {
    size_t size = (size_t)1 << (32 - unused), zero = size / 2;
    double *count = calloc(size, 2 * sizeof *count), *mass = count + size;
    int64_t result = OUT_OF_MEMORY;
    if (!count) return result;
    for (size_t i = 0; i < n; i++) {
        u32 bits;
        memcpy(&bits, (const char *)values + 4 * i, 4);
        u32 place = (bits ^ ((0u - (bits >> 31)) | 0x80000000u)) >> unused; /* ascending, without a branch */
        count[place]++;
        if (weights) mass[place] += weights[i];
    }
    count[zero] += count[zero - 1]; /* -0 is 0 */
    mass[zero] += mass[zero - 1];
    count[zero - 1] = 0;
    result = MANY_VALUES;
    for (size_t i = 0; i < size; i++) {
        if (!count[i]) continue;
        u32 bits = (u32)i << unused;
        float x;
        bits = bits >> 31 ? bits ^ 0x80000000u : ~bits & ~((1u << unused) - 1);
        memcpy(&x, &bits, 4);
        if (!add(to, x, count[i], weights ? mass[i] : count[i])) goto end;
    }
    result = (int64_t)to->found;
end:
    free(count);
    return result;
}

/* Whether some of the values, at even distances, are so rarely the same that there must be far more than 65,536: of as
   many, equally frequent, 126 of 4096 would be the same as others. */
static int many_values(const void *values, int wide, size_t n) {
    enum { SOME = 4096, FEW = SOME / 64 };
    double seen[2 * SOME];
    u8 used[2 * SOME] = {0};
    int same = 0;
    for (size_t i = 0; i < SOME && same <= FEW; i++) {
        const double x = value(values, wide, i * (n / SOME)) + 0.0; /* -0 is 0 */
        size_t at = (size_t)((double_bits(x) * 0x9e3779b97f4a7c15u) >> 51);
        while (used[at] && seen[at] != x) at = (at + 1) % (2 * SOME);
        same += used[at];
        used[at] = 1, seen[at] = x;
    }
    return same <= FEW;
}

/* A hash table of places in `to`, at most half full, with linear probing; for any values, in no order. */
static int64_t hash_values(const void *values, int wide, const double *weights, size_t n, found_values *to) {
    int bits = 4;
    if (n >= (size_t)1 << 19 && to->room <= 1 << 16 && many_values(values, wide, n)) return MANY_VALUES;
    while (((size_t)1 << bits) / 2 <= (n < to->room ? n : to->room)) bits++;
    size_t last = ((size_t)1 << bits) - 1;
    u32 *slots = calloc(last + 1, sizeof *slots); /* places from 1, 0 is free */
    if (!slots) return OUT_OF_MEMORY;
    for (size_t i = 0; i < n; i++) {
        double x = value(values, wide, i) + 0.0; /* -0 is 0 */
        size_t at = (size_t)((double_bits(x) * 0x9e3779b97f4a7c15u) >> (64 - bits));
        while (slots[at] && to->points[slots[at] - 1] != x) at = (at + 1) & last;
        if (!slots[at]) {
            if (!add(to, x, 0, 0)) {
                free(slots);
                return MANY_VALUES;
            }
            slots[at] = (u32)to->found;
        }
        to->count[slots[at] - 1]++;
        to->mass[slots[at] - 1] += weights ? weights[i] : 1;
    }
    free(slots);
    return (int64_t)to->found;
}

/* The distinct values, how often each occurs and its weight; their number, or MANY_VALUES where there are more than `room`. */
SMELT_API int64_t smelt_kmeans_gather(const void *values, int wide, const double *weights, int64_t n, int64_t room,
                                      double *points, double *count, double *mass) {
    found_values to = {points, count, mass, (size_t)room, 0};
    u32 all;
    int unused = 0;
    if (n < 0 || room < 0 || room > (int64_t)1 << 30) return BAD_SIZE;
    if (!look(values, wide, (size_t)n, &all)) return NOT_FINITE;
    while (!wide && unused < 31 && !(all >> unused & 1)) unused++;
    if (32 - unused <= TABLE_BITS && (int64_t)1 << (32 - unused) <= 4 * n)
        return count_patterns(values, weights, (size_t)n, unused, &to);
    return hash_values(values, wide, weights, (size_t)n, &to);
}

/* Bins that are narrow around the center and ever wider outward: even steps of t / (1 + |t|), t = (x - center) *
   inverse, in the arithmetic of the values, written so that rounding keeps their order. */
static inline void bins_of(const void *values, int wide, size_t from, size_t number, double center, double inverse,
                           int32_t bins, int32_t *found) {
    double half = bins / 2;
    float near = (float)center, narrow = (float)inverse, middle = (float)half;
    if (wide) {
        for (size_t i = 0; i < number; i++) {
            double t = (value(values, 1, from + i) - center) * inverse;
            double place = (copysign(1 - 1 / (1 + fabs(t)), t) + 1) * half;
            place = place > 0 ? place : 0;
            found[i] = (int32_t)(place < bins - 1 ? place : bins - 1);
        }
    } else {
        for (size_t i = 0; i < number; i++) {
            float t = ((float)value(values, 0, from + i) - near) * narrow;
            float place = (copysignf(1 - 1 / (1 + fabsf(t)), t) + 1) * middle;
            place = place > 0 ? place : 0;
            found[i] = (int32_t)(place < (float)(bins - 1) ? place : (float)(bins - 1));
        }
    }
}

static inline double fill_bins(const void *values, int wide, const double *weights, size_t n, double center,
                               double inverse, int32_t bins, u16 *where, double *count, double *mass,
                               double *sum) {
    int32_t bin[AT_ONCE];
    double part[AT_ONCE], squares[4] = {0}; /* four sums side by side: one would wait for itself */
    for (size_t i = 0; i < n; i += AT_ONCE) {
        size_t number = n - i < AT_ONCE ? n - i : AT_ONCE;
        bins_of(values, wide, i, number, center, inverse, bins, bin);
        for (size_t j = 0; j < number; j++) {
            double far = value(values, wide, i + j) - center, weight = weights ? weights[i + j] : 1;
            part[j] = weight * far;
            squares[j & 3] += part[j] * far;
        }
        for (size_t j = 0; j < number; j++) where[i + j] = (u16)bin[j];
        for (size_t j = 0; j < number; j++) {
            count[bin[j]]++;
            if (weights) mass[bin[j]] += weights[i + j];
            sum[bin[j]] += part[j];
        }
    }
    return (squares[0] + squares[1]) + (squares[2] + squares[3]);
}

/* where: the bin of each value.  Number, weight (where there are weights) and weighted sum of x - center of the values in
   each bin, added to what is there; squares: the weighted sum of (x - center)^2 of all. */
SMELT_API int64_t smelt_kmeans_bins(const void *values, int wide, const double *weights, int64_t n, double center,
                                    double inverse, int32_t bins, u16 *where, double *count, double *mass,
                                    double *sum, double *squares) {
    size_t all = (size_t)n;
    if (n < 0 || bins < 2 || bins > 65536) return BAD_SIZE;
    if (wide && weights)
        *squares = fill_bins(values, 1, weights, all, center, inverse, bins, where, count, mass, sum);
    else if (wide)
        *squares = fill_bins(values, 1, NULL, all, center, inverse, bins, where, count, mass, sum);
    else if (weights)
        *squares = fill_bins(values, 0, weights, all, center, inverse, bins, where, count, mass, sum);
    else
        *squares = fill_bins(values, 0, NULL, all, center, inverse, bins, where, count, mass, sum);
    return 0;
}

/* The values (and their weights) in bins with a mark, 0 or 1, in the order in which they come; returns how many.
   points and mass have room for one more than `room`, which saves a branch that cannot be foreseen. */
SMELT_API int64_t smelt_kmeans_members(const void *values, int wide, const double *weights, int64_t n, const u16 *where,
                                       const u8 *marks, int64_t room, double *points, double *mass) {
    int64_t found = 0;
    if (n < 0 || room < 0) return BAD_SIZE;
    for (int64_t i = 0; i < n; i++) {
        const int64_t to = found < room ? found : room;
        points[to] = value(values, wide, (size_t)i);
        if (weights) mass[to] = weights[i];
        found += marks[where[i]];
    }
    return found > room ? MANY_VALUES : found;
}

static inline int32_t cell_of(double x, double low, double inverse, int32_t cells) {
    double place = (x - low) * inverse;
    place = place > 0 ? place : 0;
    return (int32_t)(place < cells - 1 ? place : cells - 1);
}

static inline int32_t interval_of(double x, const double *borders, int32_t low, int32_t high) {
    while (high - low > 8) {
        int32_t middle = low + (high - low) / 2;
        if (borders[middle] < x)
            low = middle + 1;
        else
            high = middle;
    }
    low += borders[low] < x;
    while (low < high && borders[low] < x) low++;
    return low;
}

/* How many of the ascending borders are below each value (all for NaN), as 1, 2 or 4 bytes.  The range of the borders
   is cut into cells; as rounding keeps the order, those of a value's cell alone must be looked at. */
SMELT_API int64_t smelt_kmeans_assign(const void *values, int wide, int64_t n, const double *borders, int64_t number,
                                      void *out, int width) {
    int32_t cells = 64, cell[AT_ONCE], found[AT_ONCE], total = (int32_t)number;
    if (n < 0 || number < 0 || number > (width == 1 ? 255 : width == 2 ? 32767 : INT32_MAX / 4)) return BAD_SIZE;
    while (cells < 16 * number && cells < n && cells < 1 << 18) cells *= 2;
    int32_t *first = calloc((size_t)cells + 1, sizeof *first);
    double *sorted = malloc(((size_t)number + 1) * sizeof *sorted);
    if (!first || !sorted) {
        free(first);
        free(sorted);
        return OUT_OF_MEMORY;
    }
    if (number) memcpy(sorted, borders, (size_t)number * sizeof *sorted);
    sorted[number] = INFINITY;
    double low = sorted[0], inverse = number ? cells / (sorted[number - 1] - low) : 0;
    for (int64_t i = 0; i < number; i++) first[cell_of(sorted[i], low, inverse, cells) + 1]++;
    for (int32_t i = 0; i < cells; i++) first[i + 1] += first[i];
    for (int64_t i = 0; i < n; i += AT_ONCE) {
        size_t block = n - i < AT_ONCE ? (size_t)(n - i) : AT_ONCE, at = (size_t)i;
        if (wide)
            for (size_t j = 0; j < block; j++) cell[j] = cell_of(value(values, 1, at + j), low, inverse, cells);
        else
            for (size_t j = 0; j < block; j++) cell[j] = cell_of(value(values, 0, at + j), low, inverse, cells);
        for (size_t j = 0; j < block; j++) {
            double x = value(values, wide, at + j);
            found[j] = x == x ? interval_of(x, sorted, first[cell[j]], first[cell[j] + 1]) : total;
        }
        for (size_t j = 0; width == 1 && j < block; j++) ((u8 *)out)[at + j] = (u8)found[j];
        for (size_t j = 0; width == 2 && j < block; j++) ((u16 *)out)[at + j] = (u16)found[j];
        for (size_t j = 0; width == 4 && j < block; j++) ((int32_t *)out)[at + j] = found[j];
    }
    free(first);
    free(sorted);
    return 0;
}
