/* One-dimensional k-means: the loops over points in ascending order and centers.  Points come with prefix sums, n + 1
   numbers that begin with 0: w of their weights, s of weight * x, q of weight * x^2. */
#include "kmeans.h"

#include <math.h>
#include <stdlib.h>

/* The first of the least of  base[i] - (s_j - s[i])^2 / (w_j - w[i]),  low <= i <= high, and that value. */
static inline int64_t least(const double *base, const double *s, const double *w, double s_j, double w_j, int64_t low,
                            int64_t high, double *value) {
    int64_t place = low;
    double best = 0;
    for (int64_t i = low; i <= high; i++) {
        double gain = s_j - s[i];
        gain = base[i] - gain * gain / (w_j - w[i]);
        if (i == low || gain < best) {
            best = gain;
            place = i;
        }
    }
    *value = best;
    return place;
}

/* The ends of the k best intervals of n > k points (edges: k + 1), from the prefix sums of weight, weight * x and
   weight * x^2 (n + 1 each).  Dynamic programming (Wang & Song 2011, R Journal 3/2); the best last interval of the
   first j points never begins earlier as j or k grows, so it is searched for by divide and conquer between those of
   j - step and j + step: O(k n log n). */
SMELT_API int64_t smelt_kmeans_program(const double *w, const double *s, const double *q, int64_t n, int64_t k,
                                       int64_t *edges) {
    if (k < 1 || n <= k || n > 1 << 16) return BAD_SIZE;
    size_t row = (size_t)n + 1;
    u16 *choices = malloc((size_t)k * row * sizeof *choices);
    double *cost = malloc(2 * row * sizeof *cost), *base = cost ? cost + row : NULL;
    int64_t *both = malloc(2 * (row + 1) * sizeof *both), *best = both, *before = both ? both + row + 1 : NULL;
    if (!choices || !cost || !both) {
        free(choices);
        free(cost);
        free(both);
        return OUT_OF_MEMORY;
    }
    for (int64_t j = 1; j <= n; j++) cost[j] = q[j] - s[j] * s[j] / w[j];
    memset(best, 0, (row + 1) * sizeof *best);
    for (int64_t m = 1; m < k; m++) {
        int64_t step = 1, *kept = before;
        before = best;
        best = kept;
        for (int64_t j = m; j <= n; j++) base[j] = cost[j] - q[j];
        for (int64_t j = 0; j <= n + 1; j++) best[j] = j <= m ? m : n - 1;
        while (2 * step <= n - m) step *= 2;
        for (; step; step /= 2) {
            for (int64_t j = m + step; j <= n; j += 2 * step) {
                int64_t above = best[j + step <= n ? j + step : n + 1];
                int64_t low = best[j - step] > before[j] ? best[j - step] : before[j];
                int64_t high = above < j - 1 ? above : j - 1;
                double value;
                best[j] = least(base, s, w, s[j], w[j], low, high > low ? high : low, &value);
                cost[j] = value + q[j];
            }
        }
        for (int64_t j = m; j <= n; j++) choices[(size_t)m * row + (size_t)j] = (u16)best[j];
    }
    edges[k] = n;
    edges[0] = 0;
    for (int64_t m = k - 1; m > 0; m--) edges[m] = choices[(size_t)m * row + (size_t)edges[m + 1]];
    free(choices);
    free(cost);
    free(both);
    return 0;
}

/* How many of the ascending points are <= border, searched outward from a guess. */
static inline int64_t below(const double *points, int64_t n, double border, int64_t guess) {
    int64_t low = 0, high = n, step = 1;
    if (guess < n && points[guess] <= border) {
        low = guess + 1;
        while (low + step < n && points[low + step] <= border) {
            low += step + 1;
            step *= 2;
        }
        high = low + step < n ? low + step : n;
    } else {
        high = guess;
        while (high - step > 0 && points[high - step] > border) {
            high -= step;
            step *= 2;
        }
        low = high - step > 0 ? high - step : 0;
    }
    while (low < high) {
        int64_t middle = low + (high - low) / 2;
        if (points[middle] <= border)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

/* The mean of an interval with weight; rounding must not put it outside. */
static inline double mean_of(const double *points, const double *w, const double *s, double origin, int64_t low,
                             int64_t high) {
    double mean = (s[high] - s[low]) / (w[high] - w[low]) + origin;
    mean = mean < points[low] ? points[low] : mean;
    return mean > points[high - 1] ? points[high - 1] : mean;
}

/* Lloyd's rounds until no point changes its center, s being of weight * (x - origin).  edges (k + 1): the ends of the
   centers' intervals; centers without weight stay where they are.  Returns the number of rounds. */
SMELT_API int64_t smelt_kmeans_rounds(const double *points, const double *w, const double *s, int64_t n, double origin,
                                      int64_t rounds, int64_t k, double *centers, int64_t *edges) {
    if (k < 1 || n < 0) return BAD_SIZE;
    for (int64_t j = 0; j < k; j++) edges[j] = 0;
    edges[k] = n;
    for (int64_t round = 0; round < rounds; round++) {
        int moved = !round;
        for (int64_t j = 1; j < k; j++) {
            double border = centers[j - 1] + (centers[j] - centers[j - 1]) / 2;
            int64_t edge = below(points, n, border, edges[j]);
            moved |= edge != edges[j];
            edges[j] = edge;
        }
        if (!moved) return round;
        for (int64_t j = 0; j < k; j++)
            if (w[edges[j + 1]] - w[edges[j]] > 0)
                centers[j] = mean_of(points, w, s, origin, edges[j], edges[j + 1]);
    }
    return rounds;
}

/* log2 of x >= 1: with x = 2^e m, sqrt(1/2) < m <= sqrt(2) and f = (m - 1) / (m + 1), log m = 2 (f + f^3 / 3 + ...). */
static double log2_of(double x) {
    u64 bits = double_bits(x);
    int exponent = (int)(bits >> 52) - 1023;
    double m, f, square, sum = 0;
    bits = (bits & 0xfffffffffffffu) | 0x3ff0000000000000u;
    memcpy(&m, &bits, 8);
    if (m > 1.4142135623730951) {
        m /= 2;
        exponent++;
    }
    f = (m - 1) / (m + 1);
    square = f * f;
    for (int i = 23; i > 0; i -= 2) sum = sum * square + 1.0 / i;
    return exponent + 2 * f * sum * 1.4426950408889634;
}

typedef struct {
    double weight, count, center, bits;
} cluster;

/* The intervals on which each center is the cheapest:  (x - c)^2 + price * bits / (weight per value)  are parabolas of
   one shape, whose lower envelope is found from left to right.  Returns how many remain; borders: one less. */
static int64_t envelope(const cluster *all, int64_t k, double price, int64_t *stack, double *borders) {
    int64_t top = 0;
    for (int64_t j = 0; j < k; j++) {
        double border = 0;
        int shown = 1;
        while (top) {
            const cluster *a = &all[stack[top - 1]], *b = &all[j];
            double gap = b->center - a->center;
            if (!(gap > 0)) {
                if (b->bits >= a->bits) {
                    shown = 0;
                    break;
                }
                top--;
                continue;
            }
            border = a->center + gap / 2 +
                     price * (b->bits - a->bits) * (a->count + b->count) / (a->weight + b->weight) / (2 * gap);
            if (top < 2 || border > borders[top - 2]) break;
            top--;
        }
        if (!shown) continue;
        if (top) borders[top - 1] = border;
        stack[top++] = j;
    }
    return top;
}

/* The clusters between borders (k - 1); those without weight are joined to a neighbour.  Returns how many are left. */
static int64_t measure(const double *points, const double *w, const double *s, const double *count, int64_t n,
                       double origin, int64_t k, double *borders, int64_t *edges, cluster *all) {
    int64_t kept = 0, from = 0;
    edges[0] = 0;
    for (int64_t j = 0; j < k; j++) {
        int64_t to = j + 1 < k ? below(points, n, borders[j], from) : n;
        if (w[to] - w[from] > 0) {
            if (kept) {
                borders[kept - 1] = borders[j - 1];
                edges[kept] = from;
            }
            kept++;
        }
        from = to;
    }
    edges[kept] = n;
    for (int64_t j = 0; j < kept; j++) {
        int64_t low = edges[j], high = edges[j + 1];
        double number = count[high] - count[low], center = mean_of(points, w, s, origin, low, high);
        all[j] = (cluster){w[high] - w[low], number, center, log2_of(count[n] / number)};
    }
    return kept;
}

/* Entropy-constrained rounds (Chou, Lookabaugh & Gray 1989, IEEE Trans. ASSP 37(1)): every point to the cheapest
   center by  weight * (x - c)^2 + price * count * bits,  bits = -log2(share of the center's points), then centers and
   bits anew, until nothing moves or the cost, less the constant sum of weight * (x - origin)^2, would rise.
   w, s, count: prefix sums.  borders (k - 1) and centers (k) are input and result; returns how many centers are left. */
SMELT_API int64_t smelt_kmeans_coded(const double *points, const double *w, const double *s, const double *count,
                                     int64_t n, double origin, double price, int64_t rounds, int64_t k,
                                     double *borders, double *centers, double *cost) {
    size_t size = k > 0 ? (size_t)k : 1;
    if (k < 1 || n < 1 || !(w[n] > 0) || size > SIZE_MAX / 64) return BAD_SIZE;
    cluster *all = malloc(size * sizeof *all);
    int64_t *edges = malloc((size + 1) * sizeof *edges), *stack = malloc(size * sizeof *stack);
    int64_t *last = malloc((size + 1) * sizeof *last), left = OUT_OF_MEMORY;
    double *next = malloc(size * sizeof *next);
    if (!all || !edges || !stack || !last || !next) goto end;
    memcpy(next, borders, (size - 1) * sizeof *next);
    left = k;
    for (int64_t round = 0; round < rounds; round++) {
        double now = 0;
        k = measure(points, w, s, count, n, origin, k, next, edges, all);
        for (int64_t j = 0; j < k; j++) {
            double sum = s[edges[j + 1]] - s[edges[j]];
            now += price * all[j].count * all[j].bits - sum * sum / all[j].weight;
        }
        if (round && now > *cost + 1e-12 * fabs(*cost)) break;
        int moved = !round || k != left || memcmp(edges, last, ((size_t)k + 1) * sizeof *edges);
        left = k;
        *cost = now;
        memcpy(last, edges, ((size_t)k + 1) * sizeof *edges);
        memcpy(borders, next, ((size_t)k - 1) * sizeof *borders);
        for (int64_t j = 0; j < k; j++) centers[j] = all[j].center;
        if (!moved) break;
        k = envelope(all, k, price, stack, next);
    }
end:
    free(all);
    free(edges);
    free(stack);
    free(last);
    free(next);
    return left;
}

