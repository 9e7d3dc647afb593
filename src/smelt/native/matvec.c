/* Products of a matrix of codes with a few vectors, as a layer does them for one sample at a time: what takes the time
   is reading the matrix, so that codes are read as they are stored and become values in registers.
   native/matvec.py says what is computed, packs matrices and computes the same with NumPy. */
#include "matvec.h"

#include <float.h>
#include <math.h>
#include <stdlib.h>

#if defined(__GNUC__) || defined(__clang__)
#define INLINE static inline __attribute__((always_inline))
#else
#define INLINE static inline
#endif

/* To the nearest whole number, in the middle to the even one: nothing else is left of 1.5 * 2^23 + x. */
INLINE float even(float x) { return (x + 12582912.0f) - 12582912.0f; }

/* Groups of columns that have scales of their own; the last may be short. */
#define EACH_GROUP(M, TILE, WORD)                                                                                      \
    const size_t groups = ((M)->columns + (M)->group - 1) / (M)->group;                                                \
    const u32 *c = (M)->codes + (TILE) * (M)->columns / (WORD) * ROWS;                                                 \
    const float *scale = (M)->scale + (TILE) * groups * ROWS;                                                          \
    const float *offset = (M)->offset ? (M)->offset + (TILE) * groups * ROWS : NULL;                                   \
    for (size_t g = 0, k = 0; g < groups; g++, scale += ROWS) {                                                        \
        const size_t end = (M)->columns - k < (M)->group ? (M)->columns : k + (M)->group;

INLINE void scaled(const float *sum, const float *scale, const float *offset, float all, float *y) {
    for (int r = 0; r < ROWS; r++) y[r] += sum[r] * scale[r];
    if (offset)
        for (int r = 0; r < ROWS; r++) y[r] += offset[r] * all;
}

/* ---- indices */

INLINE void indexed(const matrix *m, size_t tile, const float *x, const float *sums, float *y, int bits) {
    const u32 word = 32 / (u32)bits, last = (1u << bits) - 1;
    EACH_GROUP(m, tile, word)
        float sum[ROWS] = {0};
        for (; k < end; k += word, c += ROWS)
            for (u32 i = 0; i < word; i++)
                for (int r = 0; r < ROWS; r++) sum[r] += m->table[c[r] >> (u32)bits * i & last] * x[k + i];
        scaled(sum, scale, offset, offset ? sums[g] : 0, y);
        if (offset) offset += ROWS;
    }
}

static void table_portable(const matrix *m, size_t tile, const float *x, const float *sums, float *y) {
    indexed(m, tile, x, sums, y, 8);
}

static void nibbles_portable(const matrix *m, size_t tile, const float *x, const float *sums, float *y) {
    indexed(m, tile, x, sums, y, 4);
}

/* What level of instructions there is for whole numbers, and how far `level` (-1: as far as can be) goes. */
static int usable(int level) {
    int best = best_level();
#ifdef SMELT_X86
    if (best >= AVX512 && !__builtin_cpu_supports("avx512vnni")) best = SIMD;
    if (best >= SIMD && !__builtin_cpu_supports("fma")) best = PORTABLE;
#endif
    return level < 0 || level > best ? best : level;
}

#ifdef SMELT_X86
#define CHOOSE(NAME)                                                                                                   \
    (level >= AVX512 ? matvec_##NAME##_avx512 : level >= SIMD ? matvec_##NAME##_avx2 : NAME##_portable)
#else
#define CHOOSE(NAME) NAME##_portable
#endif

static int good(int64_t rows, int64_t columns, int64_t group, int64_t samples) {
    return rows >= 1 && columns >= 8 && columns % 8 == 0 && group >= 8 && group % 8 == 0 && samples >= 1;
}

/* What a tile adds to bias[rows], or to 0. */
#define EACH_TILE(M, SAMPLES)                                                                                          \
    for (size_t first = 0; first < (M).rows; first += ROWS)                                                            \
        for (size_t s = 0, here = (M).rows - first < ROWS ? (M).rows - first : ROWS; s < (SAMPLES); s++) {             \
            float found[ROWS] = {0};                                                                                   \
            for (size_t r = 0; bias && r < here; r++) found[r] = bias[first + r];

#define CLOSE_TILE(M)                                                                                                  \
            memcpy(y + s * (M).rows + first, found, here * sizeof *y);                                                 \
        }

/* y[samples][rows] = x[samples][columns] times a matrix of indices, plus bias[rows] if there is one.  columns and
   group: multiples of 8.  level: -1 for the best of this machine.  Returns OK, NO_MEMORY or WRONG_CALL. */
SMELT_API int smelt_matvec_table(int bits, const u32 *codes, const float *scale, const float *offset,
                                 const float *table, int64_t rows, int64_t columns, int64_t group, const float *x,
                                 int64_t samples, const float *bias, float *y, int level) {
    if ((bits != 4 && bits != 8) || !table || !good(rows, columns, group, samples)) return WRONG_CALL;
    const matrix m = {codes, scale, offset, table, (size_t)rows, (size_t)columns, (size_t)group, 0};
    const size_t groups = (m.columns + m.group - 1) / m.group, n = (size_t)samples;
    float *sums = NULL;
    if (offset) {
        sums = malloc(n * groups * sizeof *sums);
        if (!sums) return NO_MEMORY;
        for (size_t s = 0; s < n; s++)
            for (size_t g = 0; g < groups; g++) {
                float sum[8] = {0};
                const float *from = x + s * m.columns;
                for (size_t k = g * m.group; k < m.columns && k < (g + 1) * m.group; k += 8)
                    for (size_t i = 0; i < 8; i++) sum[i] += from[k + i];
                for (int i = 0; i < 4; i++) sum[i] += sum[i + 4];
                sums[s * groups + g] = (sum[0] + sum[1]) + (sum[2] + sum[3]);
            }
    }
    level = usable(level);
    matvec_table_tile *const run = bits == 4 ? CHOOSE(nibbles) : CHOOSE(table);
    EACH_TILE(m, n)
    run(&m, first / ROWS, x + s * m.columns, sums ? sums + s * groups : NULL, found);
    CLOSE_TILE(m)
    free(sums);
    return OK;
}

/* ---- whole numbers */

INLINE void even_portable(const matrix *m, size_t tile, const split *v, float *y, u32 bits) {
    const u32 word = 32 / bits, last = (1u << bits) - 1;
    size_t piece = 0;
    EACH_GROUP(m, tile, word)
        float dot[ROWS] = {0}, all = 0;
        for (; k < end; piece++) {
            const size_t stop = end - k < PIECE ? end : k + PIECE;
            int32_t sum[ROWS] = {0};
            for (; k < stop; k += word, c += ROWS)
                for (u32 i = 0; i < word; i++) {
                    const u32 shift = bits == 8 ? 8 * i : i < 4 ? 8 * i : 8 * (i - 4) + 4;
                    for (int r = 0; r < ROWS; r++) sum[r] += (int32_t)(c[r] >> shift & last) * v->x[k + i];
                }
            for (int r = 0; r < ROWS; r++) dot[r] += ((float)sum[r] + m->lowest * v->sum[piece]) * v->step[piece];
            all += v->step[piece] * v->sum[piece];
        }
        scaled(dot, scale, offset, all, y);
        if (offset) offset += ROWS;
    }
}

static void levels_portable(const matrix *m, size_t tile, const split *v, float *y) { even_portable(m, tile, v, y, 8); }
static void steps_portable(const matrix *m, size_t tile, const split *v, float *y) { even_portable(m, tile, v, y, 4); }

/* A piece of a vector to whole numbers in -MOST..MOST, and to two bytes each. */
INLINE float cut(const float *x, size_t n, int16_t *out, int8_t *high, int8_t *low, float *sum) {
    float most[8] = {0};
    int32_t all = 0, wrong[8] = {0};
    for (size_t k = 0; k < n; k += 8)
        for (size_t i = 0; i < 8; i++) {
            const float size = x[k + i] < 0 ? -x[k + i] : x[k + i];
            most[i] = size > most[i] ? size : most[i];
            wrong[i] |= !(size <= FLT_MAX);
        }
    for (int i = 1; i < 8; i++) most[0] = most[i] > most[0] ? most[i] : most[0], wrong[0] |= wrong[i];
    if (wrong[0]) { /* what is not finite makes everything NaN */
        *sum = NAN;
        memset(out, 0, n * sizeof *out), memset(high, 0, n), memset(low, 0, n);
        return 1;
    }
    const float step = most[0] < MOST * FLT_MIN ? FLT_MIN : most[0] / MOST, times = 1 / step;
    for (size_t k = 0; k < n; k++) {
        int32_t whole = (int32_t)even(x[k] * times);
        whole = whole > MOST ? MOST : whole < -MOST ? -MOST : whole;
        out[k] = (int16_t)whole;
        high[k] = (int8_t)((whole + 128) >> 8);
        low[k] = (int8_t)(whole - (int32_t)((u32)high[k] << 8));
        all += whole;
    }
    *sum = (float)all;
    return step;
}

/* Codes 0..255 of a vector, less `shift`: round(x / step + zero), as grids/uniform.py does. */
INLINE void rounded(const float *x, size_t n, float step, float zero, int32_t shift, u8 *out) {
    for (size_t i = 0; i < n; i++) {
        float code = x[i] / step + zero;
        code = code > 0 ? code : 0;
        code = code < 255 ? code : 255;
        out[i] = (u8)((int32_t)even(code) - shift);
    }
}

INLINE void ends(const float *x, size_t n, float *low, float *high) {
    float a[16] = {0}, b[16] = {0}; /* 0 is in the range */
    for (size_t i = 0; i + 16 <= n; i += 16)
        for (size_t j = 0; j < 16; j++) {
            a[j] = x[i + j] < a[j] ? x[i + j] : a[j];
            b[j] = x[i + j] > b[j] ? x[i + j] : b[j];
        }
    for (size_t i = n / 16 * 16; i < n; i++) {
        a[0] = x[i] < a[0] ? x[i] : a[0];
        b[0] = x[i] > b[0] ? x[i] : b[0];
    }
    for (int j = 1; j < 16; j++) {
        a[0] = a[j] < a[0] ? a[j] : a[0];
        b[0] = b[j] > b[0] ? b[j] : b[0];
    }
    *low = a[0], *high = b[0];
}

#define ROUNDING(NAME, TARGET)                                                                                         \
    static TARGET void rounded_##NAME(const float *x, size_t n, float step, float zero, int32_t shift, u8 *out) {      \
        rounded(x, n, step, zero, shift, out);                                                                         \
    }                                                                                                                  \
    static TARGET void ends_##NAME(const float *x, size_t n, float *low, float *high) { ends(x, n, low, high); }       \
    static TARGET float cut_##NAME(const float *x, size_t n, int16_t *out, int8_t *high, int8_t *low, float *sum) {    \
        return cut(x, n, out, high, low, sum);                                                                         \
    }
ROUNDING(portable, )
#ifdef SMELT_X86
ROUNDING(avx2, __attribute__((target("avx2"))))
#define BEST(NAME) (level >= SIMD ? NAME##_avx2 : NAME##_portable)
#else
#define BEST(NAME) NAME##_portable
#endif

static void span(const float *x, size_t n, int level, float *step, float *zero) {
    float low, high;
    (void)level;
    BEST(ends)(x, n, &low, &high);
    *step = high / 255 - low / 255;
    if (*step < FLT_MIN) *step = FLT_MIN;
    low = -low / *step;
    *zero = even(low < 255 ? low : 255);
}

/* Codes 0..255 of x.  step 0: the levels span x and 0, and are written to step and zero. */
SMELT_API void smelt_bytes(const float *x, int64_t n, float *step, float *zero, u8 *out) {
    const int level = best_level();
    (void)level;
    if (*step <= 0) span(x, (size_t)n, level, step, zero);
    BEST(rounded)(x, (size_t)n, *step, *zero, 0, out);
}

/* As smelt_matvec_table, of a matrix of LEVELS (8 bits, lowest -128) or STEPS (4 bits).  x counts as whole numbers of
   16 bits, of which the largest of every PIECE columns of a group is MOST. */
SMELT_API int smelt_matvec_even(int bits, const u32 *codes, const float *scale, const float *offset, float lowest,
                                int64_t rows, int64_t columns, int64_t group, const float *x, int64_t samples,
                                const float *bias, float *y, int level) {
    if ((bits != 4 && bits != 8) || !good(rows, columns, group, samples)) return WRONG_CALL;
    const matrix m = {codes, scale, offset, NULL, (size_t)rows, (size_t)columns, (size_t)group, lowest};
    const size_t n = (size_t)samples, pieces = m.columns / 8; /* at most */
    char *room = malloc(n * (pieces * 2 * sizeof(float) + m.columns * 4));
    if (!room) return NO_MEMORY;
    float *step = (float *)(void *)room, *sum = step + n * pieces;
    int16_t *whole = (int16_t *)(void *)(sum + n * pieces);
    int8_t *high = (int8_t *)(whole + n * m.columns), *low = high + n * m.columns;
    level = usable(level);
    for (size_t s = 0; s < n; s++)
        for (size_t k = 0, piece = 0, size; k < m.columns; k += size, piece++) {
            const size_t within = k % m.group, left = m.columns - k, at = s * m.columns + k;
            size = m.group - within < PIECE ? m.group - within : PIECE;
            size = left < size ? left : size;
            step[s * pieces + piece] =
                BEST(cut)(x + at, size, whole + at, high + at, low + at, sum + s * pieces + piece);
        }
    matvec_even_tile *const run = bits == 4 ? CHOOSE(steps) : CHOOSE(levels);
    EACH_TILE(m, n)
    const size_t at = s * m.columns;
    const split v = {whole + at, high + at, low + at, step + s * pieces, sum + s * pieces};
    run(&m, first / ROWS, &v, found);
    CLOSE_TILE(m)
    free(room);
    return OK;
}

static void bytes_portable(const matrix *m, size_t tile, const int8_t *x, int32_t *y) {
    int32_t sum[ROWS] = {0};
    const u32 *c = m->codes + tile * m->columns / 4 * ROWS;
    for (size_t k = 0; k < m->columns; k += 4, c += ROWS)
        for (u32 i = 0; i < 4; i++)
            for (int r = 0; r < ROWS; r++) sum[r] += (int32_t)(c[r] >> 8 * i & 255) * x[k + i];
    memcpy(y, sum, sizeof sum);
}

/* The same of LEVELS with one scale a row, and x rounded to 256 levels that are whole steps from 0.  step: 0 to take
   the range of all of x, or of each sample (`apart`), and 0; else the levels are (code - zero) * step.  sums[rows]: of
   the levels of each row. */
SMELT_API int smelt_matvec_bytes(const u32 *codes, const float *scale, const int32_t *sums, int64_t rows,
                                 int64_t columns, float step, float zero, int apart, const float *x, int64_t samples,
                                 const float *bias, float *y, int level) {
    if (!good(rows, columns, 8, samples) || columns > 1 << 16) return WRONG_CALL;
    const matrix m = {codes, scale, NULL, NULL, (size_t)rows, (size_t)columns, (size_t)columns, 0};
    const size_t n = (size_t)samples;
    int8_t *bytes = malloc(n * m.columns + n * 3 * sizeof(float));
    if (!bytes) return NO_MEMORY;
    float *of = (float *)(bytes + n * m.columns); /* step, zero and what the bytes sum up to, of each sample */
    level = usable(level);
    float own = step, at = zero;
    for (size_t s = 0; s < n; s++) {
        if (step <= 0 && (apart || !s)) span(x + s * m.columns, apart ? m.columns : n * m.columns, level, &own, &at);
        BEST(rounded)(x + s * m.columns, m.columns, own, at, 128, (u8 *)bytes + s * m.columns);
        int32_t all = 0;
        for (size_t k = 0; k < m.columns; k++) all += bytes[s * m.columns + k];
        of[3 * s] = own, of[3 * s + 1] = at - 128, of[3 * s + 2] = (float)all;
    }
    matvec_bytes_tile *const run = CHOOSE(bytes);
    for (size_t first = 0; first < m.rows; first += ROWS) {
        const size_t here = m.rows - first < ROWS ? m.rows - first : ROWS;
        for (size_t s = 0; s < n; s++) {
            int32_t found[ROWS];
            run(&m, first / ROWS, bytes + s * m.columns, found);
            for (size_t r = 0; r < here; r++) { /* exact up to the scale */
                const double sum = found[r] - 128.0 * (double)of[3 * s + 2] - (double)of[3 * s + 1] * sums[first + r];
                y[s * m.rows + first + r] =
                    (float)sum * (of[3 * s] * scale[first + r]) + (bias ? bias[first + r] : 0);
            }
        }
    }
    free(bytes);
    return OK;
}

/* The matrix itself: out[rows][columns]. */
SMELT_API int smelt_matvec_dense(int coding, const u32 *codes, const float *scale, const float *offset,
                                 const float *table, float lowest, int64_t rows, int64_t columns, int64_t group,
                                 float *out) {
    const int indices = coding == TABLE || coding == NIBBLES_OF;
    if (coding < LEVELS || coding >= CODINGS || indices != (table != NULL) || !good(rows, columns, group, 1))
        return WRONG_CALL;
    const size_t k = (size_t)columns, each = (size_t)group, groups = (k + each - 1) / each;
    const u32 bits = coding == NIBBLES_OF || coding == STEPS ? 4 : 8, word = 32 / bits, last = (1u << bits) - 1;
    for (size_t row = 0; row < (size_t)rows; row++) {
        const size_t tile = row / ROWS, lane = row % ROWS;
        const u32 *c = codes + tile * (k / word) * ROWS + lane;
        for (size_t at = 0; at < k; at += 8) {
            const size_t side = (tile * groups + at / each) * ROWS + lane;
            const float by = scale[side], more = offset ? offset[side] : 0;
            for (u32 i = 0; i < 8; i++) {
                const u32 shift = coding != STEPS ? bits * (i % word) : i < 4 ? 8 * i : 8 * (i - 4) + 4;
                const u32 code = c[(at + i) / word * ROWS] >> shift & last;
                out[row * k + at + i] = (table ? table[code] : (float)code + lowest) * by + more;
            }
        }
    }
    return OK;
}
