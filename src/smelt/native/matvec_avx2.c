/* The loops of matvec.c for AVX2: two vectors for the rows of a tile. */
#include "matvec.h"

#ifdef SMELT_X86
#include <immintrin.h>

#define TARGET __attribute__((target("avx2,fma")))
#define INLINE static inline __attribute__((always_inline))
#define PREFETCH(DATA) _mm_prefetch((const char *)(DATA) + 4096, _MM_HINT_T0)

#define EACH_GROUP(WORD)                                                                                               \
    const size_t groups = (m->columns + m->group - 1) / m->group;                                                      \
    const u32 *c = m->codes + tile * m->columns / (WORD) * ROWS;                                                       \
    const float *scale = m->scale + tile * groups * ROWS;                                                              \
    const float *offset = m->offset ? m->offset + tile * groups * ROWS : NULL;                                         \
    __m256 total[2] = {_mm256_loadu_ps(y), _mm256_loadu_ps(y + 8)};                                                    \
    for (size_t g = 0, k = 0; g < groups; g++) {                                                                       \
        const size_t end = m->columns - k < m->group ? m->columns : k + m->group;                                      \
        __m256 sum[4] = {_mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps()};          \
        for (; k < end; k += (WORD), c += ROWS)

#define CLOSE_GROUP                                                                                                    \
    for (int h = 0; h < 2; h++) {                                                                                      \
        const size_t at = g * ROWS + 8 * (size_t)h;                                                                    \
        total[h] = _mm256_fmadd_ps(_mm256_add_ps(sum[h], sum[2 + h]), _mm256_loadu_ps(scale + at), total[h]);          \
        if (offset) total[h] = _mm256_fmadd_ps(_mm256_loadu_ps(offset + at), _mm256_set1_ps(sums[g]), total[h]);       \
    }                                                                                                                  \
    }                                                                                                                  \
    _mm256_storeu_ps(y, total[0]), _mm256_storeu_ps(y + 8, total[1]);

#define HALVES                                                                                                         \
    const __m256i v[2] = {_mm256_loadu_si256((const void *)c), _mm256_loadu_si256((const void *)(c + 8))};             \
    PREFETCH(c);

/* Both halves of the rows times column I of a word. */
#define ADD(I, VALUE)                                                                                                  \
    for (int h = 0; h < 2; h++) {                                                                                      \
        __m256 *into = sum + 2 * ((I) & 1) + h;                                                                        \
        *into = _mm256_fmadd_ps(VALUE, _mm256_broadcast_ss(x + k + (I)), *into);                                       \
    }

TARGET void matvec_nibbles_avx2(const matrix *m, size_t tile, const float *x, const float *sums, float *y) {
    const __m256 low = _mm256_loadu_ps(m->table), high = _mm256_loadu_ps(m->table + 8);
    EACH_GROUP(8) {
        HALVES
#define LOOK(I, UP)                                                                                                    \
    _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, _mm256_srli_epi32(v[h], 4 * (I))),                                  \
                     _mm256_permutevar8x32_ps(high, _mm256_srli_epi32(v[h], 4 * (I))),                                 \
                     _mm256_castsi256_ps(_mm256_slli_epi32(v[h], UP)))
#define NIBBLE(I) ADD(I, LOOK(I, 28 - 4 * (I)))
        NIBBLE(0) NIBBLE(1) NIBBLE(2) NIBBLE(3) NIBBLE(4) NIBBLE(5) NIBBLE(6) NIBBLE(7)
    }
    CLOSE_GROUP
}

TARGET void matvec_table_avx2(const matrix *m, size_t tile, const float *x, const float *sums, float *y) {
    const __m256i byte = _mm256_set1_epi32(255);
    EACH_GROUP(4) {
        HALVES
#define GATHER(I) ADD(I, _mm256_i32gather_ps(m->table, _mm256_and_si256(_mm256_srli_epi32(v[h], 8 * (I)), byte), 4))
        GATHER(0) GATHER(1) GATHER(2) GATHER(3)
    }
    CLOSE_GROUP
}

/* ---- whole numbers: pairs of 16 bits */

/* Columns i and i + 2 of the codes in V, and i + 1 and i + 3, times X. */
#define MULTIPLY(V, X)                                                                                                 \
    _mm256_add_epi32(                                                                                                  \
        _mm256_madd_epi16(_mm256_and_si256(V, evens), _mm256_set1_epi32((int)((u16)(X)[0] | (u32)(u16)(X)[2] << 16))), \
        _mm256_madd_epi16(_mm256_srli_epi16(V, 8), _mm256_set1_epi32((int)((u16)(X)[1] | (u32)(u16)(X)[3] << 16))))

TARGET INLINE void even(const matrix *m, size_t tile, const split *s, float *y, const int bits) {
    const size_t groups = (m->columns + m->group - 1) / m->group;
    const u32 *c = m->codes + tile * m->columns * (size_t)bits / 32 * ROWS;
    const float *scale = m->scale + tile * groups * ROWS;
    const float *offset = m->offset ? m->offset + tile * groups * ROWS : NULL;
    const __m256i evens = _mm256_set1_epi32(0x00FF00FF), nibble = _mm256_set1_epi8(15);
    __m256 total[2] = {_mm256_loadu_ps(y), _mm256_loadu_ps(y + 8)};
    for (size_t g = 0, k = 0, piece = 0; g < groups; g++) {
        const size_t end = m->columns - k < m->group ? m->columns : k + m->group;
        __m256 dot[2] = {_mm256_setzero_ps(), _mm256_setzero_ps()};
        float all = 0;
        for (; k < end; piece++) {
            const size_t stop = end - k < PIECE ? end : k + PIECE;
            __m256i sum[2] = {_mm256_setzero_si256(), _mm256_setzero_si256()};
            for (; k < stop; k += 8) {
                for (int half = 0; half < bits / 4; half++, c += ROWS) {
                    HALVES
                    const int16_t *x = s->x + k + 4 * half;
                    for (int h = 0; h < 2; h++) {
                        const __m256i a = bits == 8 ? v[h] : _mm256_and_si256(v[h], nibble);
                        sum[h] = _mm256_add_epi32(sum[h], MULTIPLY(a, x));
                        if (bits == 8) continue;
                        const __m256i b = _mm256_and_si256(_mm256_srli_epi32(v[h], 4), nibble);
                        sum[h] = _mm256_add_epi32(sum[h], MULTIPLY(b, x + 4));
                    }
                }
            }
            for (int h = 0; h < 2; h++) {
                const __m256 lowest = _mm256_set1_ps(m->lowest * s->sum[piece]);
                dot[h] = _mm256_fmadd_ps(_mm256_add_ps(_mm256_cvtepi32_ps(sum[h]), lowest),
                                         _mm256_set1_ps(s->step[piece]), dot[h]);
            }
            all += s->step[piece] * s->sum[piece];
        }
        for (int h = 0; h < 2; h++) {
            const size_t at = g * ROWS + 8 * (size_t)h;
            total[h] = _mm256_fmadd_ps(dot[h], _mm256_loadu_ps(scale + at), total[h]);
            if (offset) total[h] = _mm256_fmadd_ps(_mm256_loadu_ps(offset + at), _mm256_set1_ps(all), total[h]);
        }
    }
    _mm256_storeu_ps(y, total[0]), _mm256_storeu_ps(y + 8, total[1]);
}

TARGET void matvec_levels_avx2(const matrix *m, size_t tile, const split *v, float *y) { even(m, tile, v, y, 8); }
TARGET void matvec_steps_avx2(const matrix *m, size_t tile, const split *v, float *y) { even(m, tile, v, y, 4); }

TARGET void matvec_bytes_avx2(const matrix *m, size_t tile, const int8_t *x, int32_t *y) {
    const __m256i evens = _mm256_set1_epi32(0x00FF00FF);
    const u32 *c = m->codes + tile * m->columns / 4 * ROWS;
    __m256i sum[2] = {_mm256_setzero_si256(), _mm256_setzero_si256()};
    for (size_t k = 0; k < m->columns; k += 4, c += ROWS) {
        HALVES
        for (int h = 0; h < 2; h++) sum[h] = _mm256_add_epi32(sum[h], MULTIPLY(v[h], x + k));
    }
    _mm256_storeu_si256((__m256i *)y, sum[0]), _mm256_storeu_si256((__m256i *)y + 1, sum[1]);
}

#endif
