/* The loops of matvec.c for AVX-512: a lane for each row of a tile. */
#include "matvec.h"

#ifdef SMELT_X86
#include <immintrin.h>

#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512vbmi,avx512vbmi2,avx512vnni")))
#define INLINE static inline __attribute__((always_inline))

/* What is read next may lie on a page on which the processor has not begun to look ahead. */
enum { AHEAD = 4096 };
#define PREFETCH(DATA) _mm_prefetch((const char *)(DATA) + AHEAD, _MM_HINT_T0)

#define EACH_GROUP(WORD)                                                                                               \
    const size_t groups = (m->columns + m->group - 1) / m->group;                                                      \
    const u32 *c = m->codes + tile * m->columns / (WORD) * ROWS;                                                       \
    const float *scale = m->scale + tile * groups * ROWS;                                                              \
    const float *offset = m->offset ? m->offset + tile * groups * ROWS : NULL;                                         \
    __m512 total = _mm512_loadu_ps(y);                                                                                 \
    for (size_t g = 0, k = 0; g < groups; g++) {                                                                       \
        const size_t end = m->columns - k < m->group ? m->columns : k + m->group;                                      \
        __m512 sum[4] = {_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps()};          \
        for (; k < end; k += (WORD), c += ROWS)

#define CLOSE_GROUP                                                                                                    \
    sum[0] = _mm512_add_ps(_mm512_add_ps(sum[0], sum[1]), _mm512_add_ps(sum[2], sum[3]));                              \
    total = _mm512_fmadd_ps(sum[0], _mm512_loadu_ps(scale + g * ROWS), total);                                         \
    if (offset) total = _mm512_fmadd_ps(_mm512_loadu_ps(offset + g * ROWS), _mm512_set1_ps(sums[g]), total);

#define ADD(I, VALUE) sum[(I) & 3] = _mm512_fmadd_ps(VALUE, _mm512_set1_ps(x[k + (I)]), sum[(I) & 3])

TARGET void matvec_nibbles_avx512(const matrix *m, size_t tile, const float *x, const float *sums, float *y) {
    const __m512 table = _mm512_loadu_ps(m->table);
    EACH_GROUP(8) {
        const __m512i v = _mm512_loadu_si512(c);
        PREFETCH(c);
        ADD(0, _mm512_permutexvar_ps(v, table)); /* of an index the lowest 4 bits count */
#define NIBBLE(I) ADD(I, _mm512_permutexvar_ps(_mm512_srli_epi32(v, 4 * (I)), table))
        NIBBLE(1), NIBBLE(2), NIBBLE(3), NIBBLE(4), NIBBLE(5), NIBBLE(6), NIBBLE(7);
    }
    CLOSE_GROUP
    }
    _mm512_storeu_ps(y, total);
}

/* One byte of 256 floats each. */
typedef struct {
    __m512i part[4];
} plane;

TARGET INLINE __m512i look(const plane *p, __m512i index, __mmask64 upper) {
    const __m512i low = _mm512_permutex2var_epi8(p->part[0], index, p->part[1]);
    const __m512i high = _mm512_permutex2var_epi8(p->part[2], index, p->part[3]);
    return _mm512_mask_blend_epi8(upper, low, high);
}

TARGET void matvec_table_avx512(const matrix *m, size_t tile, const float *x, const float *sums, float *y) {
    /* In every 128 bits there are 4 columns of 4 rows; they trade places, so that unpacking leaves rows in order. */
    const __m512i trade = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
    plane planes[4];
    u8 bytes[4][256];
    for (int i = 0; i < 256; i++)
        for (int p = 0; p < 4; p++) bytes[p][i] = ((const u8 *)(m->table + i))[p];
    for (int p = 0; p < 4; p++)
        for (int i = 0; i < 4; i++) planes[p].part[i] = _mm512_loadu_si512(bytes[p] + 64 * i);
    EACH_GROUP(4) {
        const __m512i v = _mm512_shuffle_epi8(_mm512_loadu_si512(c), trade);
        PREFETCH(c);
        const __mmask64 upper = _mm512_movepi8_mask(v);
        const __m512i a = look(planes, v, upper), b = look(planes + 1, v, upper);
        const __m512i d = look(planes + 2, v, upper), e = look(planes + 3, v, upper);
        const __m512i ab = _mm512_unpacklo_epi8(a, b), de = _mm512_unpacklo_epi8(d, e);
        const __m512i ab2 = _mm512_unpackhi_epi8(a, b), de2 = _mm512_unpackhi_epi8(d, e);
        ADD(0, _mm512_castsi512_ps(_mm512_unpacklo_epi16(ab, de)));
        ADD(1, _mm512_castsi512_ps(_mm512_unpackhi_epi16(ab, de)));
        ADD(2, _mm512_castsi512_ps(_mm512_unpacklo_epi16(ab2, de2)));
        ADD(3, _mm512_castsi512_ps(_mm512_unpackhi_epi16(ab2, de2)));
    }
    CLOSE_GROUP
    }
    _mm512_storeu_ps(y, total);
}

/* ---- whole numbers: u8 codes times s8 */

#define BROADCAST(AT) _mm512_set1_epi32((int)get32((const u8 *)(AT)))

TARGET INLINE void even(const matrix *m, size_t tile, const split *v, float *y, const int bits) {
    const size_t groups = (m->columns + m->group - 1) / m->group;
    const u32 *c = m->codes + tile * m->columns * (size_t)bits / 32 * ROWS;
    const float *scale = m->scale + tile * groups * ROWS;
    const float *offset = m->offset ? m->offset + tile * groups * ROWS : NULL;
    const __m512i nibble = _mm512_set1_epi8(15), zero = _mm512_setzero_si512();
    __m512 total = _mm512_loadu_ps(y);
    for (size_t g = 0, k = 0, piece = 0; g < groups; g++) {
        const size_t end = m->columns - k < m->group ? m->columns : k + m->group;
        __m512 dot = _mm512_setzero_ps();
        float all = 0;
        _mm_prefetch((const char *)(scale + g * ROWS) + 1024, _MM_HINT_T0);
        for (; k < end; piece++) {
            const size_t stop = end - k < PIECE ? end : k + PIECE;
            __m512i high = zero, high2 = zero, low = zero, low2 = zero;
            for (; k < stop; k += 8, c += (size_t)bits * 4) {
                __m512i a = _mm512_loadu_si512(c), b;
                PREFETCH(c);
                if (bits == 8) {
                    b = _mm512_loadu_si512(c + ROWS);
                    PREFETCH(c + ROWS);
                } else {
                    b = _mm512_and_si512(_mm512_srli_epi32(a, 4), nibble);
                    a = _mm512_and_si512(a, nibble);
                }
                high = _mm512_dpbusd_epi32(high, a, BROADCAST(v->high + k));
                low = _mm512_dpbusd_epi32(low, a, BROADCAST(v->low + k));
                high2 = _mm512_dpbusd_epi32(high2, b, BROADCAST(v->high + k + 4));
                low2 = _mm512_dpbusd_epi32(low2, b, BROADCAST(v->low + k + 4));
            }
            const __m512 upper = _mm512_cvtepi32_ps(_mm512_add_epi32(high, high2));
            const __m512 lower = _mm512_cvtepi32_ps(_mm512_add_epi32(low, low2));
            const __m512 both = _mm512_fmadd_ps(upper, _mm512_set1_ps(256), lower);
            dot = _mm512_fmadd_ps(_mm512_add_ps(both, _mm512_set1_ps(m->lowest * v->sum[piece])),
                                  _mm512_set1_ps(v->step[piece]), dot);
            all += v->step[piece] * v->sum[piece];
        }
        total = _mm512_fmadd_ps(dot, _mm512_loadu_ps(scale + g * ROWS), total);
        if (offset) total = _mm512_fmadd_ps(_mm512_loadu_ps(offset + g * ROWS), _mm512_set1_ps(all), total);
    }
    _mm512_storeu_ps(y, total);
}

TARGET void matvec_levels_avx512(const matrix *m, size_t tile, const split *v, float *y) { even(m, tile, v, y, 8); }
TARGET void matvec_steps_avx512(const matrix *m, size_t tile, const split *v, float *y) { even(m, tile, v, y, 4); }

TARGET void matvec_bytes_avx512(const matrix *m, size_t tile, const int8_t *x, int32_t *y) {
    const u32 *c = m->codes + tile * m->columns / 4 * ROWS;
    __m512i sum = _mm512_setzero_si512(), sum2 = sum;
    for (size_t k = 0; k < m->columns; k += 8, c += 2 * ROWS) {
        PREFETCH(c), PREFETCH(c + ROWS);
        sum = _mm512_dpbusd_epi32(sum, _mm512_loadu_si512(c), BROADCAST(x + k));
        sum2 = _mm512_dpbusd_epi32(sum2, _mm512_loadu_si512(c + ROWS), BROADCAST(x + k + 4));
    }
    _mm512_storeu_si512(y, _mm512_add_epi32(sum, sum2));
}

#endif
