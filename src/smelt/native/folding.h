/* Folding with carry-less products, for the checksum (crc32.c) and for the decoder that takes it on its way. */
#ifndef SMELT_FOLDING_H
#define SMELT_FOLDING_H

#include "native.h"

#if defined(SMELT_X86)
#include <immintrin.h>

/* Gopal et al. 2009, "Fast CRC Computation for Generic Polynomials Using PCLMULQDQ Instruction", Intel.

   Multiplied by x^n, sixteen bytes may be added to those n bits further on.  Each half has a constant of its own:
   x^(n+32) and x^(n-32) modulo the polynomial, reflected, and shifted by one bit, as reflected products are. */
#define TIMES_X128 0x1751997D0, 0x0CCAA009E
#define TIMES_X512 0x154442BD4, 0x1C6E41596
#define TIMES_X1024 0x1E88EF372, 0x14A7FE880
#define TIMES_X2048 0x11542778A, 0x1322D1430
#define FOLDING __attribute__((target("pclmul")))
#define WIDE_FOLDING __attribute__((target("avx512f,pclmul,vpclmulqdq")))

FOLDING static inline __m128i constants(int64_t low, int64_t high) { return _mm_set_epi64x(high, low); }

FOLDING static inline __m128i fold(__m128i x, __m128i times, __m128i onto) {
    const __m128i low = _mm_clmulepi64_si128(x, times, 0x00), high = _mm_clmulepi64_si128(x, times, 0x11);
    return _mm_xor_si128(_mm_xor_si128(low, high), onto);
}

FOLDING static inline __m128i load(const u8 *data) { return _mm_loadu_si128((const __m128i *)data); }

WIDE_FOLDING static inline __m512i wide_fold(__m512i x, __m512i times, __m512i onto) {
    const __m512i low = _mm512_clmulepi64_epi128(x, times, 0x00), high = _mm512_clmulepi64_epi128(x, times, 0x11);
    return _mm512_ternarylogic_epi64(low, high, onto, 0x96); /* the sum of all three */
}

/* The CRC of 64 bytes (before the inversion) and nothing else. */
u32 crc32_folded(const u8 *data);
/* Whether `wide_fold` may be used. */
int has_wide_folding(void);
#endif

#endif
