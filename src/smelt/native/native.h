/* What the files of the library share.  docs/format.md says what a chunk is, byte for byte.

   No function trusts its input: every length and index is checked before it is used, and a wrong one gives DAMAGED.
   Nothing here is kept between calls, so that any number of threads may call at once. */
#ifndef SMELT_NATIVE_H
#define SMELT_NATIVE_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if defined(_WIN32)
#define SMELT_API __declspec(dllexport)
#else
#define SMELT_API __attribute__((visibility("default")))
#endif

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define SMELT_X86 1
#elif defined(__aarch64__)
#define SMELT_NEON 1
#endif

typedef uint8_t u8;
typedef uint16_t u16;
typedef uint32_t u32;
typedef uint64_t u64;

/* Results below 0. */
enum { OK = 0, DAMAGED = -1, NO_MEMORY = -2, NO_ROOM = -3, WRONG_CALL = -4 };

/* What the machine can do; every level gives the same results. */
enum { PORTABLE = 0, SIMD = 1 /* AVX2 or NEON */, AVX512 = 2,
       PAST_CACHE = 3 /* AVX-512 that writes past the cache what will not stay in it anyway */ };
int best_level(void); /* of this machine */

/* Kinds of bodies. */
enum { RAW, CONSTANT, SPLIT, PLANES, UPPER, HALF, OFFSET, LOWER, BITS, NIBBLES, BYTES, NONZERO };

/* ---- rans.c: the alias method (docs/format.md, "rANS") */

enum { LANES = 128, MAX_LANES = 128, BLOCK = 1024, MAX_TABLES = 8 };

/* Bucket b of K holds entry b up to position `below`, entry other[b] from there on; slot = position * K + b.
   Vector decoders read the arrays with the low bits of the slot as index:
   slot >= from[b] means the other entry; rank = position + (other entry ? bias[b] : 0), modulo 65536. */
typedef struct {
    int buckets; /* K: 16, 32 or 256 */
    u16 from[256];
    u16 own_freq[256], other_freq[256]; /* in slots, of 65,536 */
    u16 bias[256];
    u8 own_value[256], other_value[256];
} rans_table;

/* The lanes of a stream, and what is left of its words. */
typedef struct {
    u16 high[MAX_LANES], low[MAX_LANES]; /* state = high << 16 | low, lane by lane */
    const u8 *words, *end;               /* little-endian u16 */
} rans_lanes;

/* Decodes `steps` times LANES symbols to out[0 .. steps * LANES): symbol i of a step from lane i.  Words are taken in
   the order of the symbols.  Returns how many steps it did: all, or fewer where the words near their end, so that
   a full vector might be read past it; the portable decoder does the rest.  Never reads outside words..end. */
typedef size_t rans_run(const rans_table *table, rans_lanes *lanes, size_t steps, u8 *out);
rans_run rans_run_avx2, rans_run_neon;

/* The same, with the table of each BLOCK of symbols: tables[classes[0]] for the first, and so on; classes may be NULL
   for tables[0].  Does nothing where there are 256 buckets, which do not fit in registers. */
size_t rans_run_avx512(const rans_table *tables, const u8 *classes, rans_lanes *lanes, size_t steps, u8 *out);

/* Any number of lanes, `count` <= lanes * steps symbols of which the last step may be short (its other lanes are
   decoded and dropped).  Returns OK or DAMAGED (words at an end). */
int rans_run_portable(const rans_table *table, rans_lanes *lanes, int number, size_t count, u8 *out);

/* ---- huffman.c (docs/format.md, "Huffman") */

/* Bytes of the coded symbols from the coder byte on, or NO_ROOM (more than `cap`), or NO_MEMORY.
   counts: of the 256 symbols; at least two differ from 0. */
int64_t huffman_encode(const u8 *symbols, size_t count, const u32 *counts, u8 *out, size_t cap);
/* What huffman_encode would give, in bytes, without doing it; with several segments a few bytes more. */
int64_t huffman_size(size_t count, const u32 *counts);
/* `in` begins with the coder byte; all of it must be used up.  Writes out[0 .. count) and nothing else. */
int huffman_decode(const u8 *in, size_t size, u8 *out, size_t count);

/* ---- crc32.c: that of zlib and PNG */
SMELT_API u32 smelt_crc32(u32 crc, const u8 *data, size_t size);
u32 crc32_at(int level, u32 crc, const u8 *data, size_t size);
/* That of two pieces of data one after the other; `size` bytes are in the second. */
u32 crc32_joined(u32 first, u32 second, size_t size);

/* ---- little-endian access wherever it lies */
#if defined(_WIN32) || (defined(__BYTE_ORDER__) && __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__)
#define SMELT_ACCESS(BITS)                                                                                             \
    static inline u##BITS get##BITS(const u8 *p) {                                                                     \
        u##BITS v;                                                                                                     \
        memcpy(&v, p, sizeof v);                                                                                       \
        return v;                                                                                                      \
    }                                                                                                                  \
    static inline void put##BITS(u8 *p, u##BITS v) { memcpy(p, &v, sizeof v); }
SMELT_ACCESS(16)
SMELT_ACCESS(32)
SMELT_ACCESS(64)
#else
#error "the library is for little-endian machines; elsewhere NumPy does its work"
#endif

#endif
