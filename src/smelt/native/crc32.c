/* The CRC-32 of zlib and PNG: polynomial 0x04C11DB7, its bits reflected.  Inside, crc is that before the inversion. */
#include "folding.h"

#if defined(SMELT_NEON) && defined(__linux__)
#include <sys/auxv.h>
#endif

/* ---- tables, sixteen bytes at a time (Kounavis & Berry 2008, IEEE Transactions on Computers 57(11))

   remainders[k][b] is the CRC of the byte b and k zeros: the sum of those of its bits, which are x^(8k + 39 - i) modulo
   the polynomial for bit i.  In a row each is the one before, divided by x. */
#define OF1(v, a) v, v ^ a
#define OF2(v, a, b) OF1(v, a), OF1(v ^ b, a)
#define OF3(v, a, b, c) OF2(v, a, b), OF2(v ^ c, a, b)
#define OF4(v, a, b, c, d) OF3(v, a, b, c), OF3(v ^ d, a, b, c)
#define OF5(v, a, b, c, d, e) OF4(v, a, b, c, d), OF4(v ^ e, a, b, c, d)
#define OF6(v, a, b, c, d, e, f) OF5(v, a, b, c, d, e), OF5(v ^ f, a, b, c, d, e)
#define OF7(v, a, b, c, d, e, f, g) OF6(v, a, b, c, d, e, f), OF6(v ^ g, a, b, c, d, e, f)
#define OF8(v, a, b, c, d, e, f, g, h) OF7(v, a, b, c, d, e, f, g), OF7(v ^ h, a, b, c, d, e, f, g)

static const u32 remainders[16][256] = {
    {OF8(0u, 0x77073096, 0xEE0E612C, 0x076DC419, 0x0EDB8832, 0x1DB71064, 0x3B6E20C8, 0x76DC4190, 0xEDB88320)},
    {OF8(0u, 0x191B3141, 0x32366282, 0x646CC504, 0xC8D98A08, 0x4AC21251, 0x958424A2, 0xF0794F05, 0x3B83984B)},
    {OF8(0u, 0x01C26A37, 0x0384D46E, 0x0709A8DC, 0x0E1351B8, 0x1C26A370, 0x384D46E0, 0x709A8DC0, 0xE1351B80)},
    {OF8(0u, 0xB8BC6765, 0xAA09C88B, 0x8F629757, 0xC5B428EF, 0x5019579F, 0xA032AF3E, 0x9B14583D, 0xED59B63B)},
    {OF8(0u, 0x3D6029B0, 0x7AC05360, 0xF580A6C0, 0x30704BC1, 0x60E09782, 0xC1C12F04, 0x58F35849, 0xB1E6B092)},
    {OF8(0u, 0xCB5CD3A5, 0x4DC8A10B, 0x9B914216, 0xEC53826D, 0x03D6029B, 0x07AC0536, 0x0F580A6C, 0x1EB014D8)},
    {OF8(0u, 0xA6770BB4, 0x979F1129, 0xF44F2413, 0x33EF4E67, 0x67DE9CCE, 0xCFBD399C, 0x440B7579, 0x8816EAF2)},
    {OF8(0u, 0xCCAA009E, 0x4225077D, 0x844A0EFA, 0xD3E51BB5, 0x7CBB312B, 0xF9766256, 0x299DC2ED, 0x533B85DA)},
    {OF8(0u, 0x177B1443, 0x2EF62886, 0x5DEC510C, 0xBBD8A218, 0xACC04271, 0x82F182A3, 0xDE920307, 0x6655004F)},
    {OF8(0u, 0xEFC26B3E, 0x04F5D03D, 0x09EBA07A, 0x13D740F4, 0x27AE81E8, 0x4F5D03D0, 0x9EBA07A0, 0xE6050901)},
    {OF8(0u, 0xC18EDFC0, 0x586CB9C1, 0xB0D97382, 0xBAC3E145, 0xAEF6C4CB, 0x869C8FD7, 0xD64819EF, 0x77E1359F)},
    {OF8(0u, 0x9BA54C6F, 0xEC3B9E9F, 0x03063B7F, 0x060C76FE, 0x0C18EDFC, 0x1831DBF8, 0x3063B7F0, 0x60C76FE0)},
    {OF8(0u, 0xDD96D985, 0x605CB54B, 0xC0B96A96, 0x5A03D36D, 0xB407A6DA, 0xB37E4BF5, 0xBD8D91AB, 0xA06A2517)},
    {OF8(0u, 0x9D0FE176, 0xE16EC4AD, 0x19AC8F1B, 0x33591E36, 0x66B23C6C, 0xCD6478D8, 0x41B9F7F1, 0x8373EFE2)},
    {OF8(0u, 0xB9FBDBE8, 0xA886B191, 0x8A7C6563, 0xCF89CC87, 0x44629F4F, 0x88C53E9E, 0xCAFB7B7D, 0x4E87F0BB)},
    {OF8(0u, 0xAE689191, 0x87A02563, 0xD4314C87, 0x73139F4F, 0xE6273E9E, 0x173F7B7D, 0x2E7EF6FA, 0x5CFDEDF4)},
};

static inline u32 four_bytes(u32 bytes, int zeros) {
    return (remainders[zeros + 3][bytes & 255] ^ remainders[zeros + 2][bytes >> 8 & 255]) ^
           (remainders[zeros + 1][bytes >> 16 & 255] ^ remainders[zeros][bytes >> 24]);
}

static u32 crc_by_tables(u32 crc, const u8 *data, size_t size) {
    for (; size >= 16; data += 16, size -= 16) {
        const u32 two = four_bytes(get32(data + 4), 8), three = four_bytes(get32(data + 8), 4);
        crc = (two ^ three ^ four_bytes(get32(data + 12), 0)) ^ four_bytes(get32(data) ^ crc, 12);
    }
    for (; size; data++, size--) crc = crc >> 8 ^ remainders[0][(crc ^ *data) & 255];
    return crc;
}

#if defined(SMELT_X86)

/* Of sixteen bytes and the data after them. */
FOLDING static u32 finish(__m128i x, const u8 *data, size_t size) {
    u8 last[16];
    for (; size >= 16; data += 16, size -= 16) x = fold(x, constants(TIMES_X128), load(data));
    _mm_storeu_si128((__m128i *)last, x);
    return crc_by_tables(crc_by_tables(0, last, 16), data, size);
}

/* At least 64 bytes. */
FOLDING static u32 crc_by_folding(u32 crc, const u8 *data, size_t size) {
    const __m128i times = constants(TIMES_X512), next = constants(TIMES_X128);
    __m128i a = _mm_xor_si128(load(data), _mm_cvtsi32_si128((int)crc));
    __m128i b = load(data + 16), c = load(data + 32), d = load(data + 48);
    for (data += 64, size -= 64; size >= 64; data += 64, size -= 64) {
        a = fold(a, times, load(data)), b = fold(b, times, load(data + 16));
        c = fold(c, times, load(data + 32)), d = fold(d, times, load(data + 48));
    }
    return finish(fold(fold(fold(a, next, b), next, c), next, d), data, size);
}

/* 64 bytes to sixteen. */
WIDE_FOLDING static inline __m128i narrow(__m512i a) {
    const __m128i within = constants(TIMES_X128);
    const __m128i x = fold(_mm512_extracti32x4_epi32(a, 0), within, _mm512_extracti32x4_epi32(a, 1));
    return fold(fold(x, within, _mm512_extracti32x4_epi32(a, 2)), within, _mm512_extracti32x4_epi32(a, 3));
}

/* At least 256 bytes. */
WIDE_FOLDING static u32 crc_by_wide_folding(u32 crc, const u8 *data, size_t size) {
    const __m512i times = _mm512_broadcast_i32x4(constants(TIMES_X2048));
    const __m512i next = _mm512_broadcast_i32x4(constants(TIMES_X512));
    __m512i a = _mm512_loadu_si512(data), b = _mm512_loadu_si512(data + 64);
    __m512i c = _mm512_loadu_si512(data + 128), d = _mm512_loadu_si512(data + 192);
    a = _mm512_xor_si512(a, _mm512_zextsi128_si512(_mm_cvtsi32_si128((int)crc)));
    for (data += 256, size -= 256; size >= 256; data += 256, size -= 256) {
        a = wide_fold(a, times, _mm512_loadu_si512(data));
        b = wide_fold(b, times, _mm512_loadu_si512(data + 64));
        c = wide_fold(c, times, _mm512_loadu_si512(data + 128));
        d = wide_fold(d, times, _mm512_loadu_si512(data + 192));
    }
    a = wide_fold(wide_fold(wide_fold(a, next, b), next, c), next, d);
    for (; size >= 64; data += 64, size -= 64) a = wide_fold(a, next, _mm512_loadu_si512(data));
    return finish(narrow(a), data, size);
}

WIDE_FOLDING u32 crc32_folded(const u8 *data) { return finish(narrow(_mm512_loadu_si512(data)), data, 0); }

static int has_folding(void) { return __builtin_cpu_supports("pclmul"); }
int has_wide_folding(void) {
    return has_folding() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("vpclmulqdq");
}

#elif defined(SMELT_NEON) && defined(__GNUC__)

/* ---- an instruction of its own.  As assembly: compilers do not agree on the name of the extension. */
#define INSTRUCTION(name, crc, value) __asm__(".arch_extension crc\n\t" name : "+r"(crc) : "r"(value))

static int has_instruction(void) {
#if defined(__ARM_FEATURE_CRC32)
    return 1;
#elif defined(__linux__)
    return (getauxval(AT_HWCAP) & 1 << 7) != 0; /* HWCAP_CRC32 */
#else
    return 0;
#endif
}

static u32 crc_by_instruction(u32 crc, const u8 *data, size_t size) {
    for (; size >= 8; data += 8, size -= 8) INSTRUCTION("crc32x %w0, %w0, %x1", crc, get64(data));
    for (; size; data++, size--) INSTRUCTION("crc32b %w0, %w0, %w1", crc, (u32)*data);
    return crc;
}

#endif

u32 crc32_at(int level, u32 crc, const u8 *data, size_t size) {
    crc = ~crc;
#if defined(SMELT_X86)
    if (level >= AVX512 && size >= 256 && has_wide_folding()) return ~crc_by_wide_folding(crc, data, size);
    if (level >= SIMD && size >= 64 && has_folding()) return ~crc_by_folding(crc, data, size);
#elif defined(SMELT_NEON) && defined(__GNUC__)
    if (level >= SIMD && has_instruction()) return ~crc_by_instruction(crc, data, size);
#endif
    (void)level;
    return ~crc_by_tables(crc, data, size);
}

SMELT_API u32 smelt_crc32(u32 crc, const u8 *data, size_t size) { return crc32_at(best_level(), crc, data, size); }

/* a * b modulo the polynomial; both are reflected, the coefficient of x^0 is the highest bit. */
static u32 multiplied(u32 a, u32 b) {
    u32 product = 0;
    for (u32 bit = (u32)1 << 31; bit; bit >>= 1) {
        if (a & bit) product ^= b;
        b = b & 1 ? b >> 1 ^ 0xEDB88320u : b >> 1;
    }
    return product;
}

u32 crc32_joined(u32 first, u32 second, size_t size) {
    u32 power = (u32)1 << 23; /* x^8, then its squares */
    for (; size; size >>= 1, power = multiplied(power, power))
        if (size & 1) first = multiplied(power, first);
    return first ^ second;
}
